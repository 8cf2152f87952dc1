"""Search an index, and merge the answers of shards. A higher score is always better."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import ArtifactError, ConfigError, InputError
from pipelines.index.structure import layers, nsg_of, use_threads
from pipelines.index.tiers import FACTOR, TwoTier, split_params

Array = npt.NDArray[Any]
Hits = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

_NO_ROW = -1
_LAST_ROW = np.iinfo(np.int64).max
_nsg_lock = threading.Lock()


def search(
    index: Any, queries_BD: Array, k: int, params: Mapping[str, float] | None = None, num_threads: int | None = None
) -> Hits:
    """Return (score_BK fp32, row_BK int64), best first, ties by smaller row; row -1, score -inf where hits run out.

    queries_BD: (B, D) fp16 or fp32. The score is the inner product or the negative squared distance. params: search
    parameters such as {"nprobe": 16}, for this call alone, so that threads may search one index with different ones.
    Raises ConfigError for an unknown parameter or k < 1, ArtifactError for queries of another width.
    """
    import faiss

    if isinstance(index, TwoTier):
        return _search_tiers(index, queries_BD, k, params or {}, num_threads)
    use_threads(num_threads)
    queries = checked_queries(queries_BD, index.d)
    values = check_params(index, params or {})
    check_depth(k)
    depth = min(k, index.ntotal)  # a graph asked for more than it holds may never return
    if not depth or not len(queries):
        return padded(np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), k)
    graph = nsg_of(index)
    if graph is not None:
        distance_BK, row_BK = _search_nsg(index, graph, queries, depth, values)
    else:
        distance_BK, row_BK = index.search(queries, depth, params=parameters(index, values))
    score_BK = distance_BK if faiss.is_similarity_metric(index.metric_type) else -distance_BK
    return merge_topk([(score_BK, row_BK)], k)


def _search_tiers(
    index: TwoTier, queries_BD: Array, k: int, params: Mapping[str, float], num_threads: int | None
) -> Hits:
    """Let the codes find candidates, a multiple of k, and their vectors decide."""
    queries, (factor, rest) = checked_queries(queries_BD, index.d), split_params(params)
    _check_value(FACTOR, factor)
    check_depth(k)
    depth = max(1, min(math.ceil(k * factor), index.ntotal))
    _, row_BC = search(index.codes, queries, depth, rest, num_threads)
    return merge_topk([(index.rescore(queries, row_BC), row_BC)], k)


def merge_topk(parts: Sequence[Hits], k: int) -> Hits:
    """Merge the (score_BK, row_BK) of shards into the best k, ties by smaller row; rows of -1 are ignored.

    The order of the parts does not matter. Raises ConfigError for no parts or k < 1, ArtifactError when the parts
    answer different numbers of queries.
    """
    check_depth(k)
    if not parts:
        raise ConfigError("there are no results to merge", where="merge_topk", expected="one part or more")
    if len({len(rows) for _, rows in parts} | {len(scores) for scores, _ in parts}) > 1:
        raise ArtifactError("shards answered different numbers of queries", where="merge_topk")
    score = np.concatenate([np.asarray(s, np.float32) for s, _ in parts], axis=1)
    row = np.concatenate([np.asarray(r, np.int64) for _, r in parts], axis=1)
    score, row = np.where(row < 0, -np.inf, score), np.where(row < 0, _LAST_ROW, row)
    best = np.lexsort((row, -score), axis=1)[:, :k]
    score, row = np.take_along_axis(score, best, axis=1), np.take_along_axis(row, best, axis=1)
    return padded(score, np.where(row == _LAST_ROW, _NO_ROW, row), k)


def parameter_names(index: Any) -> list[str]:
    """Return the names that `search` takes in `params` for this type of index."""
    import faiss

    names = []
    for layer in layers(index):
        if isinstance(layer, faiss.IndexRefine):
            names += ["k_factor"]
        elif isinstance(layer, faiss.IndexIVF):
            names += ["nprobe", "max_codes"]
            names += ["quantizer_efSearch"] if _hnsw_quantizer(layer) is not None else []
        elif isinstance(layer, faiss.IndexHNSW):
            names += ["efSearch"]
        elif isinstance(layer, faiss.IndexNSG):
            names += ["search_L"]
    return names


def check_params(index: Any, params: Mapping[str, float]) -> dict[str, float]:
    """Return `params` when `index` takes them all. Raises ConfigError naming the valid names or the valid range."""
    names = [FACTOR, *parameter_names(index.codes)] if isinstance(index, TwoTier) else parameter_names(index)
    expected = ", ".join(names) or "no parameters: this type has none"
    for name, value in params.items():
        if name not in names:
            close = get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"unknown search parameter {name!r}", where="search params", expected=expected, hint=hint)
        _check_value(name, value)
    return dict(params)


def _check_value(name: str, value: Any) -> None:
    kinds, least = (int | float if name == "k_factor" else int), (0 if name == "max_codes" else 1)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < 2**31:
        kind = "a number" if name == "k_factor" else "a whole number"
        raise ConfigError(f"{name} is {value!r}", where="search params", expected=f"{kind} of at least {least}")


def parameters(index: Any, values: Mapping[str, float], selector: Any = None) -> Any:
    """Return the FAISS SearchParameters for `values`, nested as the index is; None where nothing is set.

    Creating the object resets what is not named to FAISS's defaults, so the index's own settings are copied over.
    selector: of the rows to be found, for the innermost index, which alone takes one.
    """
    import faiss

    if not values and selector is None:
        return None
    if isinstance(index, faiss.IndexIDMap):
        return parameters(faiss.downcast_index(index.index), values, selector)
    if isinstance(index, faiss.IndexPreTransform):
        below = parameters(faiss.downcast_index(index.index), values, selector)
        return faiss.SearchParametersPreTransform(index_params=below)
    if isinstance(index, faiss.IndexRefine):
        others = {name: value for name, value in values.items() if name != "k_factor"}
        base = parameters(faiss.downcast_index(index.base_index), others, selector)
        return faiss.IndexRefineSearchParameters(
            k_factor=float(values.get("k_factor", index.k_factor)), base_index_params=base
        )
    if isinstance(index, faiss.IndexIVF):
        found = _ivf_parameters(index, values)
    elif isinstance(index, faiss.IndexHNSW):
        found = _hnsw_parameters(index.hnsw, values.get("efSearch", index.hnsw.efSearch))
    else:
        found = faiss.SearchParameters()
    found.sel = selector
    return found


def _ivf_parameters(index: Any, values: Mapping[str, float]) -> Any:
    import faiss

    found = faiss.SearchParametersIVF(
        nprobe=int(values.get("nprobe", index.nprobe)), max_codes=int(values.get("max_codes", index.max_codes))
    )
    if "quantizer_efSearch" in values:
        found.quantizer_params = _hnsw_parameters(_hnsw_quantizer(index).hnsw, values["quantizer_efSearch"])
    return found


def _hnsw_parameters(hnsw: Any, ef_search: float) -> Any:
    import faiss

    return faiss.SearchParametersHNSW(
        efSearch=int(ef_search),
        check_relative_distance=hnsw.check_relative_distance,
        bounded_queue=hnsw.search_bounded_queue,
    )


def _hnsw_quantizer(ivf: Any) -> Any:
    import faiss

    quantizer = faiss.downcast_index(ivf.quantizer)
    return quantizer if isinstance(quantizer, faiss.IndexHNSW) else None


def _search_nsg(index: Any, graph: Any, queries: Array, k: int, values: Mapping[str, float]) -> tuple[Array, Array]:
    """Search an NSG index, which takes no parameters by call: one search at a time, its setting put back."""
    if not graph.nsg.is_built:
        raise ArtifactError("the NSG graph is not built", where="search", hint="call finish(index) after the last add")
    with _nsg_lock:
        usual = graph.nsg.search_L
        # A pool larger than the graph is never filled, and the search never ends.
        graph.nsg.search_L = min(int(values.get("search_L", usual)), graph.ntotal)
        try:
            distance_BK, row_BK = index.search(queries, k)
        finally:
            graph.nsg.search_L = usual
    return distance_BK, row_BK


def checked_queries(queries_BD: Array, dim: int) -> npt.NDArray[np.float32]:
    if queries_BD.ndim != 2:
        raise InputError(f"queries have shape {queries_BD.shape}", where="search", expected=f"(B, {dim})")
    if queries_BD.shape[1] != dim:
        what = f"query vectors have width {queries_BD.shape[1]}, the index {dim}: another encoder built it"
        raise ArtifactError(what, where="search", hint="search with the encoder bound to the version")
    queries = np.ascontiguousarray(queries_BD, dtype=np.float32)
    if not np.isfinite(queries).all():
        raise InputError("a query vector is not finite", where="search", hint="check the query encoder and its dtype")
    return queries


def check_depth(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k is {k}", where="search", expected="1 or more")


def padded(score_BK: Array, row_BK: Array, k: int) -> Hits:
    short = ((0, 0), (0, k - row_BK.shape[1]))
    return (
        np.pad(score_BK, short, constant_values=-np.inf).astype(np.float32, copy=False),
        np.pad(row_BK, short, constant_values=_NO_ROW),
    )
