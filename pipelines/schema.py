"""The nouns and their Arrow schemas (the words are defined in the README's terminology)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

FORMAT_VERSION = 1
"""Version of every manifest and file layout below; a reader refuses a newer one."""

PASSAGE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("answers", pa.list_(pa.string())),  # null unless the passage is a QA pair
    ]
)

IMAGE_PASSAGE = PASSAGE.append(pa.field("image", pa.large_binary()))
"""Rows of a snapshot made of image files: `image` holds the file's bytes, `text` its name."""

METADATA = "metadata"
METADATA_TYPES = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "strings": pa.list_(pa.string()),
}
"""What a metadata field may hold, by the word that a config uses for it. Null says that a passage does not have it."""

QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # file the row came from
        pa.field("position", pa.int64(), nullable=False),  # byte offset (text), row number (Parquet), 0 (image)
        pa.field("reason", pa.string(), nullable=False),  # one of REASONS
        pa.field("detail", pa.string(), nullable=False),
        pa.field("snippet", pa.string(), nullable=False),  # first 200 characters, undecodable bytes replaced
    ]
)

REASONS = (
    "missing_id",
    "missing_text",
    "duplicate_id",
    "undecodable",
    "wrong_field_count",
    "malformed",
    "oversized_row",
    "bad_image",
    "bad_metadata",
)


@dataclass(frozen=True)
class MetadataField:
    """A fact that passages carry beside their text. type: one of METADATA_TYPES. column: its name in the sources."""

    name: str
    type: str
    column: str


def passage_schema(metadata: Sequence[MetadataField] = (), *, images: bool = False) -> pa.Schema:
    """Return the schema of passages: PASSAGE or IMAGE_PASSAGE, and a struct column with the metadata if any."""
    schema = IMAGE_PASSAGE if images else PASSAGE
    if not metadata:
        return schema
    fields = [pa.field(field.name, METADATA_TYPES[field.type]) for field in metadata]
    return schema.append(pa.field(METADATA, pa.struct(fields), nullable=False))


def embedding_schema(dim: int, storage: str) -> pa.Schema:
    """Return the schema of an embedding part: `id` and a fixed-size list of `dim` fp16 or fp32 values."""
    value = {"fp16": pa.float16(), "fp32": pa.float32()}[storage]
    vector = pa.list_(pa.field("element", value, nullable=False), dim)
    return pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("vector", vector, nullable=False)])


@dataclass(frozen=True)
class Passage:
    """One row of text. `answers` is None unless the passage is a QA pair (then `text` is the question).

    metadata: the fields that the corpus was ingested with; None for those that this passage does not have.
    """

    id: str
    title: str
    text: str
    answers: list[str] | None = None
    metadata: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        pieces: dict[str, Any] = {"id": self.id, "title": self.title, "text": self.text, "answers": self.answers}
        if self.metadata is not None:
            pieces["metadata"] = {k: v for k, v in self.metadata.items() if v is not None}
        return {k: v for k, v in pieces.items() if v is not None}


@dataclass(frozen=True)
class Question:
    """One evaluation question: its gold passage ids and/or accepted answers may be empty."""

    id: str
    text: str
    answers: list[str] = field(default_factory=list)
    positives: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hit:
    """One search result. `row` is the passage's global ordinal in its snapshot; higher `score` is always better."""

    row: int
    score: float
    passage: Passage
    rerank_score: float | None = None
