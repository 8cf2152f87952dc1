"""The order in which vectors enter an index that depends on it.

A graph is grown vector by vector, each linked to its neighbours among those before it. A corpus sorted by topic grows
one topic after the other, with few links between them, and a walk that begins in the wrong one is lost. Drawn by
chance, the first vectors are a sketch of the whole corpus, and what follows fills it in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import StorageError
from pipelines.index.build import add

Array = npt.NDArray[Any]
_ROWS_AT_ONCE = 16_384


def add_in_random_order(
    index: Any, blocks: Iterable[tuple[Array, Array]], path: str, seed: list[int], num_threads: int | None = None
) -> None:
    """Add the vectors of blocks of (vectors (n, D), rows (n,)) under their rows, in the order that `seed` draws.

    path: where the local file of the vectors, as large as they are, is written: it is memory-mapped and read in the
    order drawn, so that no more of them lies in memory than `add` takes at once. How the vectors are cut into blocks
    does not matter. Raises what `add` raises, and StorageError when the disk refuses.
    """
    vectors_ND, row_N = _laid_out(blocks, path)
    order_N = np.random.default_rng(seed).permutation(len(row_N))
    for start in range(0, len(order_N), _ROWS_AT_ONCE):
        chosen = order_N[start : start + _ROWS_AT_ONCE]
        add(index, vectors_ND[chosen], row_N[chosen], num_threads)


def _laid_out(blocks: Iterable[tuple[Array, Array]], path: str) -> tuple[Array, npt.NDArray[np.int64]]:
    """Write the vectors of all blocks to a file; return them mapped, (N, D), and their rows (N,)."""
    rows, width, dtype = [np.zeros(0, np.int64)], 0, np.dtype(np.float32)
    try:
        with open(path, "wb") as file:
            for vectors_ND, row_N in blocks:
                file.write(np.ascontiguousarray(vectors_ND).tobytes())
                rows.append(row_N)
                width, dtype = vectors_ND.shape[1], vectors_ND.dtype
    except OSError as error:
        raise StorageError(f"cannot write the vectors that a graph grows from: {error}", where=path,
                           expected="room for those of a shard", hint="is the disk full?") from error  # fmt: skip
    row_N = np.concatenate(rows)
    if not len(row_N):
        return np.zeros((0, width), dtype), row_N
    return np.memmap(path, dtype, "r", shape=(len(row_N), width)), row_N
