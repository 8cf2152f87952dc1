"""What a model family provides: the protocols everything else composes.

A family is one file beside this one. It sees text and tensors only, never storage, FAISS or Ray.
Tokenising and the forward pass are separate objects, because they run in different places: tokenisers in cheap CPU
tasks, towers in the actors that own an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Side = Literal["passage", "query"]
Similarity = Literal["dot", "cosine"]


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
    """A module of `pipelines.models` that can read one kind of bi-encoder directory."""

    def recognises(self, directory: str) -> bool: ...

    def info(self, directory: str) -> EncoderInfo: ...

    def load_tokeniser(self, directory: str, max_length: int | None = None) -> Tokeniser: ...

    def load_tower(self, directory: str, side: Side, dtype: str, device: str) -> Tower: ...


class CrossEncoder(Protocol):
    """Score (query, passage) pairs; higher is better."""

    def score(self, query: str, titles: Sequence[str], texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return (N,) fp32 raw logits, one for each passage."""
        ...
