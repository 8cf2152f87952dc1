"""The vectors of a shard in a GPU's memory: searched exactly, all of them for every batch of queries, by products.

Nothing is lost then but what fp32 rounds, and nothing is to be tuned, whatever index the version has for CPUs. A card
of 141 GB holds 80 million vectors of width 768 in fp16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import ConfigError, StorageError
from pipelines.index.exact import exact_topk
from pipelines.index.search import Hits, checked_queries
from pipelines.index.spec import Metric
from pipelines.index.structure import layers
from pipelines.index.tiers import TwoTier

Array = npt.NDArray[Any]

_ROWS_AT_ONCE = 2**18
_SPARE_BYTES = 4 << 30  # for products, and what CUDA itself takes


_in_turn = threading.Lock()  # of all shards in a process: two searches at once would need room for the products of two


class VectorsOnGpu:
    """They lie there in fp16 where that loses nothing, as with vectors that were stored so, else in fp32."""

    def __init__(self, index: Any, device: str) -> None:
        """index: a shard as it is opened; its vectors are read once, here.

        Raises ConfigError for a type that has codes alone, and StorageError when the GPU has no room.
        """
        import faiss
        import torch

        blocks = stored_vectors(index)
        self.d, self.ntotal, self._device = int(index.d), int(index.ntotal), device
        self._metric: Metric = "ip" if faiss.is_similarity_metric(index.metric_type) else "l2"
        _check_room(device, 2 * self.d * self.ntotal)
        self._blocks: list[tuple[Any, Array]] = []
        try:
            for vectors_ND, rows_N in blocks:
                with np.errstate(over="ignore"):
                    small_ND = vectors_ND.astype(np.float16)
                kept = small_ND if np.array_equal(small_ND, vectors_ND) else vectors_ND
                self._blocks.append((torch.tensor(kept, device=device), rows_N))
        except torch.OutOfMemoryError as error:
            raise _no_room(device, f"{self.ntotal:,} vectors of width {self.d}") from error
        _check_room(device, 0)  # in fp32 they have taken twice as much

    def search(self, queries_BD: Array, k: int) -> Hits:
        """Return the exact (score_BK, row_BK), best first; row -1, score -inf where there are fewer than k."""
        queries = checked_queries(queries_BD, self.d)
        with _in_turn:
            return exact_topk(queries, self._blocks, k, self._metric, device=self._device)


def stored_vectors(index: Any) -> Iterator[tuple[Array, Array]]:
    """Return blocks of (vectors (n, D), rows (n,)) of a shard that keeps its vectors.

    Those are flat ones and any type that has its vectors beside it (`index.refine: exact`). Raises ConfigError for
    other types: what their codes tell is not the vectors.
    """
    import faiss

    if isinstance(index, TwoTier):
        return _beside(index)
    *outer, flat = layers(index)
    is_half = isinstance(flat, faiss.IndexScalarQuantizer) and flat.sq.qtype == faiss.ScalarQuantizer.QT_fp16
    bare = all(type(layer) is faiss.IndexIDMap for layer in outer)
    if not bare or not (is_half or isinstance(flat, faiss.IndexFlat)):
        raise ConfigError(
            f"the version keeps no vectors that a GPU could search: its index is an {type(flat).__name__}",
            where="serve.gpus_per_shard",
            expected="a version built with index.factory Flat or SQfp16, or with index.refine: exact",
            hint="build one, or set serve.gpus_per_shard: 0 to search on CPUs",
        )
    return _inside(flat, faiss.vector_to_array(outer[0].id_map) if outer else np.arange(flat.ntotal))


def _beside(index: TwoTier) -> Iterator[tuple[Array, Array]]:
    for start in range(0, index.ntotal, _ROWS_AT_ONCE):
        vectors_ND = index.vectors_ND[start : start + _ROWS_AT_ONCE]
        yield vectors_ND, index.first_row + start + np.arange(len(vectors_ND))


def _inside(flat: Any, row_N: Array) -> Iterator[tuple[Array, Array]]:
    for start in range(0, len(row_N), _ROWS_AT_ONCE):
        rows = row_N[start : start + _ROWS_AT_ONCE]
        yield flat.reconstruct_n(start, len(rows)), rows


def _check_room(device: str, num_bytes: int) -> None:
    import torch

    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device is visible here", where="serve.gpus_per_shard",
                          hint="set serve.gpus_per_shard: 0 to search on CPUs")  # fmt: skip
    torch.cuda.empty_cache()  # what a version that was let go of has left
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes + _SPARE_BYTES > free:
        raise _no_room(device, f"{num_bytes / 1e9:.1f} GB of vectors, of {free / 1e9:.1f} GB free")


def _no_room(device: str, what: str) -> StorageError:
    hint = "build more shards (index.num_shards), or search on CPUs (serve.gpus_per_shard: 0)"
    return StorageError(f"no room for {what}", where=device, expected="the shard and 4 GB beside it", hint=hint)
