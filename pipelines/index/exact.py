"""Search exactly, by the products of all queries with all vectors: on a CPU by FAISS, on a GPU by torch.

Both take them in fp32. What differs is `pick`: which rows of a block can be among the best, found where the products
are; few are, and only those come back to be sorted. The GPU's way runs on any device of torch's, so that it is tested
without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.errors import ArtifactError
from pipelines.index.search import Hits, check_depth, merge_topk, padded
from pipelines.index.spec import Metric
from pipelines.index.structure import use_threads

Array = npt.NDArray[Any]
Picked = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]

_NO_ROW = -1
_ROWS_AT_ONCE = 16_384
_SCORES_AT_ONCE = 2**24  # 64 MB in fp32
_FEW_REACH = 8  # rows of a block for each hit wanted
_GPU_ROWS_AT_ONCE = 2**18
_GPU_SCORES_AT_ONCE = 2**28  # 1 GB in fp32


def exact_topk(
    queries_BD: Array,
    blocks: Iterable[tuple[Any, Array]],
    k: int,
    metric: Metric,
    num_threads: int | None = None,
    device: str | None = None,
) -> Hits:
    """Return the exact (score_BK, row_BK) over blocks of (vectors (N, D) fp16 or fp32, rows (N,)), best first.

    Reads the blocks once; memory is bounded by one block and 64 MB of scores (1 GB on a GPU). Results of different
    blocks, or machines, merge with `merge_topk`. device: torch's name of where products are taken, such as "cuda";
    without it FAISS takes them on `num_threads`. Raises ArtifactError when widths differ.
    """
    check_depth(k)
    queries = np.ascontiguousarray(queries_BD, dtype=np.float32)
    products: _Products = (
        _ByFaiss(queries, metric, num_threads) if device is None else _ByTorch(queries, metric, device)
    )
    best = padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)
    for vectors_ND, rows_N in blocks:
        if tuple(vectors_ND.shape[1:]) != queries.shape[1:] or len(rows_N) != len(vectors_ND):
            what = f"a block has shape {tuple(vectors_ND.shape)} and {len(rows_N)} rows"
            expected = f"vectors of width {queries.shape[1]}, one row each"
            raise ArtifactError(what, where="exact search", expected=expected)
        for start in range(0, len(rows_N) if len(queries) else 0, products.rows_at_once):
            chunk = slice(start, start + products.rows_at_once)
            rows = np.asarray(rows_N[chunk], np.int64)
            picked = products.pick(vectors_ND[chunk], best[0][:, -1], k, bool((np.diff(rows) > 0).all()))
            best = _keep_best(best, picked, rows, k)
    return best


class _Products(Protocol):
    """rows_at_once: of a block, for one `pick`."""

    rows_at_once: int

    def pick(self, vectors_ND: Any, floor_B: Array, k: int, ascending: bool) -> Picked:
        """Return (query, place, score) of the rows that may be among a query's best k.

        These are at least the best k that reach its floor (the k-th best score known so far), with their equals: of
        those the smaller row wins. ascending: whether rows rise with places, so that of many equals (a query of zeros
        has all rows for that) the first will do.
        """
        ...


class _ByFaiss:
    def __init__(self, queries_BD: npt.NDArray[np.float32], metric: Metric, num_threads: int | None) -> None:
        import faiss

        use_threads(num_threads)
        # The queries as a linear map: FAISS's matrix product obeys num_threads, NumPy's cannot be told.
        self._product = faiss.LinearTransform(queries_BD.shape[1], len(queries_BD), False)
        faiss.copy_array_to_vector(queries_BD.ravel(), self._product.A)
        self._product.is_trained = True
        self._queries_BD, self._metric = queries_BD, metric
        self.rows_at_once = max(1, min(_ROWS_AT_ONCE, _SCORES_AT_ONCE // max(1, len(queries_BD))))

    def pick(self, vectors_ND: Any, floor_B: Array, k: int, ascending: bool) -> Picked:
        vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        score_BN: Array = self._product.apply(vectors).T
        if self._metric == "l2":
            score_BN = _negative_distance(score_BN, self._queries_BD, vectors)
        reaches_BN = score_BN >= floor_B[:, None]
        # Few do once the best of some blocks are known; till then a block's own k-th best raises the floor, at a price.
        if len(vectors) > k and np.count_nonzero(reaches_BN) > _FEW_REACH * k * len(score_BN):
            floor_B = np.maximum(floor_B, np.partition(score_BN, len(vectors) - k, axis=1)[:, len(vectors) - k])
            reaches_BN = score_BN >= floor_B[:, None]
            for query in np.flatnonzero(reaches_BN.sum(axis=1) > _FEW_REACH * k) if ascending else ():
                reaches_BN[query, np.flatnonzero(score_BN[query] == floor_B[query])[k:]] = False
        place_C, query_C = np.nonzero(reaches_BN.T)  # as it lies in memory
        return query_C, place_C, score_BN[query_C, place_C]


class _ByTorch:
    def __init__(self, queries_BD: npt.NDArray[np.float32], metric: Metric, device: str) -> None:
        import torch

        self._queries_BD, self._metric = torch.tensor(queries_BD, device=device), metric
        most = _GPU_SCORES_AT_ONCE // max(1, *queries_BD.shape)
        self.rows_at_once = max(1, min(_GPU_ROWS_AT_ONCE, most))

    def pick(self, vectors_ND: Any, floor_B: Array, k: int, ascending: bool) -> Picked:
        import torch

        queries = self._queries_BD
        with torch.inference_mode():
            if not isinstance(vectors_ND, torch.Tensor):  # else it lies where it has to be, once and for all
                vectors_ND = torch.tensor(np.ascontiguousarray(vectors_ND), device=queries.device)
            vectors = vectors_ND.float()
            score_BN = queries @ vectors.T
            if self._metric == "l2":
                squares_B1, squares_N = (queries**2).sum(1, keepdim=True), (vectors**2).sum(1)
                score_BN = score_BN.mul_(2).sub_(squares_B1).sub_(squares_N).clamp_(max=0)
            floor = torch.tensor(floor_B, device=queries.device)
            if len(vectors) > k:
                floor = torch.maximum(floor, score_BN.topk(k, sorted=False).values.amin(1))
            reaches_BN = score_BN >= floor[:, None]
            for query in (reaches_BN.sum(1) > _FEW_REACH * k).nonzero()[:, 0].tolist() if ascending else ():
                reaches_BN[query, (score_BN[query] == floor[query]).nonzero()[k:, 0]] = False
            query_C, place_C = torch.nonzero(reaches_BN, as_tuple=True)
            score_C = score_BN[query_C, place_C]
            return query_C.cpu().numpy(), place_C.cpu().numpy(), score_C.cpu().numpy()


def gpu_here() -> str | None:
    """Return torch's name of the GPU that this process was given; None where it sees none."""
    import torch

    return "cuda" if torch.cuda.is_available() else None


