"""Write tiny checkpoints with random weights in the layouts of the released ones.

Weights are drawn from a seed with a spread that shows a skipped layer, bias or norm. A sentence-transformer is under
200 kB, needs neither torch nor transformers to write, and tokenises without transformers.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

State = dict[str, npt.NDArray[Any]]

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "in",
    "to",
    "is",
    "was",
    "library",
    "alexandria",
    "who",
    "what",
    "when",
    "where",
    "wrote",
    "built",
    "city",
    "book",
    "king",
    "war",
    "river",
    "first",
    "great",
    "ancient",
    "scroll",
    "index",
    "search",
    "passage",
    "question",
    "answer",
    "model",
    "ray",
    "egypt",
    "greek",
    "world",
    "year",
    "name",
]
_PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[]_")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


# Tokenisers


def bert_vocabulary(*, cased: bool = False) -> list[str]:
    letters = string.ascii_lowercase + string.digits + "éüß" + (string.ascii_uppercase if cased else "")
    words = [*WORDS, *(word.capitalize() for word in WORDS)] if cased else WORDS
    pieces = [*_SPECIAL, *_PUNCTUATION, "’", *letters, *(f"##{letter}" for letter in letters), *words]
    return list(dict.fromkeys(pieces))


def write_bert_tokeniser(
    directory: str, *, fast: bool = True, cased: bool = False, settings: dict[str, Any] | None = None
) -> int:
    """Write vocab.txt and, when `fast`, tokenizer.json. Returns the size of the vocabulary.

    settings: the content of tokenizer_config.json (default: its do_lower_case flag).
    """
    vocabulary = bert_vocabulary(cased=cased)
    _write_text(directory, "vocab.txt", "\n".join(vocabulary) + "\n")
    _write_json(directory, "tokenizer_config.json", {"do_lower_case": not cased} if settings is None else settings)
    if fast:
        _write_text(directory, "tokenizer.json", _bert_backend(vocabulary, lower=not cased).to_str())
    return len(vocabulary)


def _bert_backend(vocabulary: list[str], *, lower: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {piece: index for index, piece in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix="##"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    backend.add_special_tokens(_SPECIAL)
    # Files in the wild carry their last training run's truncation and padding.
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    return backend


def write_spiece(directory: str, user_defined: str = "") -> int:
    """Write a spiece.model as transformers 4.1 saved it (no tokenizer.json). Returns the size of the vocabulary.

    user_defined: characters that are user-defined pieces, as ALBERT's brackets, quotes, dots and dashes are.
    """
    from sentencepiece import sentencepiece_model_pb2 as pb

    kinds = pb.ModelProto.SentencePiece
    proto = pb.ModelProto()
    special = {"<pad>": kinds.CONTROL, "<unk>": kinds.UNKNOWN} | dict.fromkeys(
        ("[CLS]", "[SEP]", "[MASK]"), kinds.CONTROL
    )
    for piece, kind in special.items():
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    characters = string.ascii_lowercase + string.digits + "".join(_PUNCTUATION)
    scored = {"▁": -3.0} | {character: -6.0 for character in characters if character not in "[]"}
    scored |= {f"▁{word}": -4.0 for word in WORDS} | {"9,": -2.0, "▁9,": -2.0, "78": -3.0}
    for character in user_defined:
        scored.pop(character, None)
        proto.pieces.add(piece=character, score=0.0, type=kinds.USER_DEFINED)
    for piece, score in scored.items():
        proto.pieces.add(piece=piece, score=score, type=kinds.NORMAL)
    proto.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
    proto.trainer_spec.unk_id, proto.trainer_spec.pad_id = 1, 0
    proto.normalizer_spec.name = "identity"
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "spiece.model"), "wb") as handle:
        handle.write(proto.SerializeToString())
    _write_json(directory, "tokenizer_config.json", {"do_lower_case": True})
    return len(proto.pieces)


# Weights


class _Draw:
    """Draw weights: matrices and biases around 0, norms around 1, all with a spread of 0.3."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.state: State = {}

    def array(self, name: str, *shape: int, centre: float = 0.0) -> None:
        self.state[name] = (centre + 0.3 * self.rng.standard_normal(shape)).astype(np.float32)

    def linear(self, name: str, out: int, inside: int) -> None:
        self.array(f"{name}.weight", out, inside)
        self.array(f"{name}.bias", out)

    def norm(self, name: str, width: int) -> None:
        self.array(f"{name}.weight", width, centre=1.0)
        self.array(f"{name}.bias", width)

    def embeddings(self, vocabulary: int, width: int) -> None:
        self.array("embeddings.word_embeddings.weight", vocabulary, width)
        self.array("embeddings.position_embeddings.weight", 512, width)
        self.array("embeddings.token_type_embeddings.weight", 2, width)
        self.norm("embeddings.LayerNorm", width)


