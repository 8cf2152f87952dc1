"""Search among some of an index's rows only, at the recall that it has among all of them.

    few rows, or a graph that would have to be walked for too long -> score every selected row
    else                                                           -> look further, the more the fewer are selected

A selector hides rows from FAISS, but does not make it look further: of the rows that `nprobe` lists or `efSearch`
candidates hold, only the selected share is left. So both grow by one over that share, which costs about as many
distances as an unfiltered search; and where even that finds fewer rows than there are, all of them are scored.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import ArtifactError
from pipelines.index.search import Hits, check_params, checked_queries, merge_topk, padded, parameters
from pipelines.index.structure import layers, use_threads
from pipelines.index.tiers import TwoTier, codes_of, split_params

Array = npt.NDArray[Any]

_TEST_COST = 0.05  # of asking a selector about a row, in distances
_ENTRY_BYTES = 1024  # of what is kept beside a selection's own rows: its key, and the objects around them
_ARRAY_SHARE = 1 / 64  # below it, the positions of the rows take less memory than a bit for every row


class Selection:
    """Rows of one index that may be found. Make it once with `select`; searches on many threads may share it."""

    def __init__(self, bits: npt.NDArray[np.uint8], count: int, share: float, few: npt.NDArray[np.int64] | None):
        """bits: one for each id, the lowest first. few: the ids themselves, ascending, where they are few."""
        self.bits, self.count, self.share, self.few = bits, count, share, few

    @property
    def num_bytes(self) -> int:
        return self.bits.nbytes + (0 if self.few is None else self.few.nbytes)

    def selector(self, *, listed: bool = False) -> Any:
        """Return FAISS's selector. listed: as a list of ids, if there is one, which Flat walks without the others."""
        import faiss

        if listed and self.few is not None:
            return faiss.IDSelectorArray(self.few)
        return faiss.IDSelectorBitmap(self.bits)

    def holds(self, id_BK: Array) -> Array:
        """Return which ids (B, K) int64 are selected; -1 is not."""
        byte_BK = self.bits[np.minimum(np.maximum(id_BK, 0) >> 3, len(self.bits) - 1)]
        return ((byte_BK >> (id_BK & 7).astype(np.uint8)) & 1).astype(bool) & (id_BK >= 0)


class Selections:
    """Selections kept for later searches: those used longest ago go, so that all together stay below `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: OrderedDict[Hashable, Selection] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Selection]) -> Selection:
        """Return the selection of `key`, made when it is not kept. Threads may ask at the same time.

        A key counts as small, whatever it holds: one made from what callers send has to be a digest of it.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            if key not in self._kept and made.num_bytes + _ENTRY_BYTES <= self.max_bytes:
                self._kept[key] = made
                self.num_bytes += made.num_bytes + _ENTRY_BYTES
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._kept.popitem(last=False)[1].num_bytes + _ENTRY_BYTES
        return made


