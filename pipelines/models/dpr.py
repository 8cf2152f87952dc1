"""DPR and RDR bi-encoders in the Hugging Face layout: two BERTs, a passage side and a question side.

The vector is the last hidden state at position 0 (not BERT's pooler), then `encode_proj` where the checkpoint has it.
Passages are (title, text) pairs under all-zero token types, because DPR was trained and run so; score: dot product.
Source: Karpukhin et al. 2020 and the released encoders' documented formatting. RDR (Yang and Seo 2021) has the same
layout and classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import CheckpointError
from pipelines.models import tokens
from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, Tokens, refuse_options
from pipelines.models.files import (
    mentions,
    native_files,
    peek_json,
    read_json,
    refuse,
    require_files,
    tensor_shapes,
    weight_files,
)

NAMES: dict[Side, str] = {"passage": "context encoder", "query": "question encoder"}
FORMATTING = "the pair (title, text), token types all zero; the text alone when there is no title"
MAX_LENGTH = 256

_PREFIXES: dict[Side, str] = {"passage": "ctx_encoder.", "query": "question_encoder."}
_ARCHITECTURES: dict[str, Side] = {"DPRContextEncoder": "passage", "DPRQuestionEncoder": "query"}
_READER = "span_predictor."


def recognises(directory: str) -> bool:
    return is_dpr(directory) and not is_reader(directory)


def is_dpr(directory: str) -> bool:
    """Say whether config.json names the DPR type, and neither modules.json nor a `.cp` file says otherwise."""
    if peek_json(directory, "config.json").get("model_type") != "dpr":
        return False
    return not os.path.isfile(os.path.join(directory, "modules.json")) and not native_files(directory)


def is_reader(directory: str) -> bool:
    """Say whether a DPR directory is a reader: by its architectures, by its tensors where those are not given."""
    declared = peek_json(directory, "config.json").get("architectures")
    if isinstance(declared, list) and declared:
        return "DPRReader" in declared
    try:
        paths = weight_files(directory)
    except CheckpointError:
        return False
    # A safetensors file begins with its tensors' names in JSON, so the same look will do.
    return any(mentions(path, (_READER,)) for path in paths)


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None) -> EncoderInfo:
    """Describe the encoder. Raises CheckpointError for a mixed-up or incomplete directory, ConfigError for options."""
    refuse_options("DPR", "dot", similarity, formatting)
    require_files(directory)
    config = read_json(directory, "config.json", required=True)
    shapes = tensor_shapes(directory)
    side = _side(directory, config, list(shapes))
    projection = shapes.get(f"{_PREFIXES[side]}encode_proj.weight")
    return EncoderInfo(
        family="dpr",
        dim=projection[0] if projection else int(config.get("hidden_size", 768)),
        similarity="dot",
        max_length=MAX_LENGTH,
        formatting=FORMATTING,
        details={"side": side, "projected": projection is not None, "pooling": "cls"},
    )


def _side(directory: str, config: dict[str, Any], names: list[str]) -> Side:
    """Return which encoder this is, from the tensor names; config.json must not say otherwise."""
    declared = [str(name) for name in config.get("architectures") or []]
    hint = "take config.json and weights from the same model"
    if any(name.startswith(_READER) for name in names):
        what = f"config.json says {', '.join(declared)} but the weights are a reader's"
        refuse(what, directory, expected="a DPR context or question encoder", hint=hint)
    found = {side for side, prefix in _PREFIXES.items() if any(name.startswith(prefix) for name in names)}
    if len(found) != 1:
        expected = "tensors named ctx_encoder.* or question_encoder.*"
        refuse("the weights are no DPR encoder's", directory, expected=expected)
    (side,) = found
    sides = {_ARCHITECTURES[name] for name in declared if name in _ARCHITECTURES}
    if sides and sides != {side}:
        what = f"config.json says {', '.join(declared)} but the weights are a {NAMES[side]}'s"
        refuse(what, directory, hint=hint)
    return side


@dataclass
class DprTokeniser:
    """Passages as (title, text) pairs, questions alone; token types are left out, which means zeros."""

    encoder: tokens.TextEncoder

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        pairs = zip(titles, texts, strict=True)
        return self.encoder.encode([_passage(title.strip(), text) for title, text in pairs])

    def queries(self, texts: Sequence[str]) -> Tokens:
        return self.encoder.encode([text.strip().replace("’", "'") for text in texts])


def passage_body(text: str) -> str:
    """Return the text as DPR reads it: without outer space and without the quotes of its TSV files."""
    return text.strip().strip('"').strip()


def _passage(title: str, text: str) -> tokens.Text:
    body = passage_body(text)
    return (title, body) if title else body


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
) -> DprTokeniser:
    # BertTokenizer: transformers' DPR tokenisers lower-case whatever the checkpoint says.
    backend = tokens.load_backend(directory, "BertTokenizer")
    limit = int(read_json(directory, "config.json").get("max_position_embeddings", 512))
    length = tokens.checked_length(max_length, MAX_LENGTH, limit)
    return DprTokeniser(tokens.TextEncoder(backend, tokens.pad_id(directory, backend), length))


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the encoder of `side`. Raises CheckpointError when the directory is the other side's, or incomplete."""
    from transformers import BertConfig

    from pipelines.models.weights import read_config, read_weights

    found = info(directory).details["side"]
    if found != side:
        expected = f"a DPR {NAMES[side]}, because it is to encode the {side} side"
        refuse(f"this is a DPR {NAMES[found]}", directory, expected=expected, hint="swap the two directories")
    config = read_config(directory)
    own = {name.removeprefix(_PREFIXES[side]): tensor for name, tensor in read_weights(directory).items()}
    bert = {name.removeprefix("bert_model."): own.pop(name) for name in list(own) if name.startswith("bert_model.")}
    if config.projection_dim > 0 and "encode_proj.weight" not in own:
        refuse("the weights lack encode_proj.weight", directory, expected=f"projection_dim {config.projection_dim}")
    return build_tower(BertConfig(**config.to_dict()), bert, own, dtype, directory, side).on(device)


def build_tower(
    config: Any, bert: dict[str, Any], projection: dict[str, Any], dtype: str, where: str, side: Side
) -> Any:
    """Return the tower of a BERT (its plain keys in `bert`) and its `encode_proj.*` tensors, if any, on the CPU.

    Raises CheckpointError unless both are complete and nothing is left over.
    """
    from transformers import BertModel

    from pipelines.models.tower import EncoderTower
    from pipelines.models.weights import build_model, check_names, load_linear

    wanted = {"encode_proj.weight", "encode_proj.bias"} if projection else set()
    check_names(sorted(wanted - set(projection)), sorted(set(projection) - wanted), where, f"a DPR {NAMES[side]}")
    backbone = build_model(BertModel, config, bert, dtype, where)
    layers = [load_linear(projection["encode_proj.weight"], projection["encode_proj.bias"])] if projection else []
    dim = layers[0].out_features if layers else config.hidden_size
    return EncoderTower(backbone, dim, ["cls"], layers)