def bert_state(vocabulary: int, dim: int, *, num_layers: int = 2, seed: int = 0) -> State:
    """Return a BERT state dict, pooler included."""
    draw = _Draw(seed)
    draw.embeddings(vocabulary, dim)
    for layer in (f"encoder.layer.{index}" for index in range(num_layers)):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            draw.linear(f"{layer}.attention.{part}", dim, dim)
        draw.norm(f"{layer}.attention.output.LayerNorm", dim)
        draw.linear(f"{layer}.intermediate.dense", 2 * dim, dim)
        draw.linear(f"{layer}.output.dense", dim, 2 * dim)
        draw.norm(f"{layer}.output.LayerNorm", dim)
    draw.linear("pooler.dense", dim, dim)
    return draw.state


def albert_state(vocabulary: int, dim: int, *, embedding: int = 16, seed: int = 0) -> State:
    """Return an ALBERT state dict (one shared layer), pooler included."""
    draw = _Draw(seed)
    draw.embeddings(vocabulary, embedding)
    draw.linear("encoder.embedding_hidden_mapping_in", dim, embedding)
    layer = "encoder.albert_layer_groups.0.albert_layers.0"
    for part in ("query", "key", "value", "dense"):
        draw.linear(f"{layer}.attention.{part}", dim, dim)
    draw.norm(f"{layer}.attention.LayerNorm", dim)
    draw.linear(f"{layer}.ffn", 2 * dim, dim)
    draw.linear(f"{layer}.ffn_output", dim, 2 * dim)
    draw.norm(f"{layer}.full_layer_layer_norm", dim)
    draw.linear("pooler", dim, dim)
    return draw.state


def linear_state(name: str, out: int, inside: int, *, bias: bool = True, seed: int = 1) -> State:
    draw = _Draw(seed)
    draw.linear(name, out, inside)
    return draw.state if bias else {f"{name}.weight": draw.state[f"{name}.weight"]}


def with_prefix(prefix: str, state: State) -> State:
    return {prefix + name: array for name, array in state.items()}


def _position_ids(prefix: str) -> State:
    return {f"{prefix}embeddings.position_ids": np.arange(512)[None]}


def save_weights(directory: str, state: State, weights: str = "safetensors", dtype: str = "float32") -> None:
    """Write model.safetensors, or pytorch_model.bin when weights is "bin". dtype: of the floating tensors."""
    os.makedirs(directory, exist_ok=True)
    cast = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in state.items()}
    if weights == "bin":
        import torch

        torch.save({n: torch.from_numpy(a) for n, a in cast.items()}, os.path.join(directory, "pytorch_model.bin"))
    else:
        from safetensors.numpy import save_file

        save_file(cast, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})


# Directories