def select(index: Any, mask_N: npt.NDArray[np.bool_], first_row: int) -> Selection:
    """Return the selection of the rows `first_row + i` where mask_N[i], for the N vectors of `index`.

    Raises ArtifactError when the mask does not fit the index.
    """
    index = codes_of(index)
    if len(mask_N) != index.ntotal:
        raise ArtifactError(f"{len(mask_N)} rows to select from, but the index holds {index.ntotal}", where="select",
                            expected="one for each vector", hint="rebuild the version")  # fmt: skip
    place_N = _places(index)
    # Behind an id map ids are places in the index; elsewhere they are rows, and the bits before the first one are
    # never touched, so that they take no memory.
    ids_start = 0 if place_N is not None else first_row
    inside_N = mask_N if place_N is None else mask_N[place_N - first_row]
    bits = np.zeros((ids_start + len(mask_N) + 7) // 8 or 1, np.uint8)
    shifted = np.concatenate([np.zeros(ids_start % 8, np.bool_), inside_N])
    packed = np.packbits(shifted, bitorder="little")
    bits[ids_start // 8 : ids_start // 8 + len(packed)] = packed
    count = int(np.count_nonzero(mask_N))
    share = count / max(1, len(mask_N))
    few = np.flatnonzero(inside_N) + ids_start if share < _ARRAY_SHARE else None
    return Selection(bits, count, share, few)


def search_among(
    index: Any,
    selection: Selection,
    queries_BD: Array,
    k: int,
    params: Mapping[str, float] | None = None,
    num_threads: int | None = None,
) -> Hits:
    """Return what `search` returns, of the selected rows alone: min(k, selected) of them for each query.

    params: as for `search`; those that bound how far it looks are widened by the share that is selected. Types without
    anything to widen (Flat, SQ, …) give what an index of the selected rows alone would give.
    """
    import faiss

    if isinstance(index, TwoTier):
        queries, (factor, rest) = checked_queries(queries_BD, index.d), split_params(check_params(index, params or {}))
        _, row_BC = search_among(index.codes, selection, queries, math.ceil(k * factor), rest, num_threads)
        return merge_topk([(index.rescore(queries, row_BC), row_BC)], k)
    use_threads(num_threads)
    queries = checked_queries(queries_BD, index.d)
    values = check_params(index, params or {})
    depth = min(k, selection.count)
    if not depth or not len(queries):
        return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)
    place_N = _places(index)
    inner = index if place_N is None else faiss.downcast_index(index.index)
    wider = _widened(inner, values, selection)
    if wider is None:
        distance_BK, id_BK = _scan(inner, queries, depth, selection)
    else:
        distance_BK, id_BK = inner.search(queries, depth, params=parameters(inner, wider, selection.selector()))
        short_B = (id_BK < 0).any(axis=1)
        if short_B.any():
            distance_BK[short_B], id_BK[short_B] = _scan(inner, queries[short_B], depth, selection)
    score_BK = distance_BK if faiss.is_similarity_metric(index.metric_type) else -distance_BK
    row_BK = id_BK if place_N is None else np.where(id_BK < 0, -1, place_N[id_BK])
    return merge_topk([(score_BK, row_BK)], k)


def _places(index: Any) -> npt.NDArray[np.int64] | None:
    """Return (N,) int64, the row at each place of an index behind an id map; None where the index keeps rows itself."""
    import faiss

    if not isinstance(index, faiss.IndexIDMap):
        return None
    size = index.id_map.size()
    rows: npt.NDArray[np.int64] = faiss.rev_swig_ptr(index.id_map.data(), size) if size else np.zeros(0, np.int64)
    return rows


def _widened(index: Any, values: Mapping[str, float], selection: Selection) -> dict[str, float] | None:
    """Return the parameters with which the selected rows are found as well as all were; None: score each of them."""
    import faiss

    leaf = layers(index)[-1]
    if isinstance(leaf, faiss.IndexIVF):
        num_lists = math.ceil(values.get("nprobe", leaf.nprobe) / selection.share)
        codes = math.ceil(values.get("max_codes", leaf.max_codes) / selection.share)
        return {**values, "nprobe": num_lists, "max_codes": codes} if num_lists < leaf.nlist else None
    if isinstance(leaf, faiss.IndexHNSW):
        width = math.ceil(values.get("efSearch", leaf.hnsw.efSearch) / selection.share)
        visits = width * leaf.hnsw.nb_neighbors(1)
        scored = selection.count + _TEST_COST * leaf.ntotal
        return {**values, "efSearch": width} if visits < scored else None
    refines = any(isinstance(layer, faiss.IndexRefine) for layer in layers(index))
    return dict(values) if refines and _takes_selector(leaf) else None


def _takes_selector(leaf: Any) -> bool:
    import faiss

    return isinstance(
        leaf, faiss.IndexFlat | faiss.IndexScalarQuantizer | faiss.IndexRaBitQ | faiss.IndexIVF | faiss.IndexHNSW
    )


def _scan(index: Any, queries: npt.NDArray[np.float32], k: int, selection: Selection) -> tuple[Array, Array]:
    """Return the best (distance_BK, id_BK) by the scores of every selected vector as it is stored."""
    import faiss

    if isinstance(index, faiss.IndexPreTransform):
        for place in range(index.chain.size()):
            queries = index.chain.at(place).apply(queries)
        return _scan(faiss.downcast_index(index.index), queries, k, selection)
    if isinstance(index, faiss.IndexRefine):
        return _scan(faiss.downcast_index(index.refine_index), queries, k, selection)
    if isinstance(index, faiss.IndexHNSW | faiss.IndexNSG):
        return _scan(faiss.downcast_index(index.storage), queries, k, selection)
    if not _takes_selector(index):
        return _ask_for_more(index, queries, k, selection)
    values = {"nprobe": index.nlist} if isinstance(index, faiss.IndexIVF) else {}
    selector = selection.selector(listed=isinstance(index, faiss.IndexFlat))
    found: tuple[Array, Array] = index.search(queries, k, params=parameters(index, values, selector))
    return found


def _ask_for_more(index: Any, queries: npt.NDArray[np.float32], k: int, selection: Selection) -> tuple[Array, Array]:
    """Return the best (distance_BK, id_BK) of a type that takes no selector (flat PQ, LSH): by leaving the others out.

    Twice as many rows are asked for until enough of them are selected.
    """
    depth = k
    while True:
        depth = min(index.ntotal, max(2 * depth, math.ceil(k / selection.share)))
        distance_BM, id_BM = index.search(queries, depth)
        fits_BM = selection.holds(id_BM)
        if depth == index.ntotal or (fits_BM.sum(axis=1) >= k).all():
            break
    first_BK = np.argsort(~fits_BM, axis=1, kind="stable")[:, :k]
    distance_BK, id_BK = (np.take_along_axis(array, first_BK, axis=1) for array in (distance_BM, id_BM))
    return distance_BK, np.where(np.take_along_axis(fits_BM, first_BK, axis=1), id_BK, -1)
