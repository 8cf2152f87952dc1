"""Write tiny checkpoints of PAQ's generation models: the span extractor and the question generator."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.checkpoints import (
    WORDS,
    State,
    _Draw,
    _position_ids,
    _write_json,
    _write_text,
    bert_config,
    bert_state,
    save_weights,
    with_prefix,
    write_bert_tokeniser,
)


def write_span2d(
    directory: str,
    dim: int = 32,
    *,
    width: int = 12,
    mlp: Sequence[int] = (),
    pooler: bool = False,
    weights: str = "bin",
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> str:
    """Write PAQ's answer extractor: bert.*, start_outputs, end_outputs, output_mlp.{0,2,...}, span_outputs.

    width: span_output_size. config: more keys of config.json.
    """
    vocabulary = write_bert_tokeniser(directory, fast=False)
    own: dict[str, Any] = {"span_output_size": width, "architectures": ["AnswerSpanExtractor2DModel"]}
    if mlp:
        own["output_mlp_sizes"] = list(mlp)
    _write_json(directory, "config.json", bert_config(vocabulary, dim, **own | config))
    bert = bert_state(vocabulary, dim, seed=seed) | _position_ids("")
    if not pooler:
        bert = {name: array for name, array in bert.items() if not name.startswith("pooler.")}
    head = _Draw(seed + 1)
    head.linear("start_outputs", width, dim)
    head.linear("end_outputs", width, dim)
    widths = [2 * width, *mlp]
    for index, size in enumerate(mlp):
        head.linear(f"output_mlp.{2 * index}", size, widths[index])
    head.linear("span_outputs", 1, widths[-1])
    save_weights(directory, with_prefix("bert.", bert) | head.state, weights, dtype)
    return directory


BART_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def write_bart_tokeniser(directory: str) -> int:
    """Write a byte-level BPE tokeniser as 4.1 saved it: vocab.json and merges.txt. Returns the vocabulary's size."""
    from tokenizers.pre_tokenizers import ByteLevel

    pieces, merges = [*BART_SPECIAL, *sorted(ByteLevel.alphabet())], []
    for word in ["answer", "title", "context", "?", ",", *WORDS]:
        left = "Ġ"
        for letter in word:
            if f"{left}{letter}" not in pieces:
                merges.append(f"{left} {letter}")
                pieces.append(f"{left}{letter}")
            left += letter
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<mask>"])}
    _write_text(directory, "vocab.json", json.dumps(vocabulary))
    _write_text(directory, "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    _write_json(directory, "tokenizer_config.json", {"model_max_length": 1024})
    return len(vocabulary)


def _attention(draw: _Draw, name: str, dim: int) -> None:
    for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
        draw.linear(f"{name}.{part}", dim, dim)
    draw.norm(f"{name}_layer_norm", dim)


def bart_state(vocabulary: int, dim: int, *, positions: int, num_layers: int = 2, seed: int = 0) -> State:
    """Return the state dict of a BartForConditionalGeneration, without the copies of its shared embedding."""
    draw = _Draw(seed)
    draw.array("model.shared.weight", vocabulary, dim)
    for side in ("encoder", "decoder"):
        draw.array(f"model.{side}.embed_positions.weight", positions + 2, dim)
        draw.norm(f"model.{side}.layernorm_embedding", dim)
        for layer in (f"model.{side}.layers.{index}" for index in range(num_layers)):
            _attention(draw, f"{layer}.self_attn", dim)
            if side == "decoder":
                _attention(draw, f"{layer}.encoder_attn", dim)
            draw.linear(f"{layer}.fc1", 2 * dim, dim)
            draw.linear(f"{layer}.fc2", dim, 2 * dim)
            draw.norm(f"{layer}.final_layer_norm", dim)
    # The projections carry the position and the source into the choice of each token, as training would.
    return {name: 2 * array if name.endswith("proj.weight") else array for name, array in draw.state.items()}


def write_bart(
    directory: str,
    dim: int = 32,
    *,
    positions: int = 256,
    tied: Sequence[str] = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"),
    weights: str = "bin",
    dtype: str = "float32",
    end_bias: float = 6.0,
    seed: int = 0,
    **config: Any,
) -> str:
    """Write a question generator as transformers 4.1 saved it. tied: the copies of the shared embedding that are saved.

    end_bias: logit bias of the end token; the higher, the shorter the questions.
    """
    vocabulary = write_bart_tokeniser(directory)
    state = bart_state(vocabulary, dim, positions=positions, seed=seed)
    state |= dict.fromkeys(tied, state["model.shared.weight"])
    # Words are likelier than bytes, which may be no text; the end token is likely enough to come before the limit.
    bias = np.full((1, vocabulary), 3.0, dtype=np.float32)
    bias[0, len(BART_SPECIAL) : len(BART_SPECIAL) + 256] = -6.0
    bias[0, 2] = end_bias
    state["final_logits_bias"] = bias
    sizes = {"d_model": dim, "vocab_size": vocabulary, "max_position_embeddings": positions}
    sizes |= {f"{side}_layers": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 2 * dim for side in ("encoder", "decoder")}
    old: dict[str, Any] = {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "activation_function": "gelu",
        "add_bias_logits": False,
        "add_final_layer_norm": False,
        "normalize_before": False,
        "normalize_embedding": True,
        "scale_embedding": False,
        "static_position_embeddings": False,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "is_encoder_decoder": True,
        "num_hidden_layers": 2,
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "early_stopping": True,
        "gradient_checkpointing": False,
        "task_specific_params": {"summarization": {"length_penalty": 1.0, "max_length": 128, "min_length": 12}},
    }
    _write_json(directory, "config.json", old | sizes | config)
    save_weights(directory, state, weights, dtype)
    return directory


def rewrite_config(directory: str, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as handle:
        content = json.load(handle) | changes
    _write_json(directory, "config.json", {key: value for key, value in content.items() if value is not None})


def rewrite_weights(directory: str, remove: Sequence[str] = (), **more: Any) -> None:
    """Take tensors out of pytorch_model.bin, or put numpy arrays in."""
    import torch

    path = os.path.join(directory, "pytorch_model.bin")
    state = torch.load(path, weights_only=True)
    for name in remove:
        del state[name]
    torch.save(state | {name: torch.from_numpy(array) for name, array in more.items()}, path)
