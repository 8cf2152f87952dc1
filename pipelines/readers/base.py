"""What every corpus reader shares: its options, its units of work, its two kinds of output, and its messages."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.errors import ConfigError, InputError, nearest
from pipelines.schema import MetadataField

FORMATS = ("tsv", "csv", "jsonl", "parquet", "images")
ROLES = ("id", "title", "text", "answers")
REQUIRED = ("id", "text")
_SNIPPET_CHARACTERS = 200


@dataclass(frozen=True)
class ReadOptions:
    """How to read the sources.

    format: one of FORMATS, or auto: from each file's name, looking through .gz, .bz2, .xz and .zst.
    columns: the column (or key) that holds the `id`, `title`, `text` and `answers`; each is by default the one of that
    name. An empty name says that there is no such column (title and answers only).
    max_row_bytes: a longer row is refused. split_bytes: how much of a file one split reads.
    metadata: further columns (or keys) that every row carries along.
    Raises ConfigError for values that cannot be meant (the format is checked when files are planned).
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    max_row_bytes: int = 1 << 20
    split_bytes: int = 64 << 20
    metadata: tuple[MetadataField, ...] = ()

    def __post_init__(self) -> None:
        for role, name in self.columns.items():
            if role not in ROLES:
                raise ConfigError(f"unknown key {role!r} in columns", expected=", ".join(ROLES))
            if not name and role in REQUIRED:
                raise ConfigError(f"columns: {role} is empty", expected=f"the name of the column that holds the {role}")
        if self.max_row_bytes < 1 or self.split_bytes < 1:
            raise ConfigError("max_row_bytes and split_bytes must be at least 1")

    def column(self, role: str) -> str:
        """Return the name of the column that plays `role`; empty when there is none."""
        return self.columns.get(role, role)


@dataclass(frozen=True)
class Split:
    """One unit of reading. It depends on the files and the options only, never on the workers.

    start, stop: bytes of a text file; row groups of a Parquet file; (0, -1), the whole, for compressed text; (0, their
    number) for images. files: of a split of images, the (name, version) of each; `url` is the folder they are named in.
    """

    index: int
    url: str
    format: str
    start: int
    stop: int
    files: tuple[tuple[str, str], ...] = ()

    def versions(self) -> list[list[str]]:
        """Return the [URL, version] of every image of the split."""
        return [[self.url + name, version] for name, version in self.files]


@dataclass(frozen=True, slots=True)
class Row:
    """One valid row. position: its byte offset in the (decompressed) text file, or its number in the Parquet file.

    image: the bytes of the image file that the row is; None for a row of text.
    metadata: the configured fields, each of its type or None; None where no field is configured.
    """

    position: int
    id: str
    title: str
    text: str
    answers: list[str] | None
    image: bytes | None = None
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """One refused row: `reason` is one of `schema.REASONS`, `snippet` is how the row begins.

    source: the file, where a split reads several; else the split says it.
    """

    position: int
    reason: str
    detail: str
    snippet: str
    source: str = ""


class RefusedRowError(Exception):
    """Why a row is refused, on its way from the code that found out to the code that knows where the row is."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def reject(self, position: int, start: bytes | str) -> Reject:
        text = start if isinstance(start, str) else start[: 4 * _SNIPPET_CHARACTERS].decode("utf-8", "replace")
        return Reject(position, self.reason, self.detail, text[:_SNIPPET_CHARACTERS])


def oversized(max_row_bytes: int, more: str) -> RefusedRowError:
    return RefusedRowError("oversized_row", f"longer than {max_row_bytes} bytes (max_row_bytes); {more}")


def checked_row(
    position: int,
    row_id: str,
    title: str,
    text: str,
    answers: list[str] | None,
    metadata: dict[str, Any] | None = None,
) -> Row:
    """Return the row. Raises RefusedRowError when the id or the text is missing or blank."""
    if not row_id or row_id.isspace():
        raise RefusedRowError("missing_id", "the id is empty")
    if not text or text.isspace():
        raise RefusedRowError("missing_text", "the text is empty")
    return Row(position, row_id, title, text, answers, None, metadata)


def cell_answers(cell: str) -> list[str] | None:
    """Return the answers written in one cell: a JSON list, a Python list (as in DPR's files), else the cell itself."""
    cell = cell.strip()
    if not cell:
        return None
    if cell.startswith("["):
        value = _parsed_list(cell)
        if isinstance(value, list):
            return answer_list(value)
    return [cell]


def _parsed_list(cell: str) -> object:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an answer such as '\d' is an odd escape to Python, and no fault to us
            return ast.literal_eval(cell)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def answer_list(value: object) -> list[str] | None:
    """Return answers as a list of strings, or None. Raises RefusedRowError for anything but strings and numbers."""
    if value is None or isinstance(value, str):
        return value if value is None else [value]
    if isinstance(value, list) and all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in value):
        return [v if isinstance(v, str) else str(v) for v in value]
    raise RefusedRowError("malformed", f"answers must be a list of strings, not {json_type(value)}")


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list holding other things", bool: "a boolean", str: "a string"}
    return names.get(type(value), "null" if value is None else "a number")


def pick_columns(found: Sequence[str], options: ReadOptions, where: str) -> dict[str, str]:
    """Map each role to its column among those `found`; title and answers may be absent.

    Raises InputError when a column is absent that is required, was named in the options, or is there in another case;
    and when a name occurs twice.
    """
    picked = {}
    for role in ROLES:
        name = options.column(role)
        if found.count(name) > 1:
            raise InputError(f"two columns are named {name!r}", where=where, expected=f"one column for the {role}")
        if name in found:
            picked[role] = name
        elif name and (role in REQUIRED or role in options.columns or is_miscased(name, found)):
            raise wrong_column(role, found, options, where)
    return picked


def is_miscased(name: str, found: Iterable[str]) -> bool:
    return any(other != name and other.casefold() == name.casefold() for other in found)


def utf16(where: str) -> InputError:
    return InputError("the file is UTF-16", where=where, expected="UTF-8", hint="convert it, for example with iconv")


def wrong_column(role: str, found: Sequence[str], options: ReadOptions, where: str) -> InputError:
    guess = nearest(options.column(role), [f for f in found if f not in {options.column(r) for r in ROLES}])
    hint = f"say which one holds the {role} with `columns: {{{role}: {guess or '...'}}}`"
    return _no_column(options.column(role), f"the {role}", found, where, guess, hint)


def wrong_metadata_column(field: MetadataField, found: Sequence[str], where: str) -> InputError:
    guess = nearest(field.column, found)
    hint = f"say which one it is with `metadata: [{{name: {field.name}, column: {guess or '...'}}}]`"
    return _no_column(field.column, f"metadata {field.name!r}", found, where, guess, hint)


def _no_column(name: str, what: str, found: Sequence[str], where: str, guess: str | None, hint: str) -> InputError:
    listed = ", ".join(repr(f[:60]) for f in found[:30]) + (" ..." if len(found) > 30 else "")
    return InputError(f"wrong column: no {name!r} for {what}", where=where,
                      expected=f"{name!r} among the columns; found {listed or 'none'}",
                      hint=(f"did you mean {guess!r}? " if guess else "") + hint)  # fmt: skip
