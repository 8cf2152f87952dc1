"""Drive tokenisers and towers the plain way, for comparison with their oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.models.base import Tokeniser, Tokens, Tower

TITLES = ["Alexandria", "", "Great library", "", "Ray"]
TEXTS = [
    "The library of Alexandria was the first great library.",
    '"who built the city"',
    "  A king wrote it in a scroll   ",
    "Ägypten, café 9,787",
    "war " * 400,
]
QUESTIONS = ["Who wrote the book?", " what’s a scroll ", "", "9,787 books in 78 rivers??"]


def rows(tokens: Tokens) -> list[list[int]]:
    return [tokens.ids[start:end].tolist() for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False)]


def embed(tower: Tower, tokens: Tokens, pad_id: int, *, extra: int = 0) -> npt.NDArray[np.float32]:
    """Return emb_BD of one batch, padded to its longest text plus `extra`."""
    import torch

    length = int(tokens.lengths.max()) + extra
    ids, mask = np.full((len(tokens), length), pad_id), np.zeros((len(tokens), length), np.int64)
    types = np.zeros_like(mask)
    for row, (start, end) in enumerate(zip(tokens.offsets, tokens.offsets[1:], strict=False)):
        ids[row, : end - start], mask[row, : end - start] = tokens.ids[start:end], 1
        if tokens.type_ids is not None:
            types[row, : end - start] = tokens.type_ids[start:end]
    given = None if tokens.type_ids is None else torch.from_numpy(types)
    vectors: Any = tower(torch.from_numpy(ids), torch.from_numpy(mask), given)
    return np.asarray(vectors.float())


def passages(family: Any, directory: str, **options: Any) -> npt.NDArray[np.float32]:
    tokeniser: Tokeniser = family.load_tokeniser(directory)
    tower = family.load_tower(directory, "passage", "fp32", "cpu", **options)
    return embed(tower, tokeniser.passages(TITLES, TEXTS), tokeniser.pad_id)


def close(left: Any, right: Any, tolerance: float = 1e-5) -> bool:
    left, right = np.asarray(left), np.asarray(right)
    return left.shape == right.shape and bool(np.abs(left - right).max() <= tolerance)
