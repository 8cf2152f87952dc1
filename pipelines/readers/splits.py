"""Cut the sources into splits, read them in parallel, and prove that every record was read exactly once.

Where a record begins cannot be known from the middle of a TSV or CSV file, because a quoted field may hold newlines. So
a split's reader guesses its first record, and reads every record that begins before the split's `stop`, the last one to
its end. Afterwards the guesses are checked: the first record of each split must begin where the last one of the split
before it ended. A split that guessed wrong is read again from there. The first split of a file needs no guess, and the
records of a split follow from where it begins; so once the whole chain holds, the rows are those of a reader that went
through the file from beginning to end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import BinaryIO

from pipelines.errors import InputError
from pipelines.readers.base import ReadOptions, Reject, Row, Split
from pipelines.readers.delimited import DelimitedReader
from pipelines.readers.files import check_ranges, compression_of, format_of, open_text, size_of, stem_of
from pipelines.readers.jsonl import JsonLinesReader
from pipelines.readers.lines import ByteLines
from pipelines.readers.sources import expand

Span = tuple[int, int]
_PLANNING_THREADS = 16
_GUESS_WINDOW_BYTES = 1 << 20


def plan_splits(sources: str | Sequence[str], options: ReadOptions) -> list[Split]:
    """List the files that `sources` name (see `sources.expand`), check each one's columns, and cut them into splits.

    Raises InputError for missing, empty, unreadable and wrongly named sources and columns; StorageError when a store
    refuses or a web server cannot send byte ranges.
    """
    files = expand(sources)
    urls = [file.url for file in files]
    if any(format_of(url, options) == "images" for url in urls):
        from pipelines.readers.images import plan_images

        return plan_images(files, options)
    with ThreadPoolExecutor(min(_PLANNING_THREADS, len(urls))) as pool:
        planned = list(pool.map(lambda url: _plan_file(url, options), urls))
    _check_stems([url for url, (_, makes_ids) in zip(urls, planned, strict=True) if makes_ids])
    splits = [split for splits, _ in planned for split in splits]
    return [replace(split, index=i) for i, split in enumerate(splits)]


def _plan_file(url: str, options: ReadOptions) -> tuple[list[Split], bool]:
    """Return a file's splits, and whether its rows get ids made of its name."""
    file_format = format_of(url, options)
    check_ranges(url)
    if file_format == "parquet":
        from pipelines.readers.parquet import plan_row_groups

        return [Split(0, url, file_format, *groups) for groups in plan_row_groups(url, options)], False
    reader = _text_reader(url, file_format, options)
    with open_text(url) as stream:
        lines = ByteLines(stream, 0, options.max_row_bytes, 0)
        reader.read_head(lines)
        makes_ids = reader.check_sample(lines)
    if compression_of(url):
        return [Split(0, url, file_format, 0, -1)], makes_ids
    size, step = size_of(url), options.split_bytes
    starts = range(0, max(size, 1), step)
    return [Split(0, url, file_format, start, min(start + step, size)) for start in starts], makes_ids


def _check_stems(urls: Sequence[str]) -> None:
    """Refuse files whose made ids would clash."""
    url_of: dict[str, str] = {}
    for url in urls:
        other = url_of.setdefault(stem_of(url), url)
        if other != url:
            raise InputError(f"two files without ids have the same name: {other} and {url}", where=url,
                             expected="different names: the name and the offset make the id",
                             hint="rename one, or give the rows ids")  # fmt: skip


def _text_reader(url: str, file_format: str, options: ReadOptions) -> DelimitedReader | JsonLinesReader:
    if file_format == "jsonl":
        return JsonLinesReader(url, options)
    return DelimitedReader(url, file_format, options)


