"""Filters on metadata: a small JSON language, checked against a version's fields, answered as a mask over its rows.

    {"lang": "en"}                          equal; of a list of strings: holds this one
    {"lang": {"in": ["en", "fr"]}}          one of them
    {"year": {"gte": 1990, "lt": 2000}}     lt, lte, gt, gte; strings compare by their characters' code points
    {"doi": {"exists": true}}               has a value, or with false has none
    {"any": [{"lang": "en"}, {"year": {"lt": 1900}}]}     at least one of these filters

All conditions of an object have to hold. A passage without the field satisfies no condition on it but
`{"exists": false}`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import ConfigError, nearest
from pipelines.schema import METADATA, METADATA_TYPES

Mask = npt.NDArray[np.bool_]

_ANY = "any"
_COMPARE = {"eq": pc.equal, "lt": pc.less, "lte": pc.less_equal, "gt": pc.greater, "gte": pc.greater_equal}
_OPERATIONS = {
    **dict.fromkeys(("string", "int", "float"), ("eq", "in", "lt", "lte", "gt", "gte", "exists")),
    **dict.fromkeys(("bool", "strings"), ("eq", "in", "exists")),
}
_EXPECTED = {
    **dict.fromkeys(("string", "strings"), "a string"),
    "bool": "true or false",
    "int": "a whole number of 64 bits",
    "float": "a finite number",
}
_MOST_TERMS, _MOST_VALUES, _MOST_CHARS, _DEEPEST = 64, 10_000, 500_000, 4
_LONGEST_NAME = 100  # of a field, as configs take it
_LEAST_INT, _MOST_INT = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Condition:
    """One comparison: `values` has one value, or for `in` any number of them."""

    field: str
    type: str
    operation: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class AnyOf:
    filters: tuple[Filter, ...]


@dataclass(frozen=True)
class Filter:
    """A checked filter: all terms have to hold. It hashes and pickles, so that it keys a batch and goes to a shard."""

    terms: tuple[Condition | AnyOf, ...]

    @cached_property
    def digest(self) -> bytes:
        """Return what stands for this filter in a cache: as short for a filter of many long values as for any other."""
        return hashlib.sha256(repr(self.terms).encode()).digest()


def fields_of(schema: pa.Schema) -> dict[str, str]:
    """Return the metadata fields of passages, each with its type as a config calls it."""
    if METADATA not in schema.names:
        return {}
    word_of = {kind: word for word, kind in METADATA_TYPES.items()}
    return {field.name: word_of[field.type] for field in schema.field(METADATA).type}


def parse_filter(content: Any, fields: Mapping[str, str]) -> Filter | None:
    """Check a filter (decoded JSON) against the `fields` of a version; None for an empty one, which lets all pass.

    Raises ConfigError naming the known fields and the nearest, the operations of a field's type, or the type expected.
    """
    parsed = _Parser(fields).filter(content, 0)
    return parsed if parsed.terms else None


class _Parser:
    """Read one filter, and count what it holds: a request may not make the server work without bound."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = fields
        self.num_terms = self.num_values = self.num_chars = 0

    def filter(self, content: Any, depth: int) -> Filter:
        if not isinstance(content, dict):
            raise _refused(f"it holds {_shown(content)}", "an object of conditions")
        if depth > _DEEPEST:
            raise _refused("`any` is nested too deeply", f"at most {_DEEPEST} levels")
        self._count(terms=max(1, len(content)))  # an empty one is work, too
        terms: list[Condition | AnyOf] = []
        for name, wanted in content.items():
            terms += [self._any(wanted, depth)] if name == _ANY else self._conditions(name, wanted)
        return Filter(tuple(terms))

    def _count(self, terms: int = 0, values: int = 0, chars: int = 0) -> None:
        """Count what is about to be read. Raises ConfigError when that makes too much."""
        self.num_terms, self.num_values = self.num_terms + terms, self.num_values + values
        self.num_chars += chars
        if self.num_terms > _MOST_TERMS or self.num_values > _MOST_VALUES or self.num_chars > _MOST_CHARS:
            most = f"{_MOST_TERMS} conditions, {_MOST_VALUES:,} values and {_MOST_CHARS:,} characters in them"
            raise _refused("it is too long", f"at most {most}")

    def _any(self, content: Any, depth: int) -> AnyOf:
        if not isinstance(content, list) or not content:
            raise _refused(f"`any` is {_shown(content)}", "a list of filters, one or more")
        return AnyOf(tuple(self.filter(item, depth + 1) for item in content))

    def _conditions(self, name: str, wanted: Any) -> list[Condition]:
        if name not in self.fields:
            raise _unknown(name, self.fields)
        operations = wanted if isinstance(wanted, dict) else {"eq": wanted}
        kind = self.fields[name]
        if not operations or not set(operations) <= set(_OPERATIONS[kind]):
            wrong = next((o for o in operations if o not in _OPERATIONS[kind]), "{}")
            what = f"{_shown(wrong)} is no operation on {name!r} ({kind})"
            raise _refused(what, "one of " + ", ".join(_OPERATIONS[kind]))
        return [Condition(name, kind, o, self._values(name, kind, o, value)) for o, value in operations.items()]

    def _values(self, name: str, kind: str, operation: str, value: Any) -> tuple[Any, ...]:
        if operation == "exists":
            kind = "bool"
        if operation == "in" and not isinstance(value, list):
            raise _refused(f"`in` of {name!r} is {_shown(value)}", "a list of values")
        values = value if operation == "in" else [value]
        self._count(values=len(values), chars=sum(len(v) for v in values if isinstance(v, str)))
        return tuple(_checked(name, kind, v) for v in values)


