"""Write tiny FiD readers and PAQ's passage retriever in the layouts of the released ones."""

from __future__ import annotations

import os
import pickle
import string
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np

from tests.checkpoints import (
    WORDS,
    State,
    _Draw,
    _position_ids,
    _write_json,
    bert_config,
    bert_state,
    save_weights,
    with_prefix,
    write_bert_tokeniser,
)

_SENTENCE = "question: who wrote the book? title: Alexandria context: The library of Egypt, 9,787 scrolls's"
_LETTERS = string.ascii_letters + string.digits + "éäÄ.,:;?!'()-"
_PIECES = dict.fromkeys([f"▁{word}" for word in (*WORDS, "title", "context", "King")] + ["▁", "78", "s", *_LETTERS])
T5_PIECES = 3 + len(_PIECES)
T5_VOCABULARY = T5_PIECES + 110  # a little above pieces + 100 sentinels, as 32,128 is above 32,100
CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@cache
def _t5_spiece() -> bytes:
    """Return a SentencePiece model with T5's normaliser (nmt_nfkc) and ids (<pad> 0, </s> 1, <unk> 2).

    SentencePiece makes the normaliser's table only when it trains; the pieces it finds are then replaced.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as pb

    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_SENTENCE] * 20),
        model_writer=out,
        vocab_size=40,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    proto = pb.ModelProto.FromString(out.getvalue())
    kinds = pb.ModelProto.SentencePiece
    del proto.pieces[:]
    for piece, kind in {"<pad>": kinds.CONTROL, "</s>": kinds.CONTROL, "<unk>": kinds.UNKNOWN}.items():
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for piece in _PIECES:
        proto.pieces.add(piece=piece, score=-4.0 if len(piece) > 1 else -6.0, type=kinds.NORMAL)
    content: bytes = proto.SerializeToString()
    return content


def write_t5_tokeniser(directory: str, *, fast: bool = False) -> str:
    """Write spiece.model alone, as transformers 4.1 saved it, or (fast) tokenizer.json alone."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "spiece.model")
    with open(path, "wb") as handle:
        handle.write(_t5_spiece())
    if fast:
        from pipelines.models.tokens import load_backend

        load_backend(directory, "T5Tokenizer").save(os.path.join(directory, "tokenizer.json"))
        os.remove(path)
    return directory


def t5_config(**more: Any) -> dict[str, Any]:
    """Return a config.json as transformers 3.0 wrote it, with generation settings that FiD does not use."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": T5_VOCABULARY}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    old = {"n_positions": 512, "output_past": True, "is_encoder_decoder": True, "relative_attention_num_buckets": 32}
    unused = {"num_beams": 4, "min_length": 6, "no_repeat_ngram_size": 2, "task_specific_params": {"summarization": {}}}
    rest = {"dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0}
    base = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    return {**base, **sizes, **ids, **old, **unused, **rest, **more}


def t5_state(config: dict[str, Any], seed: int = 0, *, gated: bool = False, tied: bool = True) -> State:
    """Return a T5 state dict under its plain names, tied tensors under all of theirs."""
    draw, width, inner = _Draw(seed), config["d_model"], config["d_kv"] * config["num_heads"]
    draw.array("shared.weight", config["vocab_size"], width)
    for side, cross in (("encoder", False), ("decoder", True)):
        for block in range(config["num_layers"]):
            layers = f"{side}.block.{block}.layer"
            names = ["SelfAttention", "EncDecAttention"][: 1 + cross]
            for number, attention in enumerate(names):
                for part in "qkv":
                    draw.array(f"{layers}.{number}.{attention}.{part}.weight", inner, width)
                draw.array(f"{layers}.{number}.{attention}.o.weight", width, inner)
            if block == 0:
                draw.array(f"{layers}.0.SelfAttention.relative_attention_bias.weight", 32, config["num_heads"])
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                draw.array(f"{layers}.{len(names)}.DenseReluDense.{part}.weight", config["d_ff"], width)
            draw.array(f"{layers}.{len(names)}.DenseReluDense.wo.weight", width, config["d_ff"])
            for number in range(len(names) + 1):
                draw.array(f"{layers}.{number}.layer_norm.weight", width, centre=1.0)
        draw.array(f"{side}.final_layer_norm.weight", width, centre=1.0)
    # Answers of a tiny model should differ from each other, and some should end: a wide output, a prominent </s>.
    draw.state["shared.weight"] *= 2.0
    draw.state["shared.weight"][1] *= 3.0
    if not tied:
        draw.array("lm_head.weight", config["vocab_size"], width)
    aliases = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(["lm_head.weight"] if tied else [])]
    return draw.state | dict.fromkeys(aliases, draw.state["shared.weight"])


def wrap(state: State, config: dict[str, Any]) -> State:
    """Return the state as FiD saved it: encoder and blocks wrapped, with the cross-attention bias of the time."""
    wrapped = {}
    for name, array in state.items():
        if name.startswith("encoder."):
            name = "encoder." + name.replace(".layer.", ".module.layer.")
        wrapped[name] = array
    bias = np.random.default_rng(9).standard_normal((32, config["num_heads"])).astype(np.float32)
    return wrapped | {CROSS_BIAS: bias}


def write_fid(
    directory: str,
    *,
    wrapped: bool = True,
    weights: str = "bin",
    dtype: str = "float32",
    seed: int = 0,
    config: dict[str, Any] | None = None,
    state: State | None = None,
) -> str:
    """Write a reader without a tokeniser. weights: "bin" comes with an optimizer.pth.tar beside it.

    safetensors hold one name only of a tied tensor, as that format's writers do.
    """
    os.makedirs(directory, exist_ok=True)
    config = config or t5_config()
    state = t5_state(config, seed) if state is None else state
    if weights == "safetensors":
        tied = {name for name in state if name != "shared.weight" and state[name] is state["shared.weight"]}
        state = {name: array for name, array in state.items() if name not in tied}
    save_weights(directory, wrap(state, config) if wrapped else state, weights, dtype)
    if weights == "bin":
        with open(os.path.join(directory, "optimizer.pth.tar"), "wb") as handle:
            handle.write(b"no tensors here")
    _write_json(directory, "config.json", config)
    return directory


def write_paq_passages(
    directory: str, dim: int = 32, *, prefix: str = "", weights: str = "bin", dtype: str = "float32", index: bool = True
) -> str:
    """Write a plain BERT with PAQ's index files beside it; the files' content is never looked at."""
    vocabulary = write_bert_tokeniser(directory, fast=False)
    _write_json(directory, "config.json", bert_config(vocabulary, dim))
    save_weights(directory, with_prefix(prefix, bert_state(vocabulary, dim) | _position_ids("")), weights, dtype)
    if index:
        for name, content in (("index", b"IHN2"), ("index_meta", pickle.dumps(["1", "2"]))):
            with open(os.path.join(directory, f"dpr_index.hnsw.SQ8.{name}.dpr"), "wb") as handle:
                handle.write(content)
    return directory
