"""The indexes that can be had for so many vectors of such a width, with the memory that each will take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from pipelines.errors import ConfigError
from pipelines.index.spec import IndexSpec, Metric, new_index, parse_spec
from pipelines.index.structure import layers, trained_parts, transforms
from pipelines.sizes import human_bytes

Refine = Literal["none", "exact"]
RecallClass = Literal["exact", "near exact", "high", "medium", "low"]
Search = Literal["scan", "lists", "graph"]
RECALL_CLASSES: tuple[RecallClass, ...] = ("exact", "near exact", "high", "medium", "low")
"""What recall@10 can be had with a wide search, by what the codes lose: 1, 0.99, 0.95, 0.8, less. Only a measurement on
the vectors themselves tells; tuning makes it."""

_LEAST_LISTS = 4
_LISTS_PER_ROOT = 4  # lists for each √rows: FAISS's wiki, "Guidelines to choose an index", names 4 to 16
_ROWS_PER_LIST = 39  # below which FAISS's k-means warns
_MOST_LISTS = 2**18
_PACKED = 32  # fast-scan codes come in blocks of that many vectors
_MOST_TABLE_BYTES = 2**31  # FAISS's own bound for tables that it computes beforehand
_CODES = ("Flat", "SQfp16", "SQ8")
_LARGER_GRAPH = 64
_ROTATION = "OPQ"
_NOTHING_TO_SAVE = 8_000_000  # bytes of vectors below which no codes are tried: every search of them takes about 1 ms


@dataclass(frozen=True)
class Candidate:
    """One valid index. file_bytes: of all its shard files; memory_bytes: of a process that has them all in memory.

    search: whether a query reads every vector, some lists of them, or walks a graph. refine: whether its vectors lie
    beside the codes, on disk, which then count as files.
    """

    factory: str
    recall: RecallClass
    search: Search
    mergeable: bool
    bytes_per_vector: float
    file_bytes: int
    memory_bytes: int
    refine: Refine = "none"

    @property
    def name(self) -> str:
        return named(self.factory, self.refine)

    def fits(self, budget_bytes: int | None) -> bool:
        return budget_bytes is None or self.memory_bytes <= budget_bytes

    def as_dict(self, budget_bytes: int | None) -> dict[str, Any]:
        return {**self.__dict__, "fits": self.fits(budget_bytes)}


def candidates(num_rows: int, dim: int, metric: Metric, num_shards: int = 1) -> list[Candidate]:
    """Return the indexes worth considering, valid for the width, best expected recall first, then least memory.

    Raises ConfigError for no rows, no shards, or a width below 1.
    """
    if num_rows < 1 or num_shards < 1:
        raise ConfigError(f"cannot plan for {num_rows} rows in {num_shards} shards", expected="1 or more of each")
    found = []
    for factory, recall in dict(_factories(num_rows, dim)).items():
        try:
            spec = parse_spec(factory, dim, metric)
        except ConfigError:
            continue  # FAISS has restrictions of its own on widths
        if spec.min_train_rows <= num_rows:
            found.append(_candidate(spec, recall, num_rows, num_shards))
    if not found:
        parse_spec("Flat", dim, metric)  # says what is wrong with the width or the metric
    return sorted(found, key=lambda c: (RECALL_CLASSES.index(c.recall), c.memory_bytes, c.factory))


def named(factory: str, refine: str) -> str:
    """Return what an index is called where there are some with, and some without their vectors beside them."""
    return factory if refine == "none" else f"{factory} with index.refine: {refine}"


def shortlist(
    found: Sequence[Candidate], num_rows: int, dim: int, memory_bytes: float, refine: Refine = "none"
) -> tuple[list[Candidate], str]:
    """Return those of `found` that are worth the time of a pilot, and in words why the others are not.

    memory_bytes: what a replica may hold. Where the vectors themselves do not fit, the two-tier forms of lossy codes
    join; where they take next to nothing, lossy codes have nothing to offer. refine: exact leaves the two-tier forms.
    """
    flat_bytes = next(c.memory_bytes for c in found if c.factory == "Flat")
    if refine == "exact" and (tiers := _two_tiers(found, num_rows, dim)):
        return tiers, "index.refine: exact wants codes in memory and their vectors on disk"
    if flat_bytes > memory_bytes:
        return [*found, *_two_tiers(found, num_rows, dim)], ""
    if flat_bytes <= _NOTHING_TO_SAVE:
        few = [c for c in found if not _is_lossy(c)]
        return few, f"lossy codes have nothing to save where the vectors take {human_bytes(flat_bytes)}"
    return list(found), ""


def _two_tiers(found: Sequence[Candidate], num_rows: int, dim: int) -> list[Candidate]:
    """Return lists of lossy codes with their fp16 vectors on disk, but no rotations: the vectors replace their gain."""
    coarse = [c for c in found if c.search == "lists" and _is_lossy(c) and not c.factory.startswith(_ROTATION)]
    vectors_bytes = 2 * num_rows * dim
    return [replace(c, refine="exact", recall="near exact", file_bytes=c.file_bytes + vectors_bytes) for c in coarse]


def _is_lossy(candidate: Candidate) -> bool:
    return candidate.recall not in ("exact", "near exact")


def finer(spec: IndexSpec) -> list[str]:
    """Return up to two valid factories that lose less than `spec`, the nearest first; none for Flat itself."""
    *front, code = re.sub(r",(RFlat|Refine.*)$", "", spec.factory).split(",")
    front = [piece for piece in front if piece.startswith(("IVF", "HNSW"))]  # without the transform, which loses too
    graph = re.fullmatch(r"(?:HNSW|NSG)(\d+)", code)
    if graph:
        better = [f"HNSW{_LARGER_GRAPH}"] if int(graph[1]) < _LARGER_GRAPH else []
    else:
        level = _CODES.index(code) if code in _CODES else len(_CODES)
        better = [",".join([*front, c]) for c in reversed(_CODES[:level])] + list(reversed(_CODES[1:level]))
    valid = [factory for factory in better if factory != "Flat" and _is_valid(factory, spec)]
    return [*valid[:1], *(["Flat"] if spec.factory != "Flat" else [])]


def default_lists(num_rows: int) -> int:
    """Return how many lists an inverted file of so many rows gets: a power of 2 near 4 √rows, 0 for too few rows.

    Bounded so that each has the 39 rows that its training takes.
    """
    most = num_rows // _ROWS_PER_LIST
    if most < _LEAST_LISTS:
        return 0
    wanted = 2 ** round(math.log2(_LISTS_PER_ROOT * math.sqrt(num_rows)))
    return min(wanted, 2 ** int(math.log2(most)), _MOST_LISTS)


# What there is


def _factories(num_rows: int, dim: int) -> Iterator[tuple[str, RecallClass]]:
    """Yield factory strings, some of them impossible, with the recall that their codes allow."""
    yield from (("Flat", "exact"), ("SQfp16", "near exact"), ("SQ8", "high"))
    yield from (("HNSW32", "near exact"), ("HNSW32,SQ8", "high"))
    if dim >= 2:
        yield f"PCA{dim // 2},SQ8", "medium"
    lists = default_lists(num_rows)
    if not lists:
        return
    yield from ((f"IVF{lists},Flat", "near exact"), (f"IVF{lists},SQ8", "high"), (f"IVF{lists},RaBitQ", "low"))
    if dim >= 2:
        yield f"PCA{dim // 2},IVF{lists},SQ8", "medium"
    sizes: tuple[tuple[int, RecallClass, RecallClass], ...] = ((4, "medium", "medium"), (8, "low", "medium"))
    for share, plain, rotated in sizes:
        pieces, width = pq_pieces(dim, dim // share)
        if width == dim:
            yield f"IVF{lists},PQ{pieces}", plain
        yield f"{_opq(dim, pieces, width)},IVF{lists},PQ{pieces}", rotated
    for share in (2, 4):  # 4 bits a piece: the bytes of the PQ above
        pieces, width = pq_pieces(dim, dim // share)
        if width == dim:
            yield f"IVF{lists},PQ{pieces}x4fs", "low"
        yield f"{_opq(dim, pieces, width)},IVF{lists},PQ{pieces}x4fs", "low"


def _opq(dim: int, pieces: int, width: int) -> str:
    return f"OPQ{pieces}" if width == dim else f"OPQ{pieces}_{width}"


def pq_pieces(dim: int, wanted: int) -> tuple[int, int]:
    """Return (pieces, width) of a product quantizer: the divisor of `dim` nearest to `wanted`, and `dim`.

    Where no divisor lies within a factor of 1.5, `wanted` itself and the largest multiple of it up to `dim`: a width
    for OPQ to project to.
    """
    wanted = max(1, wanted)
    nearest = min((m for m in range(1, dim + 1) if dim % m == 0), key=lambda m: (abs(math.log(m / wanted)), m))
    if 2 * wanted <= 3 * nearest and 2 * nearest <= 3 * wanted:
        return nearest, dim
    return wanted, dim - dim % wanted


def _is_valid(factory: str, spec: IndexSpec) -> bool:
    try:
        parse_spec(factory, spec.dim, spec.metric)
    except ConfigError:
        return False
    return True


# What it takes


def _candidate(spec: IndexSpec, recall: RecallClass, num_rows: int, num_shards: int) -> Candidate:
    fixed, tables = _fixed_bytes(spec)
    file_bytes = spec.bytes_per_vector * num_rows + fixed * num_shards
    return Candidate(
        factory=spec.factory,
        recall=recall,
        search="lists" if "IVF" in spec.factory else "graph" if "HNSW" in spec.factory else "scan",
        mergeable=spec.mergeable,
        bytes_per_vector=round(file_bytes / num_rows, 2),
        file_bytes=file_bytes,
        memory_bytes=file_bytes + tables * num_shards,
    )


@lru_cache(maxsize=256)
def _fixed_bytes(spec: IndexSpec) -> tuple[int, int]:
    """Return (bytes of an index's file, further bytes in memory) that do not depend on its rows.

    What faiss/impl/index_write.cpp writes beside the vectors, in fp32: the centroids of the lists (nlist·d) and 8 bytes
    for the length of each; the codebooks of a product quantizer (2^bits·d); two values a dimension of SQ8; the centre
    of a RaBitQ without lists (d); a transform's matrix and offset (d_in·d_out + d_out), with a PCA also its mean,
    eigenvalues and full matrix (2·d_in + d_in²). Fast-scan codes fill blocks of 32 vectors: half a block for each list,
    and two more lengths. In memory an IVF-PQ over L2 computes a table of nlist·M·2^bits values, where that is at most
    2 GiB (initialize_IVFPQ_precomputed_table in faiss/IndexIVFPQ.cpp).
    """
    import faiss

    index = new_index(spec)
    total, tables = 0, 0
    for transform in transforms(index):
        total += 4 * (transform.d_in * transform.d_out + transform.d_out)
        if isinstance(transform, faiss.PCAMatrix):
            total += 4 * (2 * transform.d_in + transform.d_in**2)
    for part in trained_parts(index):
        if isinstance(part, faiss.IndexIVF):
            total += part.nlist * (4 * part.d + 8)
        if isinstance(part, faiss.IndexIVFFastScan):
            total += part.nlist * (int(part.code_size) * _PACKED // 2 + 16)
        if hasattr(part, "pq"):
            total += 4 * part.pq.ksub * part.d
        if hasattr(part, "sq") and "SQ8" in spec.factory:
            total += 8 * part.d
        if hasattr(part, "rabitq") and not isinstance(part, faiss.IndexIVF):
            total += 4 * part.d
    leaf = layers(index)[-1]
    if type(leaf).__name__ == "IndexIVFPQ" and spec.metric == "l2":
        table = 4 * leaf.nlist * leaf.pq.M * leaf.pq.ksub
        tables = table if table <= _MOST_TABLE_BYTES else 0
    return total, tables
