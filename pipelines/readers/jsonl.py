"""Read JSON lines: passages under their own keys, or QA pairs as PAQ and NQ-open write them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from pipelines.errors import InputError
from pipelines.readers.base import (
    REQUIRED,
    ReadOptions,
    RefusedRowError,
    Reject,
    Row,
    answer_list,
    checked_row,
    is_miscased,
    json_type,
    nearest,
    oversized,
    utf16,
    wrong_column,
    wrong_metadata_column,
)
from pipelines.readers.files import stem_of
from pipelines.readers.lines import ByteLines
from pipelines.readers.metadata import typed

_SAMPLE_ROWS = 100
_ABSENT = object()


class JsonLinesReader:
    """Rows of one JSON lines file.

    An object that has the text key is a passage. Else `{"question": ..., "answer": [...]}` is a QA pair (unless the
    options name another text key): its text is the question, and without an id it is called `<file stem>:<offset>`,
    which is the same however the file is split or compressed, and unique among files of different stems.
    A key such as `metadata.title` looks into nested objects.
    """

    def __init__(self, url: str, options: ReadOptions) -> None:
        self._url, self._options = url, options
        self._stem = stem_of(url)
        self._key = {role: options.column(role) for role in ("id", "title", "text", "answers")}
        self._may_be_pair = "text" not in options.columns

    def read_head(self, lines: ByteLines) -> int:
        """Skip a byte order mark; return where the first line begins. Raises InputError for UTF-16 and JSON arrays."""
        start = lines.skip_bom()
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise utf16(self._url)
        if start.startswith(b"["):
            raise InputError("the file is one JSON array", where=self._url, expected="JSON lines: one object a line",
                             hint="convert it, for example with: jq -c '.[]'")  # fmt: skip
        return lines.offset

    def check_sample(self, lines: ByteLines) -> bool:
        """Look at the first rows, so that a wrong key fails before any work; return whether ids must be made.

        Raises InputError when none of them has the required keys.
        """
        objects = list(self._sample(lines))
        found = list(dict.fromkeys(key for item in objects for key in item))
        passages = [item for item in objects if _look_up(item, self._key["text"]) is not _ABSENT]
        pairs = [item for item in objects if self._may_be_pair and "question" in item] if not passages else []
        has = {role: any(_look_up(i, key) is not _ABSENT for i in objects) for role, key in self._key.items()}
        if objects and not passages and not pairs:
            raise wrong_column("text", found, self._options, self._url)
        for role, key in self._key.items():
            if not objects or not key or has[role]:
                continue
            named = role in self._options.columns
            # A key that only some rows have may be absent from all of these, so an optional one is let pass when no
            # other key looks like it.
            required = role in REQUIRED and (named or bool(passages))
            if required or (named and nearest(key, found)) or is_miscased(key, found):
                raise wrong_column(role, found, self._options, self._url)
        for field in self._options.metadata:
            if nearest(field.column, found) and all(_look_up(i, field.column) is _ABSENT for i in objects):
                raise wrong_metadata_column(field, found, self._url)
        return bool(pairs) and any(_look_up(item, self._key["id"]) is _ABSENT for item in pairs)

    def _sample(self, lines: ByteLines) -> Iterator[dict[str, Any]]:
        for _ in range(_SAMPLE_ROWS):
            lines.mark()
            line = lines.next()
            if not line or len(line) > self._options.max_row_bytes:
                return
            try:
                yield _parsed(line)
            except RefusedRowError:
                continue

    def is_whole(self, line: bytes) -> bool:
        """Return True: JSON text has no newline inside, so every line is a record."""
        return True

    def read(self, lines: ByteLines, stop: int) -> Iterator[Row | Reject]:
        """Yield the rows of the lines that begin before `stop`; afterwards `lines` stands after the last one."""
        limit = self._options.max_row_bytes
        while lines.offset < stop:
            start = lines.mark()
            line = lines.next()
            if not line:
                return
            if len(line) > limit:
                yield oversized(limit, "it is one line").reject(start, line)
                lines.rewind(start)
                lines.skip_line()
            elif not line.isspace():
                try:
                    yield self._row(start, _parsed(line, start))
                except RefusedRowError as refused:
                    yield refused.reject(start, line)

    def _row(self, start: int, item: dict[str, Any]) -> Row:
        text = _look_up(item, self._key["text"])
        answers = _look_up(item, self._key["answers"])
        row_id = _look_up(item, self._key["id"])
        if text is _ABSENT and self._may_be_pair and "question" in item:
            text = item["question"]
            answers = item["answer"] if answers is _ABSENT and "answer" in item else answers
            if row_id is _ABSENT and "id" not in self._options.columns:
                row_id = f"{self._stem}:{start}"
        return checked_row(
            start, _id(row_id), _string("title", _look_up(item, self._key["title"])), _string("text", text),
            answer_list(None if answers is _ABSENT else answers), self._metadata(item),
        )  # fmt: skip

    def _metadata(self, item: dict[str, Any]) -> dict[str, Any] | None:
        found = ((field, _look_up(item, field.column)) for field in self._options.metadata)
        return typed((field, None if value is _ABSENT else value) for field, value in found)


def _parsed(line: bytes, start: int = 0) -> dict[str, Any]:
    try:
        text = line.decode()
        item = json.loads(text)
        if "\\u" in text:
            # JSON can spell half a surrogate pair, which no UTF-8 file can hold afterwards.
            json.dumps(item, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise RefusedRowError("undecodable", f"byte {line[error.start]:#04x} at {at} is not UTF-8") from error
    except UnicodeEncodeError as error:
        raise RefusedRowError("malformed", "a string holds half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise RefusedRowError("malformed", f"not JSON: {error}") from error
    if not isinstance(item, dict):
        raise RefusedRowError("malformed", f"expected an object, not {json_type(item)}")
    return item


def _look_up(item: dict[str, Any], key: str) -> Any:
    """Return the value of `key`, or of the path `a.b` through nested objects, or _ABSENT."""
    if key in item:
        return item[key]
    value: Any = item
    for piece in key.split(".") if "." in key else ():
        value = value.get(piece, _ABSENT) if isinstance(value, dict) else _ABSENT
    return _ABSENT if value is item else value


def _id(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return _string("id", value)


def _string(role: str, value: Any) -> str:
    if value is _ABSENT or value is None:
        return ""
    if isinstance(value, str):
        return value
    raise RefusedRowError("malformed", f"the {role} must be a string, not {json_type(value)}")
