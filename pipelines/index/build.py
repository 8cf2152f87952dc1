"""Build an index: train one quantizer, add rows to copies of it, write and read the file.

Every file opens with plain `faiss.read_index`, and its searches return global rows.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import ArtifactError, InputError, PinakesError, StorageError
from pipelines.index.spec import IndexSpec, new_index
from pipelines.index.structure import codebooks, ivf_of, nsg_of, trained_parts, transforms, use_threads

Array = npt.NDArray[Any]
Block = tuple[Array, Array]
_ROWS_AT_ONCE = 16_384
_SEED_LIMIT = 2**31
_PAGE_BYTES = 4096

# Adding to a memory-mapped index aborts the process, so those that `read` mapped are remembered here.
_mapped: weakref.WeakSet[Any] = weakref.WeakSet()


def train(
    spec: IndexSpec, sample_ND: Array, seed: int = 0, num_threads: int | None = None, started: Any | None = None
) -> Any:
    """Return the empty, trained index of `spec`. sample_ND: (N, D) fp16 or fp32, a random sample of the corpus.

    started: an index of `spec` with trained transforms and its lists' centroids (`kmeans.preset`); the rest is trained.
    The same sample, seed and number of threads give the same bytes on the same kind of machine (with PCA or OPQ the
    number of threads decides the last bits). Raises InputError when there are too few rows or a value is not finite.
    """
    use_threads(num_threads)
    index = new_index(spec) if started is None else started
    if index.is_trained:
        return index
    sample = _checked(sample_ND, spec.dim, InputError)
    if started is None and len(sample) < spec.min_train_rows:
        raise _too_few_rows(spec, len(sample))
    _configure_training(index, seed % _SEED_LIMIT)
    try:
        index.train(sample)
    except RuntimeError as error:
        raise InputError(f"cannot train {spec.factory!r}: {error}", where=f"{len(sample)} rows of width {spec.dim}",
                         hint="train on more rows, or use a simpler index.factory such as SQ8") from error  # fmt: skip
    return index


def train_front(spec: IndexSpec, sample_ND: Array, seed: int = 0, num_threads: int | None = None) -> Any:
    """Return an index of `spec` of which only the transforms in front (PCA, OPQ, …) are trained, for `train` later."""
    use_threads(num_threads)
    index, vectors = new_index(spec), _checked(sample_ND, spec.dim, InputError)
    _configure_training(index, seed % _SEED_LIMIT)
    for transform in transforms(index):
        if not transform.is_trained:
            transform.train(vectors)
        vectors = transform.apply(vectors)
    return index


def add(index: Any, vectors_ND: Array, rows_N: npt.NDArray[np.int64], num_threads: int | None = None) -> None:
    """Add vectors (N, D), fp16 or fp32, under their global rows (N,) int64, a bounded chunk at a time.

    The same calls in the same order give the same index; with PCA or OPQ, for the same number of threads. An NSG
    graph is built from all its rows at once: `finish`, or `write`, does that. Raises InputError for rows that do not
    match the vectors and values that are not finite, ArtifactError for an untrained or a memory-mapped index and
    another width.
    """
    use_threads(num_threads)
    _check_ready(index)
    rows = np.ascontiguousarray(rows_N, dtype=np.int64)
    if rows.shape != (len(vectors_ND),) or (len(rows) and rows.min() < 0):
        what = f"{rows.shape} rows for {len(vectors_ND)} vectors, or a negative one"
        raise InputError(what, where="add", expected="one row >= 0 for each vector")
    nsg = nsg_of(index)
    if nsg is not None and nsg.nsg.is_built:
        raise ArtifactError(
            "an NSG graph takes no more rows once built", where="add", hint="build it anew from all rows"
        )
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        chunk = slice(start, start + _ROWS_AT_ONCE)
        vectors = _checked(vectors_ND[chunk], index.d, ArtifactError)
        if nsg is None:
            index.add_with_ids(vectors, rows[chunk])
        else:
            _stage(index, nsg, vectors, rows[chunk])


def add_whole(index: Any, blocks: Iterable[Block], path: str, num_threads: int | None = None) -> None:
    """Add the vectors of all blocks, (vectors (n, D), rows (n,)), in one call, so that a graph takes them in mixed.

    A graph grows vector by vector, each linked to neighbours among those before it: along a corpus sorted by topic it
    gets few links between topics, and walks that begin in the wrong one are lost. FAISS links what it is given at once
    in an order drawn by chance (with a seed of its own), and stores it in the order given, so that neighbours in the
    corpus stay neighbours in memory. How the vectors are cut into blocks does not matter.

    path: where a local file for the vectors in fp32 is written; memory-mapped, it takes none of the process's own
    memory (what a transform in front makes of them does). Raises what `add` raises, and StorageError when the disk
    refuses.
    """
    use_threads(num_threads)
    _check_ready(index)
    rows: list[npt.NDArray[np.int64]] = []
    try:
        with open(path, "wb") as file:
            for vectors_ND, rows_N in blocks:
                file.write(_checked(vectors_ND, index.d, ArtifactError).data)
                rows.append(np.asarray(rows_N, np.int64))
    except OSError as error:
        raise StorageError(f"cannot write the vectors that a graph grows from: {error}", where=path,
                           expected="room for a shard's in fp32", hint="is the disk full?") from error  # fmt: skip
    if num_rows := sum(map(len, rows)):
        index.add_with_ids(np.memmap(path, np.float32, "r", shape=(num_rows, index.d)), np.concatenate(rows))


def finish(index: Any) -> None:
    """Build what can only be built from all rows: the graph of an NSG index. Does nothing for other types."""
    nsg = nsg_of(index)
    if nsg is None or nsg.nsg.is_built or not nsg.storage.ntotal:
        return
    vectors = nsg.storage.reconstruct_n(0, nsg.storage.ntotal)
    nsg.storage.reset()
    nsg.ntotal = 0
    use_threads(1)  # threads race for the graph's links: with more than one, two builds differ
    try:
        nsg.add(vectors)
    except RuntimeError as error:
        what = f"cannot build an NSG graph over {len(vectors)} rows: {error}"
        hint = "use Flat or HNSW32 for a small corpus"
        raise InputError(what, where="index.factory", expected="more than 100 rows", hint=hint) from error


def clone_empty(trained: Any) -> Any:
    """Return a copy of an empty, trained index. Raises ArtifactError when it holds rows (they would be copied)."""
    import faiss

    if trained.ntotal:
        raise ArtifactError(
            f"the index holds {trained.ntotal} rows", where="clone_empty", expected="the empty trained index"
        )
    return faiss.deserialize_index(faiss.serialize_index(trained))


def write(index: Any, path: str) -> None:
    """Write `index` to the local file `path` (finishing it first). Raises StorageError when the disk refuses."""
    import faiss

    finish(index)
    try:
        faiss.write_index(index, path)
    except RuntimeError as error:
        raise StorageError(f"cannot write the index: {error}", where=path, hint="is the disk full?") from error


def read(path: str, mmap: bool = False) -> Any:
    """Return the index in the local file `path`; mapped, it shares its pages with other processes and is read-only.

    Mapped are vectors, codes, lists and links. Read into memory are an id map's ids (8 bytes a row, of flat codes and
    graphs), a graph's levels and offsets (12 more) and all codes of fast-scan types. The file must stay as it is while
    it is mapped: replace it, never write to it.
    Raises ArtifactError when the file is absent, cut short or no index. What lies between a file's ends is not
    checked: compare its checksum first.
    """
    import faiss

    # IO_FLAG_MMAP would load most types fully, and crashes the first search of lists kept in a file of their own.
    flags = faiss.IO_FLAG_MMAP_IFC if mmap else 0
    if not os.path.isfile(path):
        raise ArtifactError("there is no index file", where=path, hint="build the index, or fetch it from its store")
    what = "the index file is damaged, or no index at all"
    hint = "fetch it again, or rebuild the shard"
    damaged = ArtifactError(what, where=path, expected="a whole FAISS index", hint=hint)
    try:
        index = faiss.read_index(path, flags)
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise damaged from error
    if mmap:
        if _ends_early(index, path):
            raise damaged
        _mapped.add(index)
    return index


# Checks


def _checked(vectors_ND: Array, dim: int, wrong_width: type[PinakesError]) -> npt.NDArray[np.float32]:
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != dim:
        raise wrong_width(f"vectors have shape {vectors_ND.shape}, the index has width {dim}", expected=f"(N, {dim})",
                          hint="were they made by the encoder this index is for?")  # fmt: skip
    vectors = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    if not np.isfinite(vectors).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise InputError("a vector is not finite", where=f"vector {bad} of this block", hint="encode its part again")
    return vectors


def _check_ready(index: Any) -> None:
    check_writable(index)
    if not index.is_trained:
        raise ArtifactError("the index is not trained", where="add", expected="an index from train or clone_empty")


def check_writable(index: Any) -> None:
    """Raise ArtifactError for a memory-mapped index: FAISS would end the process."""
    if index in _mapped:
        raise ArtifactError("the index is memory-mapped and so read-only", hint="open it with read(path, mmap=False)")


def _too_few_rows(spec: IndexSpec, num_rows: int) -> InputError:
    smaller = f"IVF{max(1, num_rows // 39)},SQ8"
    hint = f"use {smaller!r}, SQ8 or Flat, or a larger corpus" if num_rows else "pass a sample of the corpus"
    expected = f"at least {spec.min_train_rows} rows, better {spec.default_train_rows(2**62)}"
    what = f"{spec.factory!r} cannot be trained on {num_rows} rows"
    return InputError(what, where="index.factory", expected=expected, hint=hint)


def _ends_early(index: Any, path: str) -> bool:
    """Tell whether a mapped file lacks its last few bytes, which FAISS does not notice (below one value's width)."""
    import faiss

    size = os.path.getsize(path)
    ivf = ivf_of(index)
    if isinstance(index, faiss.IndexIDMap):
        # The file ends with the number of ids and the ids.
        with open(path, "rb") as file:
            file.seek(max(0, size - 8 * index.ntotal - 8))
            return int.from_bytes(file.read(8), "little") != index.ntotal
    if ivf is None or not isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.ArrayInvertedLists):
        return False
    lists = ivf.invlists
    last = next((n for n in reversed(range(lists.nlist)) if lists.list_size(n)), None)
    if last is None:
        return False
    # The ids of the last list end the file, and a mapping keeps the offset within a page.
    end = int(lists.get_ids(last)) + 8 * lists.list_size(last)
    return end % _PAGE_BYTES != size % _PAGE_BYTES


# Training


def _configure_training(index: Any, seed: int) -> None:
    """Seed every k-means, and silence FAISS's own few-rows warning: `default_train_rows` is our answer to it."""
    import faiss

    for parameters in (p for p, _ in codebooks(index) if p is not None):
        parameters.seed = seed
        parameters.min_points_per_centroid = 1
    for part in trained_parts(index):
        # Polysemous codes take most of a product quantizer's training time, for a Hamming filter that is not used here.
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False
    for transform in transforms(index):
        if isinstance(transform, faiss.OPQMatrix):
            _give_quantizer(transform, seed)


def _give_quantizer(transform: Any, seed: int) -> None:
    import faiss

    quantizer = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1
    transform.pq = quantizer
    transform.referenced_objects = [quantizer]


# NSG: rows wait in the storage until the graph is built


def _stage(index: Any, nsg: Any, vectors: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> None:
    import faiss

    before = index.id_map.size()
    nsg.storage.add(vectors)
    index.id_map.resize(before + len(rows))
    faiss.rev_swig_ptr(index.id_map.data(), before + len(rows))[before:] = rows
    index.ntotal = nsg.ntotal = nsg.storage.ntotal
