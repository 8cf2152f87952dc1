"""FAISS files that others built, made searchable as ours: global rows, queries of the encoder's width, plain scores.

DPR and PAQ search inner products by an L2 graph: with phi the largest squared length of all vectors, it holds
p' = [p, sqrt(phi - |p|^2)], and asked q' = [q, 0] gives |q' - p'|^2 = |q|^2 + phi - 2 q.p. For one query that falls as
q.p grows, and q'.p' = q.p; so the same graph, read as one of inner products, is walked through the same nodes and gives
q.p itself, without phi (which these files do not hold) and without the rounding of the extra dimension that 8-bit codes
add to every distance. A linear map in front appends the zero. The result is an ordinary FAISS file: an id map over that
map over the graph, codes and links as they were.
Source of the layouts: DPR's `index.dpr` (flat, HNSW, HNSW-SQ8), PAQ's `*.flat.sq8.faiss` and `*.hnsw.sq8.faiss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import ArtifactError
from pipelines.index.spec import Metric

Array = npt.NDArray[Any]

_TYPES = ("IndexFlat", "IndexFlatIP", "IndexFlatL2", "IndexScalarQuantizer", "IndexHNSWFlat", "IndexHNSWSQ")
_CODES = {0: "SQ8", 1: "SQ4", 4: "SQfp16", 6: "SQ6"}  # FAISS's QuantizerType
_SAMPLE = 1000
_LENGTH_SPREAD = 0.05  # of squared lengths: 8-bit codes move them by less than a hundredth


@dataclass(frozen=True)
class Foreign:
    """An opened foreign index. `index` is as in the file; augmented: its vectors have the extra dimension."""

    index: Any
    dim: int
    augmented: bool

    @property
    def metric(self) -> Metric:
        import faiss

        return "ip" if self.augmented or self.index.metric_type == faiss.METRIC_INNER_PRODUCT else "l2"

    @property
    def leaf(self) -> Any:
        """Return what stores the vectors: the index itself, or a graph's storage."""
        import faiss

        return faiss.downcast_index(self.index.storage) if hasattr(self.index, "hnsw") else self.index

    @property
    def factory(self) -> str:
        """Return the factory string of such an index."""
        codes = _CODES[self.leaf.sq.qtype] if hasattr(self.leaf, "sq") else "Flat"
        return f"HNSW{self.index.hnsw.nb_neighbors(1)},{codes}" if hasattr(self.index, "hnsw") else codes

    def empty(self) -> Foreign:
        """Return an index of the same kind and the same trained codes, without vectors."""
        import faiss

        given, leaf = self.index, self.leaf
        if hasattr(given, "hnsw"):
            links = given.hnsw.nb_neighbors(1)
            made = (
                faiss.IndexHNSWSQ(given.d, leaf.sq.qtype, links, given.metric_type)
                if hasattr(leaf, "sq")
                else faiss.IndexHNSWFlat(given.d, links, given.metric_type)
            )
        elif hasattr(given, "sq"):
            made = faiss.IndexScalarQuantizer(given.d, given.sq.qtype, given.metric_type)
        else:
            made = faiss.IndexFlat(given.d, given.metric_type)
        result = Foreign(made, self.dim, self.augmented)
        if hasattr(leaf, "sq"):
            faiss.copy_array_to_vector(faiss.vector_to_array(leaf.sq.trained), result.leaf.sq.trained)
        made.is_trained = result.leaf.is_trained = True
        return result

    def vectors(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return (N, dim) float32: the vectors stored at these places, decoded, without the extra dimension."""
        found = self.index.reconstruct_batch(np.ascontiguousarray(places, np.int64))
        return np.asarray(found[:, : self.dim], np.float32)


def open_foreign(index: Any, dim: int, where: str) -> Foreign:
    """Recognise an index that FAISS has read, for vectors of width `dim`.

    Raises ArtifactError for a type that neither DPR nor PAQ makes, another width, another metric, and for an index one
    wider that is not augmented.
    """
    import faiss

    expected = "Flat, SQ8 or HNSW, as DPR and PAQ build them"
    if type(index).__name__ not in _TYPES:
        raise ArtifactError(f"an index of type {type(index).__name__} is not imported", where=where, expected=expected,
                            hint="import the vectors and build the index anew")  # fmt: skip
    if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise ArtifactError(f"metric {index.metric_type} is not imported", where=where, expected="inner product or L2")
    augmented = index.d == dim + 1 and index.metric_type == faiss.METRIC_L2
    if not augmented and index.d != dim:
        expected = f"the encoder's {dim}, or {dim + 1} of L2 with the extra dimension"
        hint = "was it built by this encoder?"
        raise ArtifactError(f"the index has width {index.d}", where=where, expected=expected, hint=hint)
    foreign = Foreign(index, dim, augmented)
    if hasattr(foreign.leaf, "sq") and foreign.leaf.sq.qtype not in _CODES:
        raise ArtifactError(f"scalar codes of type {foreign.leaf.sq.qtype} are not imported", where=where,
                            expected="8-bit, 6-bit, 4-bit or fp16")  # fmt: skip
    if augmented:
        _check_augmented(index, where)
    return foreign


def _check_augmented(index: Any, where: str) -> None:
    """Refuse vectors whose lengths differ: augmented ones all have the length of the longest."""
    if not index.ntotal:
        return
    places = np.unique(np.linspace(0, index.ntotal - 1, min(_SAMPLE, index.ntotal)).astype(np.int64))
    squared = (np.asarray(index.reconstruct_batch(places), np.float64) ** 2).sum(axis=1)
    if squared.max() - squared.min() > _LENGTH_SPREAD * squared.max():
        found = f"squared lengths from {squared.min():.4g} to {squared.max():.4g}"
        raise ArtifactError(f"the index is one wider than the encoder, but not augmented: {found}", where=where,
                            expected="vectors of one length", hint="was it built by this encoder?")  # fmt: skip


def adopt(foreign: Foreign, rows_N: npt.NDArray[np.int64]) -> Any:
    """Return the index with rows_N (N,) as its ids, taking queries of width `dim`; `foreign` is used up.

    Its searches give inner products, or squared distances where it is a plain L2 index.
    """
    import faiss

    inner = foreign.index
    if foreign.augmented:
        for layer in (inner, foreign.leaf):
            layer.metric_type = faiss.METRIC_INNER_PRODUCT
        append = faiss.LinearTransform(foreign.dim, foreign.dim + 1, False)
        faiss.copy_array_to_vector(np.eye(foreign.dim + 1, foreign.dim, dtype=np.float32).ravel(), append.A)
        append.is_trained = True
        inner = faiss.IndexPreTransform(append, inner)
    inner.ntotal = 0  # an id map is only put around an empty index; its ids are given at once here
    wrapped = faiss.IndexIDMap(inner)
    wrapped.ntotal = inner.ntotal = len(rows_N)
    faiss.copy_array_to_vector(np.ascontiguousarray(rows_N, np.int64), wrapped.id_map)
    return wrapped
