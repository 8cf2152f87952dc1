"""Merge the pieces of a shard: in memory, or from file to file without holding them, however large the shard is.

An inverted file ends with its lists, and flat codes lie in one run: the merged file is the trained index's own bytes
with the pieces' lists, or codes, one behind the other in their place. It is byte for byte the file that FAISS writes
after merging in memory. Fast-scan codes lie in blocks that must be packed anew, which FAISS does in memory: such a
shard, a few bytes a vector, is held whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import ArtifactError, ConfigError
from pipelines.index.build import check_writable, clone_empty, read, write
from pipelines.index.identity import describe, is_mergeable, quantizer_digest, serialised_without_rows
from pipelines.index.structure import ivf_of, layers, use_threads

Array = npt.NDArray[Any]

_ROWS_OF_MODEL = 64


def merge(into: Any, other: Any, num_threads: int | None = None) -> None:
    """Move all rows of `other` into `into`; `other` is left empty.

    Raises ConfigError for a type that cannot be merged, ArtifactError when the two come from different quantizers
    (FAISS itself would merge such scalar quantizers silently, with wrong vectors) or when one is memory-mapped.
    """
    use_threads(num_threads)
    _move(into, other, quantizer_digest(into) if is_mergeable(into) else "")
    _clear_padding(into)


def merge_files(trained: Any, paths: Sequence[str], target: str) -> int:
    """Write the index of all rows of the files `paths`, in this order, to the local file `target`; return its rows.

    trained: the empty index that the pieces started from. Raises ArtifactError for a piece of another quantizer or a
    damaged one, StorageError when the disk refuses.
    """
    import faiss

    leaf = layers(trained)[-1]
    digest = quantizer_digest(trained)
    if isinstance(leaf, faiss.IndexFastScan | faiss.IndexIVFFastScan):
        return _merge_in_memory(trained, paths, target)
    pieces = []
    for path in paths:
        pieces.append(read(path, mmap=True))
        if quantizer_digest(pieces[-1]) != digest:
            raise _not_trained_together(path)
    num_rows = sum(int(piece.ntotal) for piece in pieces)
    with open(target, "wb") as file:
        if ivf_of(trained) is None:
            _write_codes(file, trained, pieces, num_rows)
        else:
            file.write(serialised_without_rows(trained, num_rows)[: -len(_NO_LISTS)])
            _write_lists(file, [layers(piece)[-1].invlists for piece in pieces], leaf.code_size)
    return num_rows


# In memory


def _merge_in_memory(trained: Any, paths: Sequence[str], target: str) -> int:
    use_threads(1)
    merged, digest = clone_empty(trained), quantizer_digest(trained)
    for path in paths:
        _move(merged, read(path), digest, path)
    _clear_padding(merged)
    write(merged, target)
    return int(merged.ntotal)


def _move(into: Any, other: Any, digest: str, where: str = "merge") -> None:
    import faiss

    for index in (into, other):
        check_writable(index)
        if not is_mergeable(index):
            raise ConfigError(f"{describe(index)} cannot be merged", where="merge",
                              hint="search the shards side by side and merge their results")  # fmt: skip
    if digest != quantizer_digest(other):
        raise _not_trained_together(where)
    into.merge_from(other, 0) if isinstance(into, faiss.IndexIVF) else into.merge_from(other)


def _not_trained_together(where: str) -> ArtifactError:
    return ArtifactError("the two indexes were not trained together", where=where,
                         expected="shards that started from one trained index",
                         hint="add the rows again to copies of the trained index")  # fmt: skip


def _clear_padding(index: Any) -> None:
    """Zero the unused places of a fast-scan index's last blocks, which merging leaves as they were in memory."""
    import faiss

    leaf = layers(index)[-1]
    if isinstance(leaf, faiss.IndexFastScan):
        packer = leaf.get_CodePacker()
        _clear_block(packer, packer.block_size, leaf.ntotal, leaf.codes.get())
    elif isinstance(leaf, faiss.IndexIVFFastScan):
        lists = faiss.downcast_InvertedLists(leaf.invlists)
        for number in range(lists.nlist):
            _clear_block(lists.packer, lists.block_size, lists.list_size(number), lists.get_codes(number))


