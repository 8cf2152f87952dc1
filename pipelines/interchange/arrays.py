"""`.npy` arrays with ids beside them, and Parquet with an id and a vector column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError

Array = npt.NDArray[Any]

_ROWS_IN_BLOCK = 16_384
_EXPECTED_NPY = "a float array of shape (N, D), as numpy.save writes it"
_EXPECTED_PARQUET = "Parquet with the columns id and vector (lists of floats, all of one length)"


def read_npy(path: str) -> Iterator[tuple[None, Array]]:
    """Yield (None, vectors (N, D) float) of a `.npy` file, block by block, mapped from the disk.

    Raises InputError when it is damaged, holds objects (which would be a pickle), or no two-dimensional floats.
    """
    array = _load(path, _EXPECTED_NPY)
    if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"the array is {array.dtype} of shape {array.shape}", where=path, expected=_EXPECTED_NPY)
    for start in range(0, len(array), _ROWS_IN_BLOCK):
        yield None, np.asarray(array[start : start + _ROWS_IN_BLOCK])


def _load(path: str, expected: str) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError, TypeError, MemoryError) as error:
        hint = "save it again by numpy.save, from an array of numbers"
        raise InputError(f"the array cannot be read: {error}", where=path, expected=expected, hint=hint) from error
    return array


def read_vector_parquet(path: str) -> Iterator[tuple[list[str], Array]]:
    """Yield (ids, vectors (N, D) float) of a Parquet file's columns `id` and `vector`, batch by batch.

    Raises InputError when it is damaged, lacks a column, or a vector is null or of another length.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            missing = [name for name in ("id", "vector") if name not in parquet.schema_arrow.names]
            if missing:
                found = f"found {', '.join(parquet.schema_arrow.names)}"
                raise InputError(f"no column {missing[0]!r}, {found}", where=path, expected=_EXPECTED_PARQUET)
            for batch in parquet.iter_batches(_ROWS_IN_BLOCK, columns=["id", "vector"]):
                yield _ids_of(batch.column("id"), path), _vectors_of(batch.column("vector"), path)
    except (pa.ArrowException, OSError) as error:
        hint = "copy or write it again"
        raise InputError(
            f"the file cannot be read: {error}", where=path, expected=_EXPECTED_PARQUET, hint=hint
        ) from error


def _ids_of(column: pa.Array, path: str) -> list[str]:
    kind = column.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if column.null_count or not (text or pa.types.is_integer(kind)):
        raise InputError(f"the ids are {kind}, or one is null", where=path, expected="strings or whole numbers")
    return [str(value) for value in column.to_pylist()]


def _vectors_of(column: pa.Array, path: str) -> Array:
    kind = column.type
    fixed = pa.types.is_fixed_size_list(kind)
    if not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise InputError(f"the vectors are {kind}", where=path, expected=_EXPECTED_PARQUET)
    values = column.flatten()
    if column.null_count or values.null_count or not pa.types.is_floating(kind.value_type):
        raise InputError(f"the vectors are {kind}, or one is null", where=path, expected=_EXPECTED_PARQUET)
    if not fixed and len(np.unique(np.diff(column.offsets.to_numpy()))) > 1:
        raise InputError("the vectors have different lengths", where=path, expected=_EXPECTED_PARQUET)
    flat: Array = np.asarray(values.to_numpy(zero_copy_only=False))
    return flat.reshape(len(column), -1)


def read_ids(path: str) -> Iterator[str]:
    """Yield the ids of a file, in order: .txt (one a line), .jsonl (strings, numbers or objects with `id`), .npy.

    Raises InputError for another kind of file and for a line that holds no id.
    """
    if path.endswith(".npy"):
        array = _load(path, "an array of strings or whole numbers")
        if array.ndim != 1 or array.dtype.kind not in "Uiu":
            found = f"the ids are {array.dtype} of shape {array.shape}"
            raise InputError(found, where=path, expected="one dimension of strings or whole numbers")
        for start in range(0, len(array), _ROWS_IN_BLOCK):
            yield from map(str, array[start : start + _ROWS_IN_BLOCK].tolist())
        return
    if not path.endswith((".txt", ".jsonl")):
        raise InputError("ids are not read from this kind of file", where=path, expected=".txt, .jsonl or .npy")
    read = _json_id if path.endswith(".jsonl") else _text_id
    try:
        # Only \n ends a line: an id may hold what str.splitlines would cut at.
        with open(path, encoding="utf-8", newline="\n") as handle:
            for number, line in enumerate(handle, start=1):
                yield read(line, f"{path}, line {number}")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"the ids cannot be read: {error}", where=path, expected="UTF-8 text") from error


def _text_id(line: str, where: str) -> str:
    identity = line.removesuffix("\n").removesuffix("\r")
    if not identity:
        raise InputError("the line is empty", where=where, expected="one id a line")
    return identity


def _json_id(line: str, where: str) -> str:
    expected = 'a string, a whole number, or an object with one of them under "id"'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the line is no valid JSON: {error}", where=where, expected=expected) from error
    value = value.get("id") if isinstance(value, dict) else value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError("the line holds no id", where=where, expected=expected)
    return str(value)
