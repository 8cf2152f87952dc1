"""What an inverted file can find at most, told without a search: no more than lies in the lists that it looks into.

A query comes upon a row at the rank of that row's list, among all lists in the order of the query. So the share of its
exact neighbours that so many lists hold bounds recall from above, and codes that lose nothing have all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.index.kmeans import coarse_of, in_front
from pipelines.index.search import checked_queries
from pipelines.index.structure import ivf_of, use_threads
from pipelines.index.tiers import codes_of

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]

NEVER = int(np.iinfo(np.int64).max)
"""Stands where an index does not hold the row: the smaller number of several shards is that of all of them."""
_SCORES_AT_ONCE = 2**24  # 64 MB of fp32 scores


def probes_needed(index: Any, queries_QD: Array, row_QK: Ints) -> Ints | None:
    """Return (Q, K) int64: the smallest nprobe at which a search of `index` looks at each row, NEVER if it holds none.

    row_QK: rows wanted for each query, -1 for none. None where that cannot be told: an index without lists, lists that
    keep no rows (below an id map), or coarse quantizers other than flat ones and graphs over flat centroids. Lists are
    ranked by the scores of all centroids, on one thread; a graph may visit a few in another order. Raises ArtifactError
    for queries of another width, InputError for one that is not finite.
    """
    codes = codes_of(index)
    ivf = ivf_of(codes)
    if ivf is None or coarse_of(codes) is None:
        return None
    use_threads(1)  # so that the machine's number of cores does not decide the last bits
    wanted_W, place = np.unique(row_QK, return_inverse=True)
    list_QK = _lists_of(ivf, wanted_W)[place.reshape(row_QK.shape)]
    score, queries = _scorer(ivf), in_front(codes, checked_queries(queries_QD, codes.d))
    needed_QK = np.full(row_QK.shape, NEVER, np.int64)
    step = max(1, _SCORES_AT_ONCE // ivf.nlist)
    for block in (slice(start, start + step) for start in range(0, len(queries), step)):
        needed_QK[block] = np.where(list_QK[block] < 0, NEVER, _ranks(score(queries[block]), list_QK[block]))
    return needed_QK


def _scorer(ivf: Any) -> Callable[[Array], Array]:
    """Return what scores queries (B, D) with all centroids (B, C), the better the higher: q.c, or q.c - |c|^2 / 2."""
    import faiss

    quantizer = faiss.downcast_index(ivf.quantizer)
    centroid_CD = quantizer.reconstruct_n(0, ivf.nlist)
    # The centroids as a linear map: FAISS's matrix product obeys the number of threads, NumPy's cannot be told.
    product = faiss.LinearTransform(ivf.d, ivf.nlist, True)
    faiss.copy_array_to_vector(centroid_CD.ravel(), product.A)
    is_similarity = faiss.is_similarity_metric(quantizer.metric_type)
    norm_C = np.zeros(ivf.nlist) if is_similarity else np.einsum("cd,cd->c", centroid_CD, centroid_CD)
    faiss.copy_array_to_vector(np.float32(-norm_C / 2), product.b)
    product.is_trained = True
    scores: Callable[[Array], Array] = product.apply
    return scores


def _lists_of(ivf: Any, row_W: Ints) -> Ints:
    """Return (W,) int64: the list that holds each row (sorted, each once), -1 for none. Reads ids alone, no codes."""
    import faiss

    list_W, lists = np.full(len(row_W), -1, np.int64), ivf.invlists
    for number in range(ivf.nlist if len(row_W) else 0):
        if size := lists.list_size(number):
            row_N = faiss.rev_swig_ptr(lists.get_ids(number), size)
            place_N = np.minimum(np.searchsorted(row_W, row_N), len(row_W) - 1)
            list_W[place_N[row_W[place_N] == row_N]] = number
    return list_W


def _ranks(score_BC: Array, list_BK: Ints) -> Ints:
    """Return (B, K) int64, from 1: how many lists are searched until each is, the better scores first."""
    wanted_BK = np.take_along_axis(score_BC, list_BK, axis=1)
    better = [np.count_nonzero(score_BC > wanted_B1, axis=1) for wanted_B1 in np.hsplit(wanted_BK, wanted_BK.shape[1])]
    return np.stack(better, axis=1).astype(np.int64) + 1