def _clear_block(packer: Any, block_bytes: int, num_rows: int, codes: Any) -> None:
    blocks, used = divmod(num_rows, packer.nvec)
    if used:
        last = _view(codes, (blocks + 1) * block_bytes)[blocks * block_bytes :].reshape(1, -1)
        nothing = np.zeros(packer.code_size, np.uint8)
        for place in range(used, packer.nvec):
            packer.pack_1(nothing, place, last)


# Inverted files. FAISS's own layout: "ilar", lists, bytes a code, then the sizes ("full": all of them, "sprs": pairs of
# list and size of those that hold rows) and for every list its codes and its ids.

_NO_LISTS = b"il00"


def _write_lists(file: IO[bytes], pieces: list[Any], code_size: int) -> None:
    num_lists = pieces[0].nlist
    size_PL = np.array([[lists.list_size(n) for n in range(num_lists)] for lists in pieces], np.uint64)
    size_L = size_PL.sum(axis=0)
    held = np.flatnonzero(size_L).astype(np.uint64)
    file.write(b"ilar" + _numbers(num_lists, code_size))
    if 2 * len(held) > num_lists:
        file.write(b"full" + _numbers(num_lists) + size_L.tobytes())
    else:
        file.write(b"sprs" + _numbers(2 * len(held)) + np.stack([held, size_L[held]], axis=1).tobytes())
    for number in held.tolist():
        mine = [(lists, int(size)) for lists, size in zip(pieces, size_PL[:, number], strict=True) if size]
        for lists, size in mine:
            file.write(_view(lists.get_codes(number), size * code_size).data)
        for lists, size in mine:
            file.write(_view(lists.get_ids(number), size).data)


# Flat codes under an id map: [header, codes, what else training decided, ids], codes and ids each after their count.


def _write_codes(file: IO[bytes], trained: Any, pieces: list[Any], num_rows: int) -> None:
    leaf = layers(trained)[-1]
    code_bytes = num_rows * leaf.code_size
    before, unit, between = _around_codes(trained, num_rows)
    file.write(before + _numbers(code_bytes // unit))
    for piece in pieces:
        codes = layers(piece)[-1].codes
        if codes.size():
            file.write(_view(codes.data(), codes.size()).data)
    file.write(between + _numbers(num_rows))
    for piece in pieces:
        if piece.ntotal:
            file.write(_view(piece.id_map.data(), piece.ntotal).data)


def _around_codes(trained: Any, num_rows: int) -> tuple[bytes, int, bytes]:
    """Return (bytes before the codes' count, bytes that it counts as one, bytes between codes and the ids' count).

    Seen in a small index of chance vectors: its codes, known, are found in its bytes.
    """
    import faiss

    model = clone_empty(trained)
    vectors = np.random.default_rng(0).standard_normal((_ROWS_OF_MODEL, model.d)).astype(np.float32)
    model.add_with_ids(vectors, np.arange(_ROWS_OF_MODEL))
    leaf = layers(model)[-1]
    codes = _view(leaf.codes.data(), leaf.codes.size()).tobytes()
    for layer in layers(model):
        layer.ntotal = num_rows
    whole = faiss.serialize_index(model).tobytes()
    start, end = whole.index(codes), len(whole) - 8 * (_ROWS_OF_MODEL + 1)
    counted = int.from_bytes(whole[start - 8 : start], "little")
    return whole[: start - 8], len(codes) // counted, whole[start + len(codes) : end]


def _numbers(*values: int) -> bytes:
    return np.array(values, np.uint64).tobytes()


def _view(pointer: Any, length: int) -> Array:
    import faiss

    view: Array = faiss.rev_swig_ptr(pointer, length)
    return view