def _negative_distance(product_BN: Array, queries: Array, vectors: Array) -> Array:
    """Return -|q - v|^2 = 2 q.v - |q|^2 - |v|^2, at most 0 whatever the rounding."""
    query_norm_B = np.einsum("bd,bd->b", queries, queries)
    vector_norm_N = np.einsum("nd,nd->n", vectors, vectors)
    return np.minimum(2 * product_BN - query_norm_B[:, None] - vector_norm_N[None, :], 0)


def _keep_best(best: Hits, picked: Picked, rows_N: npt.NDArray[np.int64], k: int) -> Hits:
    """Merge what was picked of a block into the best so far; of equal scores the smaller row wins."""
    query_C, place_C, picked_C = picked
    order = np.lexsort((rows_N[place_C], -picked_C, query_C))
    query_C, place_C, picked_C = query_C[order], place_C[order], picked_C[order]
    # Each query's candidates stand together, best first: their place within the query is their rank.
    rank_C = np.arange(len(query_C)) - np.searchsorted(query_C, query_C)
    is_best = rank_C < k
    at = query_C[is_best], rank_C[is_best]
    score_BK, row_BK = np.full_like(best[0], -np.inf), np.full_like(best[1], _NO_ROW)
    score_BK[at], row_BK[at] = picked_C[is_best], rows_N[place_C[is_best]]
    return merge_topk([best, (score_BK, row_BK)], k)