def _checked(name: str, kind: str, value: Any) -> Any:
    """Return a value as the type of its field. Raises ConfigError when it is of another."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("string", "strings") and isinstance(value, str):
        if value.isascii() or not any(0xD800 <= ord(c) < 0xE000 for c in value):
            return value
    elif kind == "bool" and isinstance(value, bool):
        return value
    elif kind == "int" and is_number and value == value // 1 and _LEAST_INT <= value <= _MOST_INT:
        return int(value)
    elif kind == "float" and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    raise _refused(f"{name!r} is compared with {_shown(value)}", _EXPECTED[kind])


def _unknown(name: str, fields: Mapping[str, str]) -> ConfigError:
    if not fields:
        hint = "list fields under corpus.metadata in the config, and build a version from it"
        return ConfigError("this version carries no metadata to filter by", where="filter", hint=hint)
    guess = nearest(name[:_LONGEST_NAME], fields)
    what = f"the filter names an unknown field {_shown(name)}" + (f"; did you mean {guess!r}?" if guess else "")
    return ConfigError(what, where="filter", expected="one of " + ", ".join(f"{n} ({t})" for n, t in fields.items()))


def _refused(what: str, expected: str) -> ConfigError:
    return ConfigError(f"the filter is not valid: {what}", where="filter", expected=expected)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def mask(where: Filter, passages: pa.Table) -> Mask:
    """Return (N,) bool: which of a version's or shard's passages satisfy the filter. Reads the metadata alone."""
    # Without metadata there are filters that name no field, such as {"any": [{}]}: any column tells how many rows.
    column = passages.column(METADATA if METADATA in passages.column_names else 0)
    pieces = [_all_hold(where, chunk) for chunk in column.chunks]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.bool_)


def _all_hold(where: Filter, rows: pa.Array) -> Mask:
    result = np.ones(len(rows), np.bool_)
    for term in where.terms:
        if isinstance(term, Condition):
            result &= _holds(term, pc.struct_field(rows, [rows.type.get_field_index(term.field)]))
        else:
            result &= np.logical_or.reduce([_all_hold(other, rows) for other in term.filters])
    return result


def _holds(condition: Condition, column: pa.Array) -> Mask:
    if condition.operation == "exists":
        found = pc.is_valid(column) if condition.values[0] else pc.is_null(column)
    elif condition.type == "strings":
        return _some_in(column, condition.values)
    elif condition.operation == "in":
        found = pc.is_in(column, pa.array(condition.values, column.type))
    else:
        found = _COMPARE[condition.operation](column, pa.scalar(condition.values[0], column.type))
    result: Mask = pc.fill_null(found, False).to_numpy(zero_copy_only=False)
    return result


def _some_in(lists: pa.ListArray, values: tuple[str, ...]) -> Mask:
    """Return which lists hold one of the values."""
    result = np.zeros(len(lists), np.bool_)
    item = pc.is_in(pc.list_flatten(lists), pa.array(values, pa.string())).to_numpy(zero_copy_only=False)
    result[pc.list_parent_indices(lists).to_numpy()[item]] = True
    return result
