"""What a model family provides: the protocols everything else composes.

A family is one file beside this one. It sees text and tensors only, never storage, FAISS or Ray.
Tokenising and the forward pass are separate objects, because they run in different places: tokenisers in cheap CPU
tasks, towers in the actors that own an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.schema import Passage

Side = Literal["passage", "query"]
Similarity = Literal["dot", "cosine"]
Formatting = Literal["title. text", "title [SEP] text", "title[SEP]text", "pair", "text"]
"""How title and text become one input: joined as written, as a tokeniser's pair, or the text alone."""
Kind = Literal["encoder", "cross-encoder", "reader", "answer-extractor", "question-generator"]


@dataclass(frozen=True)
class Tokens:
    """Ragged token ids of B texts, stored flat: text `b` is `ids[offsets[b]:offsets[b + 1]]`.

    ids: (T,) int32. offsets: (B + 1,) int64, offsets[0] == 0. type_ids: (T,) int8 or None when the model takes none
    (or wants zeros).
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    type_ids: npt.NDArray[np.int8] | None = None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, start: int, stop: int) -> Tokens:
        """Return the texts `start:stop`, which share their ids with these."""
        offsets = self.offsets[start : stop + 1]
        within = slice(offsets[0], offsets[-1])
        type_ids = None if self.type_ids is None else self.type_ids[within]
        return Tokens(self.ids[within], offsets - offsets[0], type_ids)

    def take(self, rows: npt.NDArray[np.int64]) -> Tokens:
        """Return the texts `rows`, in that order."""
        length_R, offsets = self.lengths[rows], np.zeros(len(rows) + 1, np.int64)
        np.cumsum(length_R, out=offsets[1:])
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], length_R)
        return Tokens(self.ids[source], offsets, None if self.type_ids is None else self.type_ids[source])


@dataclass(frozen=True)
class EncoderInfo:
    """What a checkpoint is, for `pinakes inspect`, the encoder fingerprint and the version manifest.

    family: the loader's name. dim: width of its vectors. similarity: what the model was trained for; a `cosine`
    encoder's vectors are L2-normalised when they are made, so that inner product ranks them.
    max_length: tokens, special tokens included. prompts: prefix put before a text, by side. formatting: how title and
    text become the model's input, in one line.
    """

    family: str
    dim: int
    similarity: Similarity
    max_length: int
    formatting: str
    prompts: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "encoder"


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint of another kind than a bi-encoder is, for `pinakes inspect`.

    computes: what comes out, in one line. max_length: tokens, special tokens included. formatting: what the model's
    input looks like, in one line.
    """

    family: str
    kind: Kind
    computes: str
    max_length: int
    formatting: str
    details: dict[str, Any] = field(default_factory=dict)


def refuse_options(
    family: str, own: Similarity, similarity: Similarity | None, formatting: Formatting | None = None
) -> None:
    """Raise ConfigError when the config asks a family with one fixed similarity and formatting for another."""
    if similarity not in (None, own):
        raise ConfigError(f"encoder.similarity: {family} models are scored by {own}", expected=f"{own}, or nothing")
    if formatting is not None:
        raise ConfigError(f"encoder.formatting: {family} models have one input format", expected="no such key")


class Tokeniser(Protocol):
    """Turn text into model input ids. Cheap to build (no weights), safe to use in many processes."""

    pad_id: int

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        """Tokenise passages the way the model was trained to see them (title may be empty)."""
        ...

    def queries(self, texts: Sequence[str]) -> Tokens: ...


class Tower(Protocol):
    """The weights: a padded micro-batch in, one vector a text out."""

    dim: int

    def __call__(self, input_ids_BL: Any, mask_BL: Any, type_ids_BL: Any | None) -> Any:
        """Return emb_BD (torch tensor, fp32: pooling and normalisation are fp32 whatever the compute dtype).

        Takes int64 ids, int64 mask (1 = token, padding on the right), int64 token types or None.
        """
        ...


class EncoderFamily(Protocol):
    """A module of `pipelines.models` that can read one kind of bi-encoder directory.

    similarity, formatting: what the config says where a checkpoint is silent (see sentence_transformers); a family
    whose models leave no choice refuses them in `info` (`refuse_options`) and ignores them elsewhere.
    """

    def recognises(self, directory: str) -> bool: ...

    def info(
        self, directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None
    ) -> EncoderInfo: ...

    def load_tokeniser(
        self, directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
    ) -> Tokeniser: ...

    def load_tower(
        self, directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None
    ) -> Tower: ...


class ModelFamily(Protocol):
    """A module of `pipelines.models` that can read one kind of directory that is no bi-encoder.

    `load` gives the object of its kind: a CrossEncoder, Reader, AnswerExtractor or QuestionGenerator.
    """

    def recognises(self, directory: str) -> bool: ...

    def info(self, directory: str) -> ModelInfo: ...

    def load(self, directory: str, dtype: str = "fp32", device: str = "cpu", **options: Any) -> Any: ...


class CrossEncoder(Protocol):
    """Score (query, passage) pairs; higher is better."""

    def score(self, queries: Sequence[str], passages: Sequence[Passage]) -> npt.NDArray[np.float32]:
        """Return (N,) fp32 raw logits, one for each pair: query i with passage i."""
        ...


@dataclass(frozen=True)
class Answer:
    """An answer to a question. passage: its position among the passages given, -1 when it was made from all of them.

    score: higher is better; comparable among the answers of one question only. start, end: characters of the passage's
    text, end exclusive; -1 when the answer is no span of one.
    """

    text: str
    score: float
    passage: int = -1
    start: int = -1
    end: int = -1


class Reader(Protocol):
    """Answer questions from passages."""

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> list[list[Answer]]:
        """Return the answers to each question from its own passages, best first; none for no passages."""
        ...


@dataclass(frozen=True)
class Span:
    """A stretch of a passage's text that may be an answer. start, end: characters, end exclusive. score: log-prob."""

    text: str
    start: int
    end: int
    score: float | None = None


class PassageRanker(Protocol):
    """Say how likely a passage is to be worth asking about."""

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return (N,) fp32 log-probabilities, at most 0."""
        ...


class AnswerExtractor(Protocol):
    """Find the spans of passages that questions could be asked about."""

    def extract(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the spans of each text, best first."""
        ...


class QuestionGenerator(Protocol):
    """Write questions that a span of a passage answers."""

    def generate(self, titles: Sequence[str], texts: Sequence[str], spans: Sequence[Span]) -> list[list[str]]:
        """Return the questions for each (title, text, span), best first."""
        ...
