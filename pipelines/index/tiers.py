"""Two tiers: small codes in memory find candidates, the vectors themselves, on disk, decide among them.

Beside a shard lie its vectors as a plain .npy file, fp16 in row order, memory-mapped: a search reads those of its
candidates alone, and the pages that are asked for often stay in the machine's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import ArtifactError, ConfigError, InputError
from pipelines.index.structure import layers

Array = npt.NDArray[Any]
Hits = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

FACTOR = "k_factor"
"""The search parameter: candidates for each hit asked for. FAISS's refining indexes call theirs the same."""
_DEFAULT_FACTOR = 4.0  # where a version was not tuned


class TwoTier:
    """An index of codes and the vectors (N, D) fp16 behind them, for the rows from `first_row` on.

    Raises ArtifactError when there are not as many vectors as codes, or they have another width.
    """

    def __init__(self, codes: Any, vectors_ND: Array, first_row: int) -> None:
        if vectors_ND.shape != (codes.ntotal, codes.d):
            raise ArtifactError(
                f"the vectors to refine with have shape {vectors_ND.shape}",
                expected=f"({codes.ntotal}, {codes.d}), as the shard has",
                hint="rebuild the version",
            )
        self.codes, self.vectors_ND, self.first_row = codes, vectors_ND, first_row

    @property
    def ntotal(self) -> int:
        return int(self.codes.ntotal)

    @property
    def d(self) -> int:
        return int(self.codes.d)

    @property
    def metric_type(self) -> int:
        return int(self.codes.metric_type)

    def rescore(self, queries_BD: Array, row_BC: Array) -> Array:
        """Return score_BC fp32 of the candidates (-inf for row -1): the exact inner product, or -|q - v|^2.

        The products of fp16 values are taken in fp32.
        """
        import faiss

        is_similarity = faiss.is_similarity_metric(self.metric_type)
        score_BC = np.full(row_BC.shape, -np.inf, np.float32)
        for query_D, row_C, score_C in zip(np.asarray(queries_BD, np.float32), row_BC, score_BC, strict=True):
            there = np.flatnonzero(row_C >= 0)
            vectors = self.vectors_ND[row_C[there] - self.first_row].astype(np.float32)
            if not is_similarity:
                vectors -= query_D
                score_C[there] = -np.einsum("cd,cd->c", vectors, vectors)
            else:
                score_C[there] = vectors @ query_D
        return score_BC


def check_refine(index: Any) -> None:
    """Raise ConfigError for a type that refines its candidates by itself."""
    import faiss

    if any(isinstance(layer, faiss.IndexRefine) for layer in layers(index)):
        raise ConfigError("the index refines its candidates already", where="index.refine",
                          hint="leave RFlat and Refine out of index.factory, or index.refine")  # fmt: skip


def codes_of(index: Any) -> Any:
    """Return the FAISS index of codes: `index` itself where it has no vectors beside it."""
    return index.codes if isinstance(index, TwoTier) else index


def vectors_name(number: int) -> str:
    """Return the name of a shard's file of vectors."""
    return f"vectors-{number:03d}.npy"


def with_vectors(codes: Any, number: int, files: Mapping[str, Any], path_of: Callable[[str], str]) -> Any:
    """Return shard `number` with its vectors where a version has them, else as it is.

    files: the entries of the version's manifest; path_of: gives the local path of one of them.
    """
    name = vectors_name(number)
    if name not in files:
        return codes
    return TwoTier(codes, map_vectors(path_of(name)), int(files[name].get("first_row", 0)))


def split_params(params: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return (candidates for each hit, the parameters of the search for them)."""
    rest = dict(params)
    return rest.pop(FACTOR, _DEFAULT_FACTOR), rest


def write_vectors(path: str, blocks: Iterable[tuple[Array, Array]], num_rows: int, dim: int) -> None:
    """Write the vectors of blocks of (vectors (n, D), rows) to `path` as .npy, fp16, a block in memory at a time.

    Raises InputError for a value beyond fp16, ArtifactError when the blocks hold another number of rows.
    """
    header = {"descr": "<f2", "fortran_order": False, "shape": (num_rows, dim)}
    written = 0
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for vectors_ND, _ in blocks:
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(vectors_ND, "<f2")
            if not np.isfinite(stored).all():
                raise InputError("a vector is not finite in fp16", where="index.refine", expected="values below 65,504",
                                 hint="build without index.refine")  # fmt: skip
            file.write(stored.tobytes())
            written += len(stored)
    if written != num_rows:
        raise ArtifactError(f"{written} vectors to refine with", where=path, expected=str(num_rows))


def map_vectors(path: str) -> Array:
    """Return the (N, D) fp16 vectors of a .npy file, memory-mapped. Raises ArtifactError when it is no such file."""
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtifactError(f"not a file of vectors: {error}", where=path, expected="a whole .npy file",
                            hint="rebuild the version") from error  # fmt: skip
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise ArtifactError(f"the file holds {vectors.dtype} of shape {vectors.shape}", where=os.fspath(path),
                            expected="fp16 vectors (N, D)", hint="rebuild the version")  # fmt: skip
    return vectors
