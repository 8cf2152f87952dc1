"""Metadata of rows: which column or key holds each field, and its values as the type that was asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipelines.errors import InputError
from pipelines.readers.base import RefusedRowError, answer_list, cell_answers, wrong_metadata_column
from pipelines.schema import MetadataField

_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,20}\s*", re.ASCII)
_LEAST_INT, _MOST_INT = -(2**63), 2**63 - 1
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}
_EXPECTED = {
    "string": "a string",
    "int": "a whole number of 64 bits",
    "float": "a finite number",
    "bool": "true or false",
    "strings": "a list of strings",
}


class _MisfitError(Exception):
    """The value is not of the field's type."""


def metadata_columns(
    found: Sequence[str], fields: Sequence[MetadataField], where: str
) -> list[tuple[MetadataField, str]]:
    """Pair each field with its column among those `found`. Raises InputError for one that is absent or there twice."""
    for field in fields:
        if field.column not in found:
            raise wrong_metadata_column(field, found, where)
        if found.count(field.column) > 1:
            what = f"two columns are named {field.column!r}"
            raise InputError(what, where=where, expected=f"one column for metadata {field.name!r}")
    return [(field, field.column) for field in fields]


def check_types(schema: pa.Schema, fields: Sequence[MetadataField], where: str) -> None:
    """Raise InputError for a column of a Parquet file of which no value can fit its field's type, or that is absent."""
    for field, name in metadata_columns(schema.names, fields, where):
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not _may_fit(field.type, kind):
            better = next((other for other in ("int", "float", "bool", "strings") if _may_fit(other, kind)), None)
            raise InputError(
                f"column {name!r} holds {kind}, metadata {field.name!r} is of type {field.type}",
                where=where,
                expected=_EXPECTED[field.type],
                hint=f"set `metadata: [{{name: {field.name}, type: {better}}}]`" if better else "leave it out",
            )


def _may_fit(wanted: str, kind: pa.DataType) -> bool:
    types = pa.types
    is_text = any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view))
    is_number = types.is_integer(kind) or types.is_floating(kind)
    if types.is_null(kind):
        return True
    if wanted == "strings":
        is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        return is_text or (is_list and _may_fit("string", kind.value_type))
    if wanted == "string":
        return is_text or types.is_date(kind) or types.is_timestamp(kind)
    if wanted == "bool":
        return is_text or types.is_boolean(kind) or types.is_integer(kind)
    return is_text or is_number


def typed(values: Iterable[tuple[MetadataField, Any]]) -> dict[str, Any] | None:
    """Return each field's value as its type, None where it is absent; None when there are no fields.

    Raises RefusedRowError for a value that does not fit. Text that spells a number, a truth or a list is read as one,
    as cells of a table need; NaN, which tables write for a missing number, counts as absent.
    """
    result = {}
    for field, value in values:
        try:
            result[field.name] = None if value is None else _CONVERTERS[field.type](value)
        except (_MisfitError, RefusedRowError) as error:
            told = repr(value)
            told = told if len(told) <= 60 else told[:60] + "…"
            detail = f"metadata {field.name!r} is {told}; expected {_EXPECTED[field.type]}"
            raise RefusedRowError("bad_metadata", detail) from error
    return result or None


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise _MisfitError
    return value


def _int(value: Any) -> int | None:
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not _LEAST_INT <= value <= _MOST_INT:
        raise _MisfitError
    return value


def _float(value: Any) -> float | None:
    is_text = isinstance(value, str) and "_" not in value  # Python would read 1_0 as ten
    if not (is_text or isinstance(value, int | float)) or isinstance(value, bool):
        raise _MisfitError
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise _MisfitError from error
    if math.isinf(number):
        raise _MisfitError
    return None if math.isnan(number) else number


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    found = _TRUTHS.get(str(value).strip().lower()) if isinstance(value, str | int) else None
    if found is None:
        raise _MisfitError
    return found


def _strings(value: Any) -> list[str] | None:
    return cell_answers(value) if isinstance(value, str) else answer_list(value)


_CONVERTERS = {"string": _string, "int": _int, "float": _float, "bool": _bool, "strings": _strings}
