"""Read Parquet by row groups: only the needed columns, a batch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import InputError, PinakesError
from pipelines.readers.base import (
    ReadOptions,
    RefusedRowError,
    Reject,
    Row,
    Split,
    answer_list,
    cell_answers,
    checked_row,
    oversized,
    pick_columns,
)
from pipelines.readers.files import open_text
from pipelines.readers.metadata import check_types, metadata_columns, typed
from pipelines.schema import MetadataField

_BATCH_ROWS = 2048
_COLUMN_BUFFER_BYTES = 4 << 20


def plan_row_groups(url: str, options: ReadOptions) -> list[tuple[int, int]]:
    """Cut a file into ranges of row groups of about `split_bytes` (as they are once decompressed).

    Raises InputError when it is no Parquet file or a column is absent or of a type that cannot be meant.
    """
    with _open_parquet(url) as file:
        _check_columns(file.schema_arrow, options, url)
        check_types(file.schema_arrow, options.metadata, url)
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    ranges: list[tuple[int, int]] = []
    start = taken = 0
    for i, size in enumerate(sizes):
        if i > start and taken + size > options.split_bytes:
            ranges.append((start, i))
            start, taken = i, 0
        taken += size
    return [*ranges, (start, len(sizes))]


def read_row_groups(split: Split, options: ReadOptions) -> Iterator[Row | Reject]:
    """Yield the rows of a split in file order. Memory: one batch and a buffer for each column."""
    with _open_parquet(split.url) as file:
        columns = _check_columns(file.schema_arrow, options, split.url)
        facts = metadata_columns(file.schema_arrow.names, options.metadata, split.url)
        position = sum(file.metadata.row_group(i).num_rows for i in range(split.start))
        wanted = list(dict.fromkeys([*columns.values(), *(name for _, name in facts)]))
        for batch in file.iter_batches(_BATCH_ROWS, list(range(split.start, split.stop)), wanted, use_threads=False):
            values = {name: _values(batch.column(name)) for name in wanted}
            for i in range(batch.num_rows):
                cells = {role: values[name][i] for role, name in columns.items()}
                yield _row(position + i, cells, [(field, values[name][i]) for field, name in facts], options)
            position += batch.num_rows


def _row(
    position: int, cells: dict[str, Any], facts: list[tuple[MetadataField, Any]], options: ReadOptions
) -> Row | Reject:
    try:
        row_id, title, text = (_text(role, cells.get(role)) for role in ("id", "title", "text"))
        if 4 * len(text) > options.max_row_bytes and len(text.encode()) > options.max_row_bytes:
            raise oversized(options.max_row_bytes, "counting its text")
        return checked_row(position, row_id, title, text, _answers(cells.get("answers")), typed(facts))
    except RefusedRowError as refused:
        text = cells["text"]
        return refused.reject(position, text if isinstance(text, str | bytes) else "")


def _text(role: str, value: object) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            detail = f"byte {value[error.start]:#04x} at {error.start} of the {role} is not UTF-8"
            raise RefusedRowError("undecodable", detail) from error
    return "" if value is None else str(value)


def _answers(value: object) -> list[str] | None:
    if isinstance(value, list):
        return answer_list([_text("answers", v) if isinstance(v, bytes) else v for v in value])
    return None if value is None else cell_answers(_text("answers", value))


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        column = column.cast(pa.string())  # 2026-11-26 09:30:00: texts that sort as the times do
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # Arrow takes a writer's word for it that strings are UTF-8
        binary = pa.list_(pa.large_binary()) if _is_list(column.type) else pa.large_binary()
        values = column.cast(binary).to_pylist()
    return values


def _check_columns(schema: pa.Schema, options: ReadOptions, url: str) -> dict[str, str]:
    """Return each role's column, checked for its type."""
    columns = pick_columns(schema.names, options, url)
    for role, name in columns.items():
        kind = schema.field(name).type
        fits = _is_text(kind) or (role == "id" and pa.types.is_integer(kind))
        if role == "answers" and _is_list(kind):
            fits = _is_text(kind.value_type)
        if not fits:
            wanted = {"id": "strings or integers", "answers": "lists of strings, or strings"}.get(role, "strings")
            raise InputError(f"column {name!r} holds {kind}", where=url, expected=f"{wanted} for the {role}")
    return columns


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
              types.is_binary_view, types.is_fixed_size_binary, types.is_null)  # fmt: skip
    return any(check(kind) for check in checks)


@contextlib.contextmanager
def _open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    try:
        with open_text(url, compressed=False) as stream:
            yield pq.ParquetFile(stream, buffer_size=_COLUMN_BUFFER_BYTES, pre_buffer=False)
    except PinakesError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"not a Parquet file, or a damaged one: {error}", where=url) from error
