"""PAQ (RePAQ) retrievers: one ALBERT for the incoming question and for the stored question of a QA pair.

The vector is the last hidden state at position 0, then Linear `encode_proj` where the weights have it; its width is
read from them (released models are 256 or 768 wide; any is accepted). Only the question is embedded, never the answer
or a title. Score: dot product. Source: Lewis et al. 2021 and the released retrievers' documented formatting.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.models import paq_reranker, tokens
from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, Tokens, refuse_options
from pipelines.models.cross_encoder import architectures
from pipelines.models.files import peek_json, read_json, refuse, require_files, tensor_shapes

_MAX_LENGTH = 512
_OTHER_TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


def recognises(directory: str) -> bool:
    """Tell by config.json; where it names the model that training started from, by the absence of a reranker's head."""
    if os.path.isfile(os.path.join(directory, "modules.json")):
        return False  # an ALBERT inside sentence-transformers
    config = peek_json(directory, "config.json")
    if config.get("model_type") != "albert" or any(name.endswith(_OTHER_TASKS) for name in architectures(config)):
        return False
    return not paq_reranker.recognises(directory)


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None) -> EncoderInfo:
    """Describe the retriever. Raises CheckpointError for a PAQ reranker or an ALBERT language model."""
    refuse_options("PAQ", "dot", similarity, formatting)
    require_files(directory)
    config = read_json(directory, "config.json", required=True)
    shapes = tensor_shapes(directory)
    if any(name.startswith("classifier.") for name in shapes):
        refuse("this is a PAQ reranker", directory, expected="a PAQ retriever", hint="use it to rerank, not to embed")
    if any(name.startswith("predictions.") for name in shapes):
        hint = "give a PAQ retriever, or a sentence-transformers directory"
        refuse("this is an ALBERT language model", directory, expected="a PAQ retriever", hint=hint)
    weight, _ = _projection_names(shapes, directory)
    return EncoderInfo(
        family="paq",
        dim=shapes[weight][0] if weight else int(config.get("hidden_size", 768)),
        similarity="dot",
        max_length=_MAX_LENGTH,
        formatting="the text (the question of a QA pair) alone, lower-cased, without outer question marks; no title",
        details={"projected": weight is not None, "pooling": "cls"},
    )


def _projection_names(names: Iterable[str], directory: str) -> tuple[str | None, str | None]:
    """Return the names of the projection's weight and bias (any prefix), or (None, None) when there is none."""
    mine = [name for name in names if "encode_proj" in name]
    weights, biases = [n for n in mine if n.endswith("weight")], [n for n in mine if n.endswith("bias")]
    if not mine:
        return None, None
    if len(mine) != 2 or len(weights) != 1 or len(biases) != 1:
        expected = "one encode_proj weight and one encode_proj bias, or neither"
        refuse(f"the projection is incomplete: {', '.join(sorted(mine))}", directory, expected=expected)
    return weights[0], biases[0]


@dataclass
class PaqTokeniser:
    """Both sides are questions."""

    encoder: tokens.TextEncoder

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        return self.queries(texts)

    def queries(self, texts: Sequence[str]) -> Tokens:
        return self.encoder.encode([normalise_question(text) for text in texts])


def normalise_question(text: str) -> str:
    """Return the question as the retrievers were trained to see it: bare of outer "?" and in lower case."""
    return text.strip().strip("?").lower().strip()


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
) -> PaqTokeniser:
    backend = tokens.load_backend(directory, "AlbertTokenizer")
    limit = int(read_json(directory, "config.json").get("max_position_embeddings", _MAX_LENGTH))
    length = tokens.checked_length(max_length, _MAX_LENGTH, limit)
    return PaqTokeniser(tokens.TextEncoder(backend, tokens.pad_id(directory, backend), length))


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the retriever; both sides share it. Raises CheckpointError when it is incomplete."""
    from transformers import AlbertModel

    from pipelines.models.tower import EncoderTower
    from pipelines.models.weights import build_model, load_linear, read_config, read_weights

    described = info(directory)
    state = read_weights(directory)
    weight, bias = _projection_names(state, directory)
    layers = [load_linear(state.pop(weight), state.pop(bias))] if weight and bias else []
    albert = {name.replace("albert.", ""): tensor for name, tensor in state.items()}
    backbone = build_model(AlbertModel, read_config(directory), albert, dtype, directory)
    return EncoderTower(backbone, described.dim, ["cls"], layers).on(device)