class SplitReader:
    """Iterate over the Row and Reject of one split, in file order.

    start_at: where its first record begins, when that is known; otherwise it is guessed.
    After exhaustion `first` and `end` are where its first record begins and its last one ends: bytes, or row groups. A
    split in which no record begins has `first == end`.
    Raises InputError for damaged files and StorageError when a store refuses.
    """

    def __init__(self, split: Split, options: ReadOptions, start_at: int | None = None) -> None:
        self.split, self.options, self.start_at = split, options, start_at
        self.first = self.end = -1

    def __iter__(self) -> Iterator[Row | Reject]:
        if self.split.format == "parquet":
            from pipelines.readers.parquet import read_row_groups

            yield from read_row_groups(self.split, self.options)
            self.first, self.end = self.split.start, self.split.stop
            return
        if self.split.format == "images":
            from pipelines.readers.images import read_images

            yield from read_images(self.split, self.options)
            self.first, self.end = self.split.start, self.split.stop
            return
        with open_text(self.split.url) as stream:
            yield from self._read_text(stream)

    def _read_text(self, stream: BinaryIO) -> Iterator[Row | Reject]:
        split, limit = self.split, self.options.max_row_bytes
        stop = sys.maxsize if split.stop < 0 else split.stop
        reader = _text_reader(split.url, split.format, self.options)
        lines = ByteLines(stream, 0, limit, stop)
        first = reader.read_head(lines)
        if self.start_at is not None and self.start_at > first:
            first = self.start_at
            stream.seek(first)
            lines = ByteLines(stream, first, limit, stop)
        elif self.start_at is None and split.start > first:
            stream.seek(split.start - 1)
            lines = ByteLines(stream, split.start - 1, limit, stop)
            first = _guess_first(lines, stop, reader.is_whole)
        yield from reader.read(lines, stop)
        if lines.offset < split.stop:
            raise _changing(split.url)
        self.first, self.end = first, max(first, lines.offset)


def _guess_first(lines: ByteLines, stop: int, is_whole: Callable[[bytes], bool]) -> int:
    """Move `lines`, one byte before a split, to the record that seems to be the first to begin in it.

    That is the first line to look like a whole record, or just the first line when none of the next ones does.
    """
    lines.skip_line(stop)
    guess = lines.mark()
    while lines.offset < min(stop, guess + _GUESS_WINDOW_BYTES):
        at = lines.offset
        line = lines.next()
        if not line:
            break
        if is_whole(line):
            lines.rewind(at)
            return at
    lines.rewind(guess)
    return guess


def check_chain(results: Sequence[tuple[Split, int, int]]) -> dict[int, int]:
    """Return the splits to read again, each with its `start_at`; empty when the chain holds and all rows are right.

    results: (split, first, end) of every split. A split is right when it follows on from a right one, so each round of
    reading again makes at least one more split of each file right; nearly always one round does for all.
    """
    again: dict[int, int] = {}
    expected = 0
    for split, first, end in sorted(results, key=lambda result: result[0].index):
        if split.start == 0:
            expected = end
        elif expected >= split.stop:  # a record that began before this split reaches past it
            if first != end:
                again[split.index] = expected
        else:
            if first != expected or first == end:
                again[split.index] = expected
            expected = end
    return again


def settle(splits: Sequence[Split], read: Callable[[Mapping[int, int | None]], Mapping[int, Span]]) -> dict[int, Span]:
    """Have splits read until the chain holds; return the (first, end) of each split by its index.

    read: is given the indexes of splits with their `start_at` (None: to be guessed), reads them in any order or all at
    once, replacing what it read of them before, and returns the (first, end) of each.
    """
    spans: dict[int, Span] = {}
    wanted: dict[int, int | None] = {split.index: None for split in splits}
    for _ in range(len(splits) + 1):
        spans.update(read(wanted))
        wanted = dict(check_chain([(split, *spans[split.index]) for split in splits]))
        if not wanted:
            return spans
    raise _changing(next(split.url for split in splits if split.index in wanted))


def _changing(url: str) -> InputError:
    hint = "run again on files that nothing writes to"
    return InputError("the file changed while it was read", where=url, hint=hint)


def read_all(splits: Sequence[Split], options: ReadOptions) -> Iterator[Row | Reject]:
    """Read the splits one after the other, each from the end of the one before it: nothing is guessed or read twice."""
    end = 0
    for split in splits:
        reader = SplitReader(split, options, None if split.start == 0 else end)
        yield from reader
        end = reader.end
