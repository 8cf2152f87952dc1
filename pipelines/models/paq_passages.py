"""PAQ's DPR passage retriever: a plain BERT that encodes questions, with the FAISS index it searches beside it.

The vector is the last hidden state at position 0, without projection; score: dot product. Questions are lower-cased and
lose their outer question marks first, as for PAQ's other retrievers and unlike DPR's own encoders. The passages in
`dpr_index*.dpr` were encoded by a DPR context encoder that the directory does not hold, so only queries can be encoded
here. `*.index_meta.dpr` is a pickle and is never opened. Source: Lewis et al. 2021 and the released files' layout.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import tokens
from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, Tokens, refuse_options
from pipelines.models.files import read_json, refuse, require_files, tensor_shapes
from pipelines.models.paq import normalise_question

_MAX_LENGTH = 512  # PAQ reads questions of any length; this is where BERT's positions end
_NO_HINT = "encode the passages with the DPR context encoder (encoder.checkpoint), and give this as query_checkpoint"
_HEAD = re.compile(r"(Classification|MultipleChoice|QuestionAnswering)$")
_PARTS = ("embeddings.", "encoder.", "pooler.", "cls.")


def recognises(checkpoint: str) -> bool:
    """Say whether this is a BERT directory with PAQ's DPR index in it, and no model of another family."""
    if not os.path.isdir(checkpoint) or os.path.isfile(os.path.join(checkpoint, "modules.json")):
        return False
    if not _indexes(checkpoint):
        return False
    try:
        config = read_json(checkpoint, "config.json")
    except CheckpointError:
        return False
    heads = [str(name) for name in config.get("architectures") or [] if _HEAD.search(str(name))]
    return config.get("model_type") == "bert" and not heads and _is_plain(checkpoint)


def _is_plain(directory: str) -> bool:
    """Say whether no other head than BERT's own is in the weights; unreadable ones are refused by `info`."""
    try:
        names = tensor_shapes(directory)
    except CheckpointError:
        return True
    return all(_plain_name(name).startswith(_PARTS) for name in names)


def _indexes(directory: str) -> list[str]:
    """Return the names of the FAISS indexes, as PAQ called them."""
    names = sorted(os.listdir(directory))
    return [name for name in names if name.startswith("dpr_index") and name.endswith(".index.dpr")]


def _plain_name(name: str) -> str:
    return name.removeprefix("bert.")


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None) -> EncoderInfo:
    """Describe the question encoder. Raises CheckpointError when it is incomplete."""
    refuse_options("paq_passages", "dot", similarity, formatting)
    require_files(directory)
    shapes = {_plain_name(name): shape for name, shape in tensor_shapes(directory).items()}
    words = shapes.get("embeddings.word_embeddings.weight")
    if words is None:
        refuse("the weights lack embeddings.word_embeddings.weight", directory, expected="the tensors of BertModel")
    return EncoderInfo(
        family="paq_passages",
        dim=words[1],
        similarity="dot",
        max_length=_MAX_LENGTH,
        formatting="the question alone, lower-cased, without outer question marks; passages cannot be encoded",
        details={"side": "query", "pooling": "cls", "indexes": _indexes(directory)},
    )


@dataclass
class QuestionTokeniser:
    """Questions only."""

    encoder: tokens.TextEncoder

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        """Raise ConfigError: the directory holds no passage encoder."""
        raise ConfigError("PAQ's passage retriever encodes questions, not passages", hint=_NO_HINT)

    def queries(self, texts: Sequence[str]) -> Tokens:
        return self.encoder.encode([normalise_question(text) for text in texts])


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
) -> QuestionTokeniser:
    backend = tokens.load_backend(directory, "BertTokenizer")
    limit = int(read_json(directory, "config.json").get("max_position_embeddings", _MAX_LENGTH))
    length = tokens.checked_length(max_length, _MAX_LENGTH, limit)
    return QuestionTokeniser(tokens.TextEncoder(backend, tokens.pad_id(directory, backend), length))


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the question encoder. Raises CheckpointError for the passage side, or when it is incomplete."""
    from transformers import BertModel

    from pipelines.models.tower import EncoderTower
    from pipelines.models.weights import build_model, read_config, read_weights

    described = info(directory)
    if side != "query":
        refuse("PAQ's passage retriever has no passage encoder", directory, expected="the query side", hint=_NO_HINT)
    state = {_plain_name(name): tensor for name, tensor in read_weights(directory).items()}
    backbone = build_model(BertModel, read_config(directory), state, dtype, directory)
    return EncoderTower(backbone, described.dim, ["cls"]).on(device)
