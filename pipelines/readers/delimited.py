"""Read TSV and CSV: the quoting of Python's csv module, with the exact byte span of every record.

Two things differ from csv's habits, because nothing may be lost in silence: a quote that is never closed costs its own
line only, not the rest of the file; and a bare carriage return outside quotes is a character like any other.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator

from pipelines.errors import InputError
from pipelines.readers.base import (
    ReadOptions,
    RefusedRowError,
    Reject,
    Row,
    cell_answers,
    checked_row,
    oversized,
    pick_columns,
    utf16,
)
from pipelines.readers.lines import ByteLines
from pipelines.readers.metadata import metadata_columns, typed

_DELIMITERS = {"tsv": "\t", "csv": ","}
_ONE_LINE = "only the line it is on is left out"
_BARE_RETURN = re.compile(r"\r(?!\n?\Z)")
# Stands for a bare carriage return while csv parses. No decoded text holds it: surrogateescape makes U+DC80 and above.
_RETURN_MARK = "\udc0d"


class DelimitedReader:
    """Rows of one TSV or CSV file. `read_head` must come first: the header decides what each column is."""

    def __init__(self, url: str, file_format: str, options: ReadOptions) -> None:
        self._url, self._options = url, options
        self._delimiter = _DELIMITERS[file_format]
        self._is_tsv = file_format == "tsv"
        # csv's limit on a field is one for the whole process, and smaller than the passages we accept.
        csv.field_size_limit(max(csv.field_size_limit(), options.max_row_bytes))

    def read_head(self, lines: ByteLines) -> int:
        """Read the header from the beginning of the file; return where the first record begins.

        Raises InputError when the file has no header or not the configured columns.
        """
        if lines.skip_bom() in (b"\xff\xfe", b"\xfe\xff"):
            raise utf16(self._url)
        header = next((fields for _, fields in self._records(lines, sys.maxsize)), None)
        if header is None:
            raise InputError("the file is empty", where=self._url, expected="a header row that names the columns")
        if isinstance(header, RefusedRowError):
            raise InputError(f"the header row cannot be read: {header.detail}", where=self._url,
                             expected="UTF-8 text with lines that end in a newline")  # fmt: skip
        self._check_separators(header)
        picked = pick_columns(header, self._options, self._url)
        at = {role: header.index(name) for role, name in picked.items()}
        self._header, self._num_fields = header, len(header)
        self._id_at, self._text_at = at["id"], at["text"]
        self._title_at, self._answers_at = at.get("title"), at.get("answers")
        columns = metadata_columns(header, self._options.metadata, self._url)
        self._metadata_at = [(field, header.index(name)) for field, name in columns]
        return lines.offset

    def _check_separators(self, header: list[str]) -> None:
        other = "csv" if self._is_tsv else "tsv"
        if len(header) == 1 and _DELIMITERS[other] in header[0]:
            raise InputError(f"the header row looks like {other}: {header[0][:100]!r}", where=self._url,
                             expected=f"columns separated by {self._delimiter!r}",
                             hint=f"set `format: {other}`")  # fmt: skip
        if any("\r" in name for name in header):
            raise InputError("lines end in a bare carriage return", where=self._url, expected="a newline, or both",
                             hint="convert it, for example with: tr '\\r' '\\n'")  # fmt: skip

    def check_sample(self, lines: ByteLines) -> bool:
        """Return whether ids must be made from positions: never, since the header has an id column."""
        return False

    def is_whole(self, line: bytes) -> bool:
        """Return whether a line by itself looks like a record: as many fields as the header, no quote left open."""
        try:
            fields = next(csv.reader([line.decode()], delimiter=self._delimiter, strict=True), [])
        except (UnicodeDecodeError, csv.Error):
            return False
        return len(fields) == self._num_fields

    def read(self, lines: ByteLines, stop: int) -> Iterator[Row | Reject]:
        """Yield the records that begin before `stop`; afterwards `lines` stands at the end of the last one."""
        for start, fields in self._records(lines, stop):
            try:
                if isinstance(fields, RefusedRowError):
                    raise fields
                yield self._row(start, fields)
            except RefusedRowError as refused:
                yield refused.reject(start, lines.marked())

    def _row(self, start: int, fields: list[str]) -> Row:
        if len(fields) != self._num_fields:
            raise RefusedRowError("wrong_field_count", f"{len(fields)} fields where the header has {self._num_fields}")
        if fields == self._header:
            raise RefusedRowError("malformed", "the header row again; files may have been joined together")
        text = fields[self._text_at]
        if self._is_tsv:
            text = text.strip('"').strip()  # as DPR reads psgs_w100.tsv, then as it encodes
        title = "" if self._title_at is None else fields[self._title_at]
        answers = None if self._answers_at is None else cell_answers(fields[self._answers_at])
        metadata = typed((field, fields[at] or None) for field, at in self._metadata_at)
        return checked_row(start, fields[self._id_at], title, text, answers, metadata)

    def _records(self, lines: ByteLines, stop: int) -> Iterator[tuple[int, list[str] | RefusedRowError]]:
        """Yield (start, fields or why not) of the records that begin before `stop`. Blank lines are no records.

        The span of a record depends on where it begins alone; that is what lets splits be chained together.
        """
        feed = _Feed(lines, self._options.max_row_bytes)
        parser = csv.reader(feed, delimiter=self._delimiter)
        while lines.offset < stop:
            start = feed.begin_record()
            try:
                fields = next(parser)
            except StopIteration:
                return
            except (RefusedRowError, csv.Error) as error:
                refused = error if isinstance(error, RefusedRowError) else RefusedRowError("malformed", str(error))
                yield start, refused
                lines.rewind(start)
                lines.skip_line()
                continue
            if feed.undecodable:
                yield start, RefusedRowError("undecodable", feed.undecodable)
            elif fields:
                yield start, [f.replace(_RETURN_MARK, "\r") for f in fields] if feed.has_bare_return else fields


class _Feed:
    """Hand csv.reader one line at a time, and know what it does not tell about the record it is in.

    It is asked for a second line of a record only while a quote is open: so it can tell when that goes on for too long.
    """

    def __init__(self, lines: ByteLines, max_row_bytes: int) -> None:
        self._lines, self._max_row_bytes = lines, max_row_bytes
        self.begin_record()

    def begin_record(self) -> int:
        self._start = self._lines.mark()
        self._num_lines = 0
        self.undecodable = ""
        self.has_bare_return = False
        return self._start

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        at = self._lines.offset
        line = self._lines.next()
        if not line:
            if self._num_lines:
                raise RefusedRowError("malformed", f"a quote is never closed; {_ONE_LINE}")
            raise StopIteration
        self._num_lines += 1
        if at + len(line) - self._start > self._max_row_bytes:
            why = f"a quote may be unclosed; {_ONE_LINE}" if self._num_lines > 1 else "it is one line"
            raise oversized(self._max_row_bytes, why)
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            # The bytes that mark fields and records are ASCII: bad bytes elsewhere leave the record's span in place.
            text = line.decode("utf-8", "surrogateescape")
            self.undecodable = self.undecodable or f"byte {line[error.start]:#04x} at {at + error.start} is not UTF-8"
        if "\r" in text and _BARE_RETURN.search(text):
            text = _BARE_RETURN.sub(_RETURN_MARK, text)
            self.has_bare_return = True
        return text
