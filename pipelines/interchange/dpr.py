"""DPR's embedding files: a pickled list of (passage id, vector), and the id list beside its FAISS files.

Source of the layout: what DPR's embedding generator writes (`wikipedia_passages_*.pkl`, one list a shard) and what it
puts beside an index (`index_meta.dpr`). Pickles are read as data (see `pickled`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.interchange.pickled import read_items, type_name

Array = npt.NDArray[Any]

_VECTORS_IN_BLOCK = 4096
_EXPECTED = "a pickled list of (id, vector), as DPR writes it"


def read_pickle(path: str) -> Iterator[tuple[list[str], Array]]:
    """Yield (ids, vectors (N, D) float) of a DPR embedding file, up to 4,096 at a time, in order.

    Raises InputError when the file is damaged, is no such list, holds vectors of different widths, or names anything
    that is not needed for one; nothing in it is executed.
    """
    ids: list[str] = []
    vectors: list[Array] = []
    for place, item in enumerate(read_items(path)):
        identity, vector = _pair(item, path, place)
        if vectors and vector.shape != vectors[0].shape:
            shapes = f"{vector.shape} after {vectors[0].shape}"
            raise InputError(f"vector {place} has another width: {shapes}", where=path, expected="one encoder's")
        ids.append(identity)
        vectors.append(vector)
        if len(ids) == _VECTORS_IN_BLOCK:
            yield ids, np.stack(vectors)
            ids, vectors = [], []
    if ids:
        yield ids, np.stack(vectors)


def read_id_list(path: str) -> Iterator[str]:
    """Yield the ids of a pickled list of ids (DPR's `index_meta.dpr`), in order. Raises InputError as `read_pickle`."""
    for place, item in enumerate(read_items(path)):
        yield _id(item, path, place)


def _pair(item: Any, path: str, place: int) -> tuple[str, Array]:
    """Return the id and the vector of an item of the list."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(f"item {place} is a {type_name(item)}, no pair", where=path, expected=_EXPECTED)
    identity, vector = _id(item[0], path, place), item[1]
    if not isinstance(vector, np.ndarray):
        raise InputError(f"item {place} has no vector but a {type_name(vector)}", where=path, expected=_EXPECTED)
    if vector.ndim != 1 or vector.dtype.kind != "f" or not len(vector):
        found = f"{vector.dtype} of shape {vector.shape}"
        raise InputError(f"the vector of item {place} is {found}", where=path, expected="float16, 32 or 64, one row")
    return identity, vector


def _id(value: Any, path: str, place: int) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(f"the id of item {place} is a {type_name(value)}", where=path, expected="a string or a number")
    return str(value)