def bert_config(vocabulary: int, dim: int, **more: Any) -> dict[str, Any]:
    """Return a config.json as transformers 4.1 wrote it."""
    sizes = {"hidden_size": dim, "intermediate_size": 2 * dim, "num_hidden_layers": 2, "num_attention_heads": 4}
    old = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "gradient_checkpointing": False}
    rest = {"vocab_size": vocabulary, "max_position_embeddings": 512, "type_vocab_size": 2, "pad_token_id": 0}
    base = {"model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    return {**base, **sizes, **old, **rest, **more}


def write_dpr(
    directory: str,
    side: str,
    dim: int = 32,
    *,
    projection: int = 0,
    weights: str = "bin",
    dtype: str = "float32",
    seed: int = 0,
) -> str:
    """Write a DPR encoder ("passage", "query") or "reader" with its old prefixes, position_ids and pooler."""
    tower = {"passage": "ctx_encoder.", "query": "question_encoder.", "reader": "span_predictor.encoder."}[side]
    names = {"passage": "DPRContextEncoder", "query": "DPRQuestionEncoder", "reader": "DPRReader"}
    vocabulary = write_bert_tokeniser(directory, fast=False)
    config = bert_config(vocabulary, dim, projection_dim=projection)
    _write_json(directory, "config.json", config | {"model_type": "dpr", "architectures": [names[side]]})
    bert = bert_state(vocabulary, dim, seed=seed) | _position_ids("")
    state = with_prefix(f"{tower}bert_model.", bert)
    if projection:
        state |= linear_state(f"{tower}encode_proj", projection, dim)
    if side == "reader":
        state |= linear_state("span_predictor.qa_outputs", 2, dim) | linear_state(
            "span_predictor.qa_classifier", 1, dim
        )
    save_weights(directory, state, weights, dtype)
    return directory


def write_paq(
    directory: str,
    projection: int = 256,
    dim: int = 32,
    *,
    prefix: str = "albert.",
    weights: str = "bin",
    dtype: str = "float32",
) -> str:
    """Write a PAQ retriever with spiece.model alone; projection 0 leaves encode_proj out."""
    vocabulary = write_spiece(directory)
    old = {"net_structure_type": 0, "gap_size": 0, "num_memory_blocks": 0, "down_scale_factor": 1, "embedding_size": 16}
    shape = {"num_hidden_groups": 1, "inner_group_num": 1, "num_hidden_layers": 2, "hidden_act": "gelu_new"}
    config = bert_config(vocabulary, dim, model_type="albert", architectures=["AlbertForMaskedLM"])
    _write_json(directory, "config.json", config | old | shape)
    state = with_prefix(prefix, albert_state(vocabulary, dim) | _position_ids(""))
    if projection:
        state |= linear_state("encode_proj", projection, dim)
    save_weights(directory, state, weights, dtype)
    return directory


def write_cross_encoder(
    directory: str, labels: int = 1, dim: int = 32, *, weights: str = "safetensors", seed: int = 0
) -> str:
    """Write a BERT sequence-classification directory."""
    vocabulary = write_bert_tokeniser(directory)
    names = {str(index): f"LABEL_{index}" for index in range(labels)}
    config = bert_config(vocabulary, dim, architectures=["BertForSequenceClassification"], id2label=names)
    _write_json(directory, "config.json", config)
    state = with_prefix("bert.", bert_state(vocabulary, dim, seed=seed) | _position_ids(""))
    save_weights(directory, state | linear_state("classifier", labels, dim), weights)
    return directory


def write_sentence_transformer(
    directory: str,
    dim: int = 32,
    *,
    modes: Sequence[str] = ("mean_tokens",),
    extras: Sequence[str] = ("Normalize",),
    dense: dict[str, Any] | None = None,
    layout: str = "hub",
    settings: dict[str, Any] | None = None,
    max_seq_length: int | None = 128,
    do_lower_case: bool = False,
    cased: bool = False,
    weights: str = "safetensors",
    dtype: str = "float32",
    seed: int = 0,
) -> str:
    """Write a sentence-transformers directory.

    modes: old pooling keys without their prefix. extras: Dense, LayerNorm, Normalize in order. dense: out_features,
    bias and activation_function of Dense. layout: "hub", or "v0.2" (transformer in 0_Transformer, slow tokeniser).
    settings: of config_sentence_transformers.json (similarity_fn_name, prompts, default_prompt_name).
    """
    hub = layout == "hub"
    transformer = directory if hub else os.path.join(directory, "0_Transformer")
    vocabulary = write_bert_tokeniser(transformer, fast=hub, cased=cased)
    _write_json(transformer, "config.json", bert_config(vocabulary, dim))
    flags = {"max_seq_length": max_seq_length, "do_lower_case": do_lower_case}
    _write_json(transformer, "sentence_bert_config.json", flags)
    state = bert_state(vocabulary, dim, seed=seed) | _position_ids("")
    save_weights(transformer, state, weights, dtype)
    modules = [("Transformer", "" if hub else "0_Transformer"), ("Pooling", "1_Pooling")]
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {f"pooling_mode_{mode}": mode in modes for mode in known}
    _write_json(os.path.join(directory, "1_Pooling"), "config.json", {"word_embedding_dimension": dim} | pooling)
    width = dim * len(modes)
    for index, kind in enumerate(extras, start=2):
        path = f"{index}_{kind}"
        width = _write_extra(os.path.join(directory, path), kind, width, dense or {}, "safetensors" if hub else "bin")
        modules.append((kind, path))
    _write_modules(directory, modules)
    if hub:
        _write_json(directory, "config_sentence_transformers.json", settings or {})
    else:
        _write_json(directory, "config.json", {"__version__": "1.1.0"})
    return directory


def _write_modules(directory: str, modules: list[tuple[str, str]]) -> None:
    rows = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(modules)
    ]
    _write_json(directory, "modules.json", rows)


def _write_extra(folder: str, kind: str, width: int, dense: dict[str, Any], weights: str) -> int:
    """Write one layer behind the pooling. Returns the width of its output."""
    os.makedirs(folder, exist_ok=True)
    if kind == "LayerNorm":
        _write_json(folder, "config.json", {"dimension": width})
        draw = _Draw(2)
        draw.norm("norm", width)
        save_weights(folder, draw.state, weights)
    if kind == "Dense":
        default = {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh", "out_features": 24}
        config = {"in_features": width, **default, **dense}
        _write_json(folder, "config.json", config)
        save_weights(folder, linear_state("linear", config["out_features"], width, bias=config["bias"]), weights)
        return int(config["out_features"])
    return width


def _write_text(directory: str, name: str, text: str) -> None:
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, name), "w", encoding="utf-8") as handle:
        handle.write(text)


def _write_json(directory: str, name: str, content: Any) -> None:
    _write_text(directory, name, json.dumps(content, indent=2))
