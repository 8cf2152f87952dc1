"""DPR and RDR bi-encoders in the Hugging Face layout: two BERTs, a passage side and a question side.

The vector is the last hidden state at position 0 (not BERT's pooler), then `encode_proj` where the checkpoint has it.
Passages are (title, text) pairs under all-zero token types, because DPR was trained and run so; score: dot product.
Source: Karpukhin et al. 2020 and the released encoders' documented formatting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.models import tokens
from pipelines.models.base import EncoderInfo, Side, Tokens
from pipelines.models.files import read_json, refuse, require_files, tensor_shapes

_PREFIXES: dict[str, Side] = {"ctx_encoder.": "passage", "question_encoder.": "query"}
_ARCHITECTURES: dict[str, Side] = {"DPRContextEncoder": "passage", "DPRQuestionEncoder": "query"}
_NAMES: dict[Side, str] = {"passage": "context encoder", "query": "question encoder"}
_MAX_LENGTH = 256


def recognises(directory: str) -> bool:
    return read_json(directory, "config.json").get("model_type") == "dpr"


def info(directory: str) -> EncoderInfo:
    """Describe the encoder. Raises CheckpointError for a reader, a mixed-up or an incomplete directory."""
    require_files(directory)
    config = read_json(directory, "config.json", required=True)
    shapes = tensor_shapes(directory)
    side = _side(directory, config, list(shapes))
    projection = shapes.get(f"{_prefix(side)}encode_proj.weight")
    return EncoderInfo(
        family="dpr",
        dim=projection[0] if projection else int(config.get("hidden_size", 768)),
        similarity="dot",
        max_length=_MAX_LENGTH,
        formatting="the pair (title, text), token types all zero; the text alone when there is no title",
        details={"side": side, "projected": projection is not None, "pooling": "cls"},
    )


def _side(directory: str, config: dict[str, Any], names: list[str]) -> Side:
    """Return which encoder this is, from the tensor names; config.json must not say otherwise."""
    declared = [str(name) for name in config.get("architectures") or []]
    if "DPRReader" in declared or any(name.startswith("span_predictor.") for name in names):
        hint = "give the context encoder and question encoder directories; the reader answers, it does not embed"
        refuse("this is a DPR reader", directory, expected="a DPR context or question encoder", hint=hint)
    found = {side for prefix, side in _PREFIXES.items() if any(name.startswith(prefix) for name in names)}
    if len(found) != 1:
        expected = "tensors named ctx_encoder.* or question_encoder.*"
        refuse("the weights are no DPR encoder's", directory, expected=expected)
    (side,) = found
    sides = {_ARCHITECTURES[name] for name in declared if name in _ARCHITECTURES}
    if sides and sides != {side}:
        what = f"config.json says {', '.join(declared)} but the weights are a {_NAMES[side]}'s"
        refuse(what, directory, hint="take config.json and weights from the same model")
    return side


def _prefix(side: Side) -> str:
    return next(prefix for prefix, owner in _PREFIXES.items() if owner == side)


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


def _passage(title: str, text: str) -> tokens.Text:
    body = text.strip().strip('"').strip()
    return (title, body) if title else body


def load_tokeniser(directory: str, max_length: int | None = None) -> DprTokeniser:
    # BertTokenizer: transformers' DPR tokenisers lower-case whatever the checkpoint says.
    backend = tokens.load_backend(directory, "BertTokenizer")
    limit = int(read_json(directory, "config.json").get("max_position_embeddings", 512))
    length = tokens.checked_length(max_length, _MAX_LENGTH, limit)
    return DprTokeniser(tokens.TextEncoder(backend, tokens.pad_id(directory, backend), length))


def load_tower(directory: str, side: Side, dtype: str, device: str) -> Any:
    """Load the encoder of `side`. Raises CheckpointError when the directory is the other side's, or incomplete."""
    from transformers import BertConfig, BertModel

    from pipelines.models.tower import EncoderTower
    from pipelines.models.weights import build_model, check_names, load_linear, read_config, read_weights

    described = info(directory)
    found = described.details["side"]
    if found != side:
        expected = f"a DPR {_NAMES[side]}, because it is to encode the {side} side"
        refuse(f"this is a DPR {_NAMES[found]}", directory, expected=expected, hint="swap the two directories")
    config = read_config(directory)
    own = {name.removeprefix(_prefix(side)): tensor for name, tensor in read_weights(directory).items()}
    bert = {name.removeprefix("bert_model."): own.pop(name) for name in list(own) if name.startswith("bert_model.")}
    projection = {name: own.pop(name) for name in list(own) if name.startswith("encode_proj.")}
    wanted = {"encode_proj.weight", "encode_proj.bias"} if projection or config.projection_dim > 0 else set()
    check_names(sorted(wanted - set(projection)), sorted(own), directory, f"a DPR {_NAMES[side]}")
    backbone = build_model(BertModel, BertConfig(**config.to_dict()), bert, dtype, directory)
    layers = [load_linear(projection["encode_proj.weight"], projection["encode_proj.bias"])] if projection else []
    return EncoderTower(backbone, described.dim, ["cls"], layers).eval().to(device)
