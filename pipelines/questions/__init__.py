"""PAQ's question generation: rank passages, extract answers, generate questions, filter them, group them.

Each step is a generator from lines to lines (dictionaries, in the shapes of PAQ's jsonl files), in batches and bounded
memory. This module reads and writes the files. Source of the shapes: Lewis et al. 2021 (PAQ) and its released files.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NoReturn, TypeVar

from pipelines.errors import ConfigError, InputError
from pipelines.json_records import put_whole
from pipelines.readers.base import ReadOptions
from pipelines.readers.files import format_of, open_text
from pipelines.readers.lines import LINE_BYTES, text_lines

__all__ = ["Line", "Lines", "Texts", "batches", "check_passage", "checked", "read_lines", "write_lines"]

Line = dict[str, Any]
_T = TypeVar("_T")
_HEADER = ["id", "text", "title"]
_ROW = "id, text and title, separated by tabs and quoted as in csv"


class Texts(Iterator[str]):
    """The physical lines of one UTF-8 file, newline included. where: the file and the line last read, for messages."""

    def __init__(self, url: str) -> None:
        self.url, self.number = url, 0
        self._source = self._read()

    @property
    def where(self) -> str:
        return f"{self.url}, line {self.number}"

    def __next__(self) -> str:
        return next(self._source)

    def refuse(self, what: str, expected: str = "") -> InputError:
        return InputError(what, where=self.where, expected=expected)

    def _read(self) -> Iterator[str]:
        with open_text(self.url) as stream:
            for text in text_lines(stream, self.url):
                self.number += 1
                yield text


class Lines(Iterator[Line]):
    """The lines of one file, parsed. where: the file and the line last read, for messages."""

    def __init__(self, url: str) -> None:
        reads = {"jsonl": self._json_lines, "tsv": self._rows}
        found = format_of(url, ReadOptions())
        if found not in reads:
            raise InputError(f"passages are not read from {found} here", where=url, expected=".jsonl or .tsv")
        self._texts = Texts(url)
        self._source = reads[found]()

    @property
    def where(self) -> str:
        return self._texts.where

    def __next__(self) -> Line:
        return next(self._source)

    def _json_lines(self) -> Iterator[Line]:
        for text in self._texts:
            if not text.strip():
                continue
            try:
                line = json.loads(text, parse_constant=_refuse_constant)
                # A lone surrogate is legal JSON and no text: no tokeniser takes it, no file holds it.
                if "\\u" in text:
                    json.dumps(line, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                raise self._texts.refuse(f"the line is no valid JSON: {error}", "one JSON object") from error
            if not isinstance(line, dict):
                raise self._texts.refuse(f"the line holds a {type(line).__name__}", "one JSON object")
            yield line

    def _rows(self) -> Iterator[Line]:
        """Yield passages from a TSV of id, text and title, csv-quoted, with or without that header."""
        csv.field_size_limit(max(csv.field_size_limit(), LINE_BYTES))  # one limit for the whole process
        # Strict, because a stray quote would otherwise join rows in silence.
        rows, first = csv.reader(self._texts, delimiter="\t", strict=True), True
        while True:
            where = f"{self._texts.url}, line {self._texts.number + 1}"  # where the row begins
            try:
                row = next(rows, None)
            except csv.Error as error:
                hint = "write a quote inside a quoted cell twice, or use JSON lines"
                raise InputError(f"the row cannot be read: {error}", where=where, expected=_ROW, hint=hint) from error
            if row is None:
                return
            if row and not (first and row == _HEADER):
                if len(row) != len(_HEADER):
                    raise InputError(f"the row has {len(row)} fields", where=where, expected=_ROW)
                yield {"passage_id": row[0], "passage": row[1], "metadata": {"title": row[2]}}
            first = False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not part of JSON")


def read_lines(url: str) -> Lines:
    """Open a .jsonl or .tsv file (also compressed; local, s3://, https://).

    Raises InputError for a file that is absent or of another kind; iterating does so for a bad line, with its number.
    """
    return Lines(url)


def write_lines(url: str, lines: Iterable[Line]) -> int:
    """Write JSON lines to `url` (local or any fsspec URL), whole or not at all. Returns their number.

    They stream through a temporary file, on the disk of the target where that is local, compressed as the name says. A
    line is written as PAQ's are: ASCII, other characters escaped. Raises InputError for a number that is not finite.
    """
    count = 0

    def fill(stream: BinaryIO) -> None:
        nonlocal count
        for line in lines:
            count += 1
            try:
                text = json.dumps(line, allow_nan=False)
            except ValueError as error:
                what, where = f"the line cannot be written: {error}", f"{url}, line {count}"
                raise InputError(what, where=where, expected="finite numbers") from error
            stream.write(f"{text}\n".encode("ascii"))

    put_whole(url, fill)
    return count


def checked(lines: Iterable[Line], check: Callable[[Line], str | None]) -> Iterator[Line]:
    """Yield the lines. Raises InputError, with file and line, for the first one that `check` has a complaint about."""
    for number, line in enumerate(lines, start=1):
        if complaint := check(line):
            raise InputError(complaint, where=getattr(lines, "where", f"line {number}"))
        yield line


def check_passage(line: Line) -> str | None:
    """Return what is wrong with a passage's line, or None."""
    if not isinstance(line.get("passage_id"), str | int):
        return "the line has no passage_id"
    if not isinstance(line.get("passage"), str):
        return "the line has no passage, or it is no text"
    metadata = line.get("metadata", {})
    if not isinstance(metadata, dict) or not isinstance(metadata.get("title", ""), str):
        return "metadata is no object, or its title is no text"
    return None


def batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Yield the items in lists of `size`, the last one shorter. Raises ConfigError for a size below 1."""
    if size < 1:
        raise ConfigError(f"batch_size is {size}", expected="1 or more")
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch
