"""Read the files that published figures were measured on, as their authors released them.

Every file may be a path or any fsspec URL, compressed as its name says. A line that cannot be read is an error that
names it: a figure over other data is another figure.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from typing import NoReturn

from pipelines.errors import InputError
from pipelines.schema import Passage

MAX_LINE_BYTES = 1 << 24
_READ_BYTES = 1 << 22
Judgements = dict[str, dict[str, int]]
"""Passage id -> grade, by query id; only grades of 1 and more."""


def read_lines(url: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without its end) of every line that is not blank.

    Raises InputError for a missing, empty or damaged file, and for a line that is no UTF-8 or over 16 MiB long.
    """
    from pipelines.readers.files import open_text
    from pipelines.readers.lines import text_lines

    found = False
    with open_text(url) as stream:
        for number, text in enumerate(text_lines(stream, url, MAX_LINE_BYTES), start=1):
            if text.strip():
                found = True
                yield number, text.rstrip("\r\n")
    if not found:
        raise InputError("the file is empty", where=url, hint="check that it was copied or downloaded completely")


def _refuse(what: str, url: str, line: int, expected: str) -> NoReturn:
    raise InputError(what, where=f"{url}, line {line}", expected=expected)


def read_columns(url: str, counts: tuple[int, ...], expected: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of a tab-separated file without quoting; every line has one of `counts` columns."""
    for number, text in read_lines(url):
        columns = text.split("\t")
        if len(columns) not in counts:
            _refuse(f"the line has {len(columns)} column(s)", url, number, expected)
        yield number, columns


# --- corpora -----------------------------------------------------------------------------------------------------


def read_corpus(url: str, *, pairs: bool) -> Iterator[Passage]:
    """Yield the passages of a TSV, CSV, JSONL or Parquet corpus in order; with `pairs`, QA pairs (PAQ's JSON lines).

    Raises InputError for a row that would be quarantined, naming its line, and for a row that is no QA pair.
    """
    from pipelines.readers import ReadOptions, Reject, plan_splits, read_all

    options = ReadOptions()
    splits = plan_splits(url, options)
    count = 0
    for file in dict.fromkeys(split.url for split in splits):
        for row in read_all([split for split in splits if split.url == file], options):
            count += 1
            if isinstance(row, Reject):
                what = f"row {count:,} cannot be read: {row.detail} ({row.reason})"
                raise InputError(what, where=_place(file, row.position), expected="a corpus without damaged rows")
            if pairs and not row.answers:
                expected = '{"question": str, "answer": [str, ...]}'
                what = f"row {count:,} is no QA pair: it has no answer"
                raise InputError(what, where=_place(file, row.position), expected=expected)
            yield Passage(row.id, row.title, row.text, row.answers)
    if not count:
        raise InputError("the corpus holds no passages", where=url)


def _place(url: str, position: int) -> str:
    """Return the URL with the line that begins at this byte of a text file."""
    from pipelines.readers.files import open_text

    if url.endswith((".parquet", ".pq")):
        return url
    line, left = 1, position
    with open_text(url) as stream:
        while left and (block := stream.read(min(left, _READ_BYTES))):
            line, left = line + block.count(b"\n"), left - len(block)
    return f"{url}, line {line}"


def read_collection(url: str) -> Iterator[Passage]:
    """Yield the passages of MS MARCO's collection.tsv: `id<tab>text`, or `id<tab>title<tab>text`; no quoting."""
    expected = "id<tab>text, or id<tab>title<tab>text, the same on every line"
    width = 0
    for number, columns in read_columns(url, (2, 3), expected):
        width = width or len(columns)
        if len(columns) != width:
            _refuse(f"the line has {len(columns)} columns, those before it {width}", url, number, expected)
        yield Passage(columns[0], columns[1] if width == 3 else "", columns[-1])


# --- queries, judgements, candidates -----------------------------------------------------------------------------


def read_queries(url: str) -> dict[str, str]:
    """Return text by query id from `id<tab>text` lines. Raises InputError for an id that comes twice."""
    queries: dict[str, str] = {}
    for number, (query_id, text) in read_columns(url, (2,), "id<tab>text"):
        if query_id in queries:
            _refuse(f"the query id {query_id!r} comes twice", url, number, "every query once")
        queries[query_id] = text
    return queries


def read_qrels(url: str) -> Judgements:
    """Return the grades of 1 and more from TREC judgements: `query 0 passage grade`, split at tabs or spaces.

    Grades of 0 are left out, as trec_eval counts what is not judged. Raises InputError when nothing is relevant.
    """
    judged: Judgements = {}
    expected = "query id, 0, passage id, grade"
    for number, text in read_lines(url):
        columns = text.split()
        if len(columns) != 4:
            _refuse(f"the line has {len(columns)} column(s)", url, number, expected)
        try:
            grade = int(columns[3])
        except ValueError:
            _refuse(f"the grade {columns[3]!r} is no whole number", url, number, expected)
        if grade > 0:
            judged.setdefault(columns[0], {})[columns[2]] = grade
    if not judged:
        raise InputError("no passage is judged relevant", where=url, expected=f"lines of: {expected}")
    return judged


def read_candidates(url: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (query id, passage id, query, passage) from the four columns of MS MARCO's top1000 files."""
    expected = "query id, passage id, query, passage; files of ids need `queries` and `collection` too"
    for _, columns in read_columns(url, (4,), expected):
        yield columns[0], columns[1], columns[2], columns[3]


def read_candidate_ids(url: str) -> Iterator[tuple[str, str]]:
    """Yield (query id, passage id) of candidates.

    From a top1000 file, `query<tab>passage[<tab>rank]`, or a TREC run (`query Q0 passage rank score tag`).
    """
    expected = "query id and passage id in the first columns, or a TREC run of six"
    for number, text in read_lines(url):
        columns = text.split("\t") if "\t" in text else text.split()
        is_run = len(columns) == 6 and columns[1] in ("Q0", "0")
        if not is_run and len(columns) not in (2, 3, 4):
            _refuse(f"the line has {len(columns)} column(s)", url, number, expected)
        yield columns[0], columns[2] if is_run else columns[1]


# --- scored sentence pairs ---------------------------------------------------------------------------------------

_STS_EXPECTED = "a header with score, sentence1 and sentence2, or the seven columns of the original sts-test.csv"
_ORIGINAL_STS = {"score": 4, "sentence1": 5, "sentence2": 6}


def read_sts(url: str, split: str) -> tuple[list[float], list[str], list[str]]:
    """Return (scores, first sentences, second sentences) of the STS benchmark.

    Reads tab-separated files (no quoting) and comma-separated ones (quoted) with a header that names score, sentence1
    and sentence2, and the original sts-*.csv (tab-separated, no header: genre, file, year, id, score, sentence,
    sentence). Where there is a `split` column only the rows of `split` count.
    """
    rows = list(_sts_rows(url))
    header = rows[0][1]
    at = {name: header.index(name) for name in _ORIGINAL_STS if name in header}
    if len(at) < 3 and (at or len(header) < 7):
        _refuse(f"the columns are {', '.join(header)[:200]}", url, rows[0][0], _STS_EXPECTED)
    split_at = header.index("split") if at and "split" in header else -1
    rows, at = (rows[1:], at) if at else (rows, _ORIGINAL_STS)
    scores: list[float] = []
    firsts: list[str] = []
    seconds: list[str] = []
    for number, columns in rows:
        if len(columns) <= max(*at.values(), split_at):
            _refuse(f"the line has {len(columns)} column(s)", url, number, _STS_EXPECTED)
        if split_at < 0 or columns[split_at] == split:
            scores.append(_score(columns[at["score"]], url, number))
            firsts.append(columns[at["sentence1"]])
            seconds.append(columns[at["sentence2"]])
    if not scores:
        raise InputError(f"the file holds no pairs of the split {split!r}", where=url, expected=_STS_EXPECTED)
    return scores, firsts, seconds


def _sts_rows(url: str) -> Iterator[tuple[int, list[str]]]:
    lines = list(read_lines(url))
    if "\t" in lines[0][1]:
        yield from ((number, text.split("\t")) for number, text in lines)
        return
    for number, text in lines:
        try:
            yield number, next(csv.reader([text], strict=True))
        except csv.Error as error:
            _refuse(f"not comma-separated ({error})", url, number, _STS_EXPECTED)


def _score(text: str, url: str, number: int) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        _refuse(f"the score {text[:40]!r} is no number", url, number, _STS_EXPECTED)
    return score
