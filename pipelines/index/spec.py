"""What to build: a FAISS factory string, checked against the vector width and the metric before anything is spent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from pipelines.errors import ConfigError
from pipelines.index.structure import codebooks, ivf_of, layers, nsg_of, trained_parts, transforms

Metric = Literal["ip", "l2"]

# FAISS's k-means warns below 39 rows a centroid and never uses more than 256 (ClusteringParameters).
_FEWEST_ROWS_PER_CENTROID, _MOST_ROWS_PER_CENTROID = 39, 256
_FEWEST_DEFAULT_ROWS = 65_536  # for quantizers without centroids: ranges and means settle well before this
_MOST_DEFAULT_ROWS = 2**21  # 6 GB of 768-wide fp32 vectors
_OPQ_CENTROIDS = 256  # OPQ is trained through an 8-bit product quantizer
_ID_BYTES = 8

# Exact class names: subclasses such as IndexIVFFlatPanorama and IndexIVFPQR merge wrongly or abort.
MERGEABLE_TYPES = frozenset(
    f"Index{name}"
    for name in ("Flat", "FlatIP", "FlatL2", "ScalarQuantizer", "PQ", "PQFastScan", "RaBitQ", "RaBitQFastScan",
                 "IVFFlat", "IVFScalarQuantizer", "IVFPQ", "IVFPQFastScan", "IVFRaBitQ", "IVFRaBitQFastScan")
)  # fmt: skip
_EXAMPLES = ("Flat", "SQ8", "HNSW32", "IVF1024,SQ8", "OPQ{m},IVF1024,PQ{m}")


@dataclass(frozen=True)
class _Facts:
    """What FAISS says about a factory string."""

    needs_training: bool
    mergeable: bool
    grows: bool
    most_centroids: int
    min_train_rows: int
    bytes_per_vector: int


@dataclass(frozen=True)
class IndexSpec:
    """An index type for vectors of width `dim`; make it with `parse_spec`, which checks it. Cheap to pickle."""

    factory: str
    dim: int
    metric: Metric

    @property
    def needs_training(self) -> bool:
        return _facts(self).needs_training

    @property
    def mergeable(self) -> bool:
        """Tell whether pieces that share one trained quantizer can be merged into the index of all their rows.

        True for inverted files and flat codes (Flat, SQ, PQ, fast-scan, RaBitQ), also behind a PCA or OPQ; False for
        graphs (HNSW, NSG), refining indexes and the rarer types.
        """
        return _facts(self).mergeable

    @property
    def grows(self) -> bool:
        """Tell whether rows find their place among those added before: a graph (HNSW), which their order decides."""
        return _facts(self).grows

    @property
    def min_train_rows(self) -> int:
        """Return the fewest rows that training accepts: one for each centroid and each output dimension."""
        return _facts(self).min_train_rows

    @property
    def bytes_per_vector(self) -> int:
        """Estimate the bytes that one vector takes in the index: codes, id, graph links."""
        return _facts(self).bytes_per_vector

    def default_train_rows(self, num_rows: int) -> int:
        """Return how many of `num_rows` rows to train on: 256 for each centroid, bounded in memory.

        The bound gives way so that each centroid has the 39 rows below which FAISS warns.
        """
        facts = _facts(self)
        if not facts.needs_training:
            return 0
        wanted = max(_FEWEST_DEFAULT_ROWS, _MOST_ROWS_PER_CENTROID * facts.most_centroids)
        most = max(_MOST_DEFAULT_ROWS, _FEWEST_ROWS_PER_CENTROID * facts.most_centroids)
        return min(num_rows, wanted, most)


@lru_cache(maxsize=256)
def parse_spec(factory: str, dim: int, metric: Metric) -> IndexSpec:
    """Check a FAISS factory string for vectors of width `dim` and return its spec.

    A leading `IDMap,` is dropped: the id map is put where it is needed. Raises ConfigError with the reason and the
    nearest strings that are valid for this width.
    """
    if metric not in get_args(Metric):
        raise ConfigError(f"unknown metric {metric!r}", where="index.metric", expected="ip or l2")
    if dim < 1:
        raise ConfigError(f"vectors cannot have width {dim}", where="index", expected="1 or more")
    spec = IndexSpec(_without_id_map(factory.strip()), dim, metric)
    reason = _refusal(spec)
    if reason:
        what = f"{factory!r} is no index for {dim}-wide vectors under {metric}: {reason}"
        hint = "try " + "; ".join(repr(other) for other in suggest(spec))
        raise ConfigError(what, where="index.factory", expected="a FAISS factory string", hint=hint)
    return spec


def new_index(spec: IndexSpec) -> Any:
    """Return an empty, untrained FAISS index whose searches return the ids it was given.

    Inverted files keep ids themselves; everything else is wrapped in an IndexIDMap. Never both: merging an id map over
    an inverted file silently returns wrong ids (faiss#3495).
    """
    import faiss

    metric = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[spec.metric]
    bare = faiss.index_factory(spec.dim, spec.factory, metric)
    graph = nsg_of(bare)
    if graph is not None:
        graph.nsg.enterpoint = 0  # FAISS leaves it undefined until the graph is built, and so the file's bytes too
    if ivf_of(bare) is not None:
        return bare
    wrapped = faiss.IndexIDMap(bare)
    bare.this.disown()
    wrapped.own_fields = True
    return wrapped


def suggest(spec: IndexSpec, most: int = 3) -> list[str]:
    """Return up to `most` valid strings near `spec.factory`: its PQ and OPQ sizes changed, or else common types."""
    found: list[str] = []
    for number in dict.fromkeys(re.findall(r"O?PQ(\d+)", spec.factory)):
        near = math.log(max(int(number), 1))
        sizes = [size for _, size in sorted((abs(math.log(size) - near), size) for size in range(1, spec.dim + 1))]
        # A size divides the width or the transform's output, so that divisors of neither need not be tried.
        widths = [spec.dim, *map(int, re.findall(r"(?:PCAR?|PCAWR?|RR|OPQ\d+_)(\d+)", spec.factory))]
        for size in (s for s in sizes if any(width % s == 0 for width in widths)):
            other = re.sub(rf"(O?PQ){number}(?!\d)", rf"\g<1>{size}", spec.factory)
            if len(found) < most and other not in found and not _refusal(IndexSpec(other, spec.dim, spec.metric)):
                found.append(other)
    divisor = next(size for size in (64, 48, 32, 56, 26, 16, 14, 8, 4, 2, 1) if spec.dim % size == 0)
    return found or [example.format(m=divisor) for example in _EXAMPLES]


def is_exact(factory: str) -> bool:
    """Tell whether an index of this type finds just what exact search finds."""
    return _without_id_map(factory) == "Flat"


def _without_id_map(factory: str) -> str:
    bare = re.sub(r"^(IDMap2?,)+", "", factory)
    if bare != factory and "IVF" in bare:
        what = f"{factory!r} puts an id map over an inverted file: merging such shards returns wrong ids"
        hint = f"use {bare!r}: an inverted file keeps the ids itself"
        raise ConfigError(what, where="index.factory", hint=hint)
    return bare


def _refusal(spec: IndexSpec) -> str:
    """Return why FAISS cannot build this, or an empty string."""
    import faiss

    if "IDMap" in spec.factory:
        return "an id map is added where it is needed, it cannot be asked for"
    try:
        index = new_index(spec)
    except (RuntimeError, MemoryError, OverflowError) as error:
        # "Error in <function> at <file>:<line>: Error: '<condition>' failed: <reason>"
        return re.split(r"' failed:?\s*|\.cpp:\d+:\s*", str(error).strip())[-1] or str(error).strip()
    if any(isinstance(layer, faiss.IndexIVF) and layer.nlist < 1 for layer in layers(index)):
        return "an inverted file needs one list or more"
    if any(isinstance(t, faiss.PCAMatrix) and t.d_out > t.d_in for t in transforms(index)):
        return "a PCA cannot widen vectors"
    if nsg_of(index) is not None and not isinstance(layers(index)[-2], faiss.IndexIDMap):
        return "NSG must stand alone, without a transform or a refinement"
    return ""


@lru_cache(maxsize=64)
def _facts(spec: IndexSpec) -> _Facts:
    import faiss

    index = new_index(spec)
    found = layers(index)
    outputs = [t.d_out for t in transforms(index) if not t.is_trained]
    # Residual quantizers fit a full PCA first.
    outputs += [part.d for part in trained_parts(index) if hasattr(part, "rq") or hasattr(part, "prq")]
    centroids = max(_centroids(index), default=0)
    refines = any(isinstance(layer, faiss.IndexRefine) for layer in found)
    return _Facts(
        needs_training=not index.is_trained,
        mergeable=type(found[-1]).__name__ in MERGEABLE_TYPES and not refines,
        grows=isinstance(found[-1], faiss.IndexHNSW),
        most_centroids=centroids,
        min_train_rows=0 if index.is_trained else max([1, centroids, *outputs]),
        bytes_per_vector=_bytes_per_vector(index),
    )


def _centroids(index: Any) -> Iterator[int]:
    """Yield the sizes of all codebooks that k-means will train."""
    import faiss

    yield from (_OPQ_CENTROIDS for t in transforms(index) if isinstance(t, faiss.OPQMatrix))
    yield from (size for _, size in codebooks(index))


def _bytes_per_vector(index: Any) -> int:
    import faiss

    if isinstance(index, faiss.IndexIDMap):
        return _ID_BYTES + _bytes_per_vector(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexPreTransform):
        return _bytes_per_vector(faiss.downcast_index(index.index))
    if isinstance(index, faiss.IndexRefine):
        parts = (faiss.downcast_index(part) for part in (index.base_index, index.refine_index))
        return sum(_bytes_per_vector(part) for part in parts)
    if isinstance(index, faiss.IndexIVF):
        return int(index.code_size) + _ID_BYTES
    if isinstance(index, faiss.IndexHNSW):
        # int32 links: 2M on the lowest level, M on each higher one (a share of 1/M of the vectors climbs each step);
        # beside them a 64-bit offset and a 32-bit level.
        links = index.hnsw.nb_neighbors(0) + 1
        return 4 * links + 12 + _bytes_per_vector(faiss.downcast_index(index.storage))
    if isinstance(index, faiss.IndexNSG):
        return 4 * index.nsg.R + _bytes_per_vector(faiss.downcast_index(index.storage))
    return int(index.code_size)
