"""The corpus readers: every record exactly once however the file is cut, and every bad row or file told."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import re
import threading
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.errors import ConfigError, InputError, StorageError, nearest
from pipelines.readers import (
    ReadOptions,
    Reject,
    Row,
    Split,
    SplitReader,
    check_chain,
    file_version,
    plan_splits,
    read_all,
    settle,
)
from pipelines.schema import REASONS
from tests.s3 import s3_server

WIKI = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "wiki" / "psgs_w100.tsv.gz"
Item = Row | Reject


def read_in_parallel(splits: Sequence[Split], options: ReadOptions, backwards: bool = False) -> tuple[list[Item], int]:
    """Guess every split at first, as workers would; return the rows in order and the number of splits read again."""
    outcome: dict[int, list[Item]] = {}
    num_reads = 0

    def read(wanted: Mapping[int, int | None]) -> dict[int, tuple[int, int]]:
        nonlocal num_reads
        spans = {}
        for index in sorted(wanted, reverse=backwards):
            reader = SplitReader(splits[index], options, wanted[index])
            outcome[index] = list(reader)
            spans[index] = (reader.first, reader.end)
            num_reads += 1
        return spans

    settle(splits, read)
    return [item for index in sorted(outcome) for item in outcome[index]], num_reads - len(splits)


def read_every_way(path: Path | str, options: ReadOptions) -> list[Item]:
    """Read in sequence and in parallel, and require that both agree."""
    splits = plan_splits(str(path), options)
    one_by_one = list(read_all(splits, options))
    assert read_in_parallel(splits, options)[0] == one_by_one
    assert all(item.reason in REASONS for item in one_by_one if isinstance(item, Reject))
    return one_by_one


def read_any_size(path: Path, sizes: Sequence[int] = (1, 2, 3, 7, 20, 64, 1 << 20), **options: Any) -> list[Item]:
    """Read with many split sizes, require that all agree, and return the rows."""
    results = [read_every_way(path, ReadOptions(split_bytes=size, **options)) for size in sizes]
    assert all(result == results[0] for result in results[1:])
    return results[0]


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def ids(items: Sequence[Item]) -> list[str]:
    assert all(isinstance(item, Row) for item in items), items
    return [item.id for item in items if isinstance(item, Row)]


def reasons(items: Sequence[Item]) -> list[str]:
    """Show a result in short: a row by its id, a refused one by its reason."""
    return [item.id if isinstance(item, Row) else item.reason for item in items]


# The law: any table, any split size, every row once and in order


CHARACTER = st.one_of(st.sampled_from('"\t\n\r, ab\0\u2028\ufeff'), st.characters(exclude_categories=["Cs"]))
FIELD = st.text(CHARACTER, max_size=12)
FILLED = FIELD.filter(str.strip)
BYTES = st.sampled_from([b'"', b"\t", b"\n", b"\r", b"a", b"bb", b"\xff", b'1\t"x"\ty\n', b"\n\n", b"\0"])
TABLE = st.lists(st.tuples(FIELD, FIELD, FIELD), max_size=12)


def expected_rows(table: Sequence[tuple[str, str, str]], is_tsv: bool) -> list[Any]:
    rows: list[Any] = []
    for row_id, text, title in table:
        text = text.strip('"').strip() if is_tsv else text
        if (row_id, text, title) == ("id", "text", "title"):
            rows.append("malformed")
        elif not row_id.strip():
            rows.append("missing_id")
        else:
            rows.append((row_id, text, title) if text.strip() else "missing_text")
    return rows


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    table=TABLE,
    split_bytes=st.one_of(st.integers(1, 12), st.integers(1, 400)),
    is_tsv=st.booleans(),
    quote_all=st.booleans(),
    ending=st.sampled_from(["\r\n", "\n"]),
    bom=st.booleans(),
    trim_end=st.booleans(),
    backwards=st.booleans(),
)
def test_any_table_any_split_size(
    tmp_path: Path,
    table: list[tuple[str, str, str]],
    split_bytes: int,
    is_tsv: bool,
    quote_all: bool,
    ending: str,
    bom: bool,
    trim_end: bool,
    backwards: bool,
) -> None:
    sink = io.StringIO(newline="")
    # With a bare "\n" as line end this csv.writer leaves "\r" unquoted, where no reader could tell it from CRLF.
    quoting: Any = csv.QUOTE_ALL if quote_all or ending == "\n" else csv.QUOTE_MINIMAL
    delimiter = "\t" if is_tsv else ","
    writer = csv.writer(sink, delimiter=delimiter, quoting=quoting, lineterminator=ending)
    writer.writerow(["id", "text", "title"])
    writer.writerows(table)
    content = sink.getvalue()
    parsed = [tuple(row) for row in csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)][1:]
    assert parsed == table
    content = content.removesuffix(ending) if trim_end else content
    path = put(tmp_path / ("t.tsv" if is_tsv else "t.csv"), ("\ufeff" if bom else "") + content)

    options = ReadOptions(split_bytes=split_bytes)
    splits = plan_splits(str(path), options)
    in_sequence = list(read_all(splits, options))
    in_parallel, _ = read_in_parallel(splits, options, backwards)

    assert in_parallel == in_sequence
    shown = [(i.id, i.text, i.title) if isinstance(i, Row) else i.reason for i in in_sequence]
    assert shown == expected_rows(table, is_tsv)
    positions = [item.position for item in in_sequence]
    assert positions == sorted(set(positions))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.lists(BYTES, max_size=60),
    split_bytes=st.integers(1, 60),
    max_row_bytes=st.integers(15, 60),
)
def test_any_bytes_at_all(tmp_path: Path, body: list[bytes], split_bytes: int, max_row_bytes: int) -> None:
    """However broken the file, one split and many give the same rows and rejects, and parallel reads agree."""
    path = put(tmp_path / "t.tsv", b"id\ttext\ttitle\n" + b"".join(body))
    whole = read_every_way(path, ReadOptions(max_row_bytes=max_row_bytes))
    assert read_every_way(path, ReadOptions(max_row_bytes=max_row_bytes, split_bytes=split_bytes)) == whole


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(FILLED, FILLED, st.lists(FIELD, max_size=3)), max_size=12),
    split_bytes=st.integers(1, 300),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
def test_any_json_lines_any_split_size(
    tmp_path: Path, rows: list[tuple[str, str, list[str]]], split_bytes: int, ascii_only: bool, bom: bool
) -> None:
    lines = [json.dumps({"id": i, "text": t, "answers": a}, ensure_ascii=ascii_only) for i, t, a in rows]
    path = put(tmp_path / "t.jsonl", ("\ufeff" if bom else "") + "\n".join(lines))
    options = ReadOptions(split_bytes=split_bytes)
    splits = plan_splits(str(path), options)
    items, num_again = read_in_parallel(splits, options)
    assert [(i.id, i.text, i.answers) for i in items if isinstance(i, Row)] == rows
    assert len(items) == len(rows)
    assert num_again == 0  # a line is a record: no guess can be wrong


# Text files: the corner cases


def test_positions_are_byte_offsets(tmp_path: Path) -> None:
    content = 'id\ttext\ttitle\n1\t"é\n""q"" \t"\tA\n\n2\tplain\tB\n'.encode()
    first, second = read_any_size(put(tmp_path / "t.tsv", content))
    assert (first, second) == (
        Row(14, "1", "A", 'é\n"q"', None),
        Row(content.index(b"2\tplain"), "2", "B", "plain", None),
    )


def test_dpr_quotes_are_stripped_from_tsv_text_only(tmp_path: Path) -> None:
    row = 'x,"""said"" he ",T\n'
    (tsv,) = read_any_size(put(tmp_path / "t.tsv", "id\ttext\ttitle\n" + row.replace(",", "\t")))
    (from_csv,) = read_any_size(put(tmp_path / "t.csv", "id,text,title\n" + row))
    assert (tsv.text, from_csv.text) == ('said" he', '"said" he ')  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("1\ta\tA\n2\tb\tB", ["1", "2"]),
        ("1\ta\tA\r\n2\tb\tB\r\n", ["1", "2"]),
        ("\n\n1\ta\tA\n\r\n\n2\tb\tB\n\n\n", ["1", "2"]),
        ('1\tthe 6" gun "x" y\tA\n2\tb\tB\n', ["1", "2"]),
        ("1\ta\tA\tmore\n2\tb\n3\tc\tC\n", ["wrong_field_count", "wrong_field_count", "3"]),
        ('\ta\tA\n  \ta\tA\n3\t\tC\n4\t \t\n5\t""""\tD\n', ["missing_id", "missing_id", *["missing_text"] * 3]),
        ('1\ta\tA\n2\t"never closed\tB\n3\tc\tC\n4\td\tD\n', ["1", "malformed", "3", "4"]),
        ("1\ta\tA\nid\ttext\ttitle\n2\tb\tB\n", ["1", "malformed", "2"]),
        (" \n1\ta\tA\n", ["wrong_field_count", "1"]),
        ("", []),
    ],
)
def test_rows_and_rejects(tmp_path: Path, body: str, shown: list[str]) -> None:
    assert reasons(read_any_size(put(tmp_path / "t.tsv", "id\ttext\ttitle\n" + body))) == shown


def test_undecodable_rows_are_refused_and_the_next_are_not(tmp_path: Path) -> None:
    head = b"id\ttext\ttitle\n"
    items = read_any_size(put(tmp_path / "t.tsv", head + b'1\t"a \xff\n b"\tA\n2\tb\tB\n3\t\xc3\tC\n'))
    assert reasons(items) == ["undecodable", "2", "undecodable"]
    assert isinstance(items[0], Reject)
    assert items[0].detail == f"byte 0xff at {len(head) + 5} is not UTF-8"
    assert items[0].snippet == '1\t"a \ufffd\n b"\tA\n'


def test_bare_returns_and_nul_are_characters(tmp_path: Path) -> None:
    items = read_any_size(put(tmp_path / "t.tsv", 'id\ttext\ttitle\n1\ta\rb\0c\tA\r\n2\t"x\ry\r\nz"\tB\r\n'))
    assert [i.text for i in items if isinstance(i, Row)] == ["a\rb\0c", "x\ry\r\nz"]


def test_unclosed_quote_costs_its_own_line(tmp_path: Path) -> None:
    lines = [f"{i}\ttext {i}\tT\n" for i in range(40)]
    lines[10] = '10\t"never closed\tT\n'
    path = put(tmp_path / "t.tsv", "id\ttext\ttitle\n" + "".join(lines))
    items = read_any_size(path, max_row_bytes=200)
    assert reasons(items) == [*map(str, range(10)), "oversized_row", *map(str, range(11, 40))]
    refused = items[10]
    assert isinstance(refused, Reject)
    assert "quote may be unclosed" in refused.detail
    assert refused.snippet.startswith('10\t"never closed\tT\n11\t')


@pytest.mark.parametrize("name", ["t.tsv", "t.jsonl", "t.jsonl.gz"])
def test_endless_line_is_skipped_in_bounded_memory(tmp_path: Path, name: str) -> None:
    head, row = ("id\ttext\n", "{0}\tx\n") if name == "t.tsv" else ("", '{{"id": {0}, "text": "x"}}\n')
    open_it: Callable[..., Any] = gzip.open if name.endswith(".gz") else open
    with open_it(tmp_path / name, "wb") as file:
        file.write((head + row.format(1)).encode())
        for _ in range(64):
            file.write(b"y" * (1 << 20))
        file.write(("\n" + row.format(2)).encode())
    tracemalloc.start()
    items = read_every_way(tmp_path / name, ReadOptions(split_bytes=10 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(items) == ["1", "oversized_row", "2"]
    assert isinstance(items[1], Reject)
    assert items[1].snippet == "y" * 200
    assert peak < 30 << 20  # two blocks of 4 MiB, the row limit and copies of them; the line has 64 MiB


def test_row_limit_is_exact(tmp_path: Path) -> None:
    line = "1\t" + "x" * 96 + "\n"
    path = put(tmp_path / "t.tsv", "id\ttext\n" + line)
    assert reasons(read_any_size(path, max_row_bytes=len(line))) == ["1"]
    assert reasons(read_any_size(path, max_row_bytes=len(line) - 1)) == ["oversized_row"]


def test_fields_beyond_the_csv_modules_own_limit(tmp_path: Path) -> None:
    (row,) = read_every_way(put(tmp_path / "t.tsv", "id\ttext\n1\t" + "x" * 500_000 + "\n"), ReadOptions())
    assert isinstance(row, Row)
    assert len(row.text) == 500_000


def test_records_longer_than_splits_and_tables_inside_text(tmp_path: Path) -> None:
    """Lines inside a quoted field that look just like records fool the guess, never the chain."""
    inner = "".join(f"{i}\tinner {i}\tinner\n" for i in range(30))
    table = [(str(n), f"outer {n}\n{inner}end", "outer") for n in range(5)]
    sink = io.StringIO()
    csv.writer(sink, delimiter="\t", lineterminator="\n").writerows([("id", "text", "title"), *table])
    path = put(tmp_path / "t.tsv", sink.getvalue())
    options = ReadOptions(split_bytes=150)
    items, num_again = read_in_parallel(plan_splits(str(path), options), options)
    assert [(i.id, i.text, i.title) for i in items if isinstance(i, Row)] == table
    assert num_again > 0
    assert reasons(read_any_size(path, sizes=(1, 50, 333, 5000))) == list("01234")


def test_answers_column(tmp_path: Path) -> None:
    cells = {
        '["a", "b"]': ["a", "b"],
        "['it''s', \"x\"]": ["its", "x"],
        "['a\\d']": ["a\\d"],
        "[1990, 2]": ["1990", "2"],
        "one": ["one"],
        "[sic] one": ["[sic] one"],
        "[broken": ["[broken"],
        "": None,
        "[]": [],
    }
    body = "".join(f"{i}\tq\t{cell}\n" for i, cell in enumerate(cells))
    items = read_any_size(put(tmp_path / "t.tsv", "id\ttext\tanswers\n" + body + "9\tq\t[[1]]\n10\tq\t[true]\n"))
    assert [i.answers for i in items if isinstance(i, Row)] == list(cells.values())
    assert reasons(items)[-2:] == ["malformed", "malformed"]


def test_columns_in_any_order_and_by_other_names(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", 'extra,body,pid,head\nx,"a, b",7,H\n')
    columns = {"id": "pid", "text": "body", "title": "head"}
    assert read_any_size(path, columns=columns) == [Row(20, "7", "H", "a, b", None)]
    assert read_any_size(path, columns={**columns, "title": ""}) == [Row(20, "7", "", "a, b", None)]


# JSON lines


def test_qa_pairs_are_named_by_their_place(tmp_path: Path) -> None:
    lines = [
        '{"question": "who?", "answer": ["a", "b"]}',
        '{"question": "when?", "answer": "c", "id": 12}',
        '{"question": "why?"}',
    ]
    content = "\n".join(lines) + "\n"
    why = content.index(lines[2])
    items = read_any_size(put(tmp_path / "paq.v1.jsonl", content))
    assert items == [
        Row(0, "paq.v1:0", "", "who?", ["a", "b"]),
        Row(len(lines[0]) + 1, "12", "", "when?", ["c"]),
        Row(why, f"paq.v1:{why}", "", "why?", None),
    ]
    zipped = put(tmp_path / "paq.v1.jsonl.gz", gzip.compress(content.encode()))
    assert read_every_way(zipped, ReadOptions()) == items


def test_clashing_made_ids_are_refused_before_any_work(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        put(tmp_path / folder / "qa.jsonl", '{"question": "q", "answer": ["a"]}\n')
    with pytest.raises(InputError, match="two files without ids have the same name"):
        plan_splits(str(tmp_path), ReadOptions())
    put(tmp_path / "b" / "qa.jsonl", '{"id": 1, "question": "q", "answer": ["a"]}\n')
    assert len(plan_splits(str(tmp_path), ReadOptions())) == 2


def test_json_rows_and_rejects(tmp_path: Path) -> None:
    lines: list[bytes] = [
        b'{"id": 1, "text": "a", "title": null, "answers": [2, "x"]}',
        b'{"id": "2", "text": "b", "more": {}}',
        b"",
        b"  ",
        b"not json",
        b"[1]",
        b'{"id": 3}',
        b'{"text": "x"}',
        b'{"id": true, "text": "x"}',
        b'{"id": 4, "text": 5}',
        b'{"id": 5, "text": "x", "title": ["y"]}',
        b'{"id": 6, "text": "\\ud800"}',
        b'{"id": 7, "text": "\xff"}',
        b'{"id": 8, "text": "x", "answers": {"a": 1}}',
        b"[" * 100_000,
        b'{"id": NaN, "text": "x"}',
        b'{"id": 9, "text": "\\ud83d\\ude00"}',
        b'{"id": 10, "text": "a"} {"id": 11, "text": "b"}',
    ]
    items = read_any_size(put(tmp_path / "t.jsonl", b"\r\n".join(lines)), sizes=(1000, 30_000, 1 << 20))
    assert reasons(items) == [
        "1",
        "2",
        "malformed",
        "malformed",
        "missing_text",
        "missing_id",
        "malformed",
        "malformed",
        "malformed",
        "malformed",
        "undecodable",
        "malformed",
        "malformed",
        "malformed",
        "9",
        "malformed",
    ]
    assert isinstance(items[0], Row)
    assert items[0].answers == ["2", "x"]
    assert isinstance(items[14], Row)
    assert items[14].text == "\U0001f600"


def test_nested_keys(tmp_path: Path) -> None:
    first = '{"passage_id": 7, "passage": "text", "metadata": {"title": "T"}}\n'
    content = first + '{"passage_id": 8, "passage": "x", "metadata": 1}'
    columns = {"id": "passage_id", "text": "passage", "title": "metadata.title"}
    assert read_any_size(put(tmp_path / "t.jsonl", content), columns=columns) == [
        Row(0, "7", "T", "text", None),
        Row(len(first), "8", "", "x", None),
    ]


@pytest.mark.parametrize(
    ("line", "columns", "message"),
    [
        ('{"id": 1, "passage": "x"}', {}, "no 'text' for the text"),
        ('{"pid": 1, "text": "x"}', {}, "no 'id' for the id"),
        ('{"id": 1, "text": "x", "Title": "y"}', {}, "did you mean 'Title'"),
        ('{"id": 1, "text": "x", "headline": "y"}', {"title": "headlin"}, "did you mean 'headline'"),
        ('{"question": "x", "answer": ["y"]}', {"text": "query"}, "no 'query' for the text"),
        ('{"question": "x", "answer": ["y"]}', {"id": "qid"}, "no 'qid' for the id"),
        ('[{"id": 1, "text": "x"}]', {}, "one JSON array"),
    ],
)
def test_wrong_json_keys_fail_before_any_work(tmp_path: Path, line: str, columns: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_splits(str(put(tmp_path / "t.jsonl", line + "\n")), ReadOptions(columns=columns))


# Compression


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_equals_plain(tmp_path: Path, suffix: str) -> None:
    content = ("id\ttext\ttitle\n" + "".join(f'{i}\t"text\n{i}"\tT\n' for i in range(5000))).encode()
    plain = read_every_way(put(tmp_path / "t.tsv", content), ReadOptions(split_bytes=10_000))
    half = len(content) // 2
    joined = COMPRESS[suffix](content[:half]) + COMPRESS[suffix](content[half:])  # two members in one file
    path = put(tmp_path / f"t.tsv{suffix}", joined)
    assert plan_splits(str(path), ReadOptions()) == [Split(0, str(path), "tsv", 0, -1)]
    assert read_every_way(path, ReadOptions()) == plain
    assert len(ids(plain)) == 5000


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_compressed_files(tmp_path: Path, suffix: str, damage: str) -> None:
    content = b"id\ttext\n" + b"".join(b"%d\t%s\n" % (i, os.urandom(50).hex().encode()) for i in range(5000))
    whole = COMPRESS[suffix](content)
    path = put(tmp_path / f"t.tsv{suffix}", whole[:-20] if damage == "cut" else b"id\ttext\n1\tnot compressed\n" * 20)
    with pytest.raises(InputError, match="damaged or cut short"):
        list(read_all(plan_splits(str(path), ReadOptions()), ReadOptions()))


# Parquet


def parquet(path: Path, columns: dict[str, Any], row_group_size: int = 10) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def test_parquet_splits_at_row_groups(tmp_path: Path) -> None:
    numbers = list(range(95))
    path = parquet(
        tmp_path / "t.parquet",
        {
            "noise": [os.urandom(100) for _ in numbers],
            "id": numbers,
            "text": [f"text {n}" for n in numbers],
            "title": [None if n % 2 else "T" for n in numbers],
            "answers": [None if n % 3 else ["a", str(n)] for n in numbers],
        },
    )
    expected = [Row(n, str(n), "" if n % 2 else "T", f"text {n}", None if n % 3 else ["a", str(n)]) for n in numbers]
    for split_bytes, num_splits in ((1, 10), (1 << 30, 1)):
        options = ReadOptions(split_bytes=split_bytes)
        assert len(plan_splits(str(path), options)) == num_splits
        assert read_every_way(path, options) == expected


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_parquet_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["é", "b", None]).cast(kind)
    lists = pa.ListArray.from_arrays([0, 2, 2, 3], column)
    path = parquet(tmp_path / "t.parquet", {"id": column, "text": pa.array(["x"] * 3).cast(kind), "answers": lists}, 2)
    items = read_every_way(path, ReadOptions(split_bytes=1))
    assert reasons(items) == ["é", "b", "malformed"]
    assert isinstance(items[0], Row)
    assert items[0].answers == ["é", "b"]
    one = parquet(tmp_path / "one.parquet", {"id": column, "text": column, "answers": column})
    assert [i.answers for i in read_every_way(one, ReadOptions()) if isinstance(i, Row)] == [["é"], ["b"]]


def test_parquet_rejects(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xff", b"ok", None, b"ok", b"x" * 300]).cast(pa.binary())
    bad_strings = pa.StringArray.from_buffers(len(bad), *bad.buffers()[1:], bad.buffers()[0])
    path = parquet(tmp_path / "t.parquet", {"id": ["0", "1", "", "3", None, "5"], "text": bad_strings}, 4)
    items = read_every_way(path, ReadOptions(max_row_bytes=256, split_bytes=1))
    assert reasons(items) == ["0", "undecodable", "missing_id", "missing_text", "missing_id", "oversized_row"]
    assert [item.position for item in items] == list(range(6))


def test_parquet_bad_files(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {"id": [1.5], "text": ["x"], "body": ["y"], "title": [[1]]})
    with pytest.raises(InputError, match=re.escape("column 'id' holds double")):
        plan_splits(str(path), ReadOptions(columns={"title": ""}))
    with pytest.raises(InputError, match="did you mean 'body'") as caught:
        plan_splits(str(path), ReadOptions(columns={"text": "boddy"}))
    assert "'id', 'text', 'body', 'title'" in caught.value.expected
    with pytest.raises(InputError, match="not a Parquet file"):
        plan_splits(str(put(tmp_path / "no.parquet", b"id\ttext\n")), ReadOptions())
    with pytest.raises(InputError, match="outer compression"):
        plan_splits(str(put(tmp_path / "t.parquet.gz", b"")), ReadOptions())


def test_parquet_empty_and_damaged(tmp_path: Path) -> None:
    empty = parquet(tmp_path / "e.parquet", {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    assert read_every_way(empty, ReadOptions()) == []
    path = parquet(
        tmp_path / "t.parquet", {"id": [str(i) for i in range(5000)], "text": [os.urandom(9).hex()] * 5000}, 5000
    )
    data = bytearray(path.read_bytes())
    data[50:2000] = b"\xff" * 1950
    splits = plan_splits(str(put(path, bytes(data))), ReadOptions())
    with pytest.raises(InputError, match="damaged"):
        list(read_all(splits, ReadOptions()))


# Sources


def test_sources_expand_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.tsv", "a.tsv", "sub/c.tsv.gz", "sub/_SUCCESS", ".hidden/d.tsv", "z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = b"id\ttext\n" + name.encode() + b"\tx\n" if "tsv" in name else b'{"id": "z.jsonl", "text": "x"}'
        put(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    monkeypatch.chdir(tmp_path)
    options = ReadOptions()

    def names(*sources: str) -> list[str]:
        return ids(list(read_all(plan_splits(sources, options), options)))

    assert names("*.tsv") == ["a.tsv", "b.tsv"]
    assert names("z.jsonl", f"file://{tmp_path}/?.tsv") == ["z.jsonl", "a.tsv", "b.tsv"]
    assert names(str(tmp_path)) == ["a.tsv", "b.tsv", "sub/c.tsv.gz", "z.jsonl"]
    splits = plan_splits(["b.tsv", "a.tsv"], options)
    assert [(s.index, s.url) for s in splits] == [(0, str(tmp_path / "b.tsv")), (1, str(tmp_path / "a.tsv"))]
    assert pickle.loads(pickle.dumps((splits, options))) == (splits, options)


def test_names_with_glob_characters_and_spaces(tmp_path: Path) -> None:
    path = put(tmp_path / "a [1] ?.tsv", "id\ttext\n1\tx\n")
    assert ids(read_every_way(path, ReadOptions())) == ["1"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no sources"),
        (["missing.tsv"], "no such file"),
        (["*.tsv.none"], "no file matches"),
        (["empty"], "no such file, nor a folder with files"),
        (["t.tsv", "*.tsv"], "twice"),
        (["README.md"], "does not tell its format"),
        (["t.tsvv"], r"did you mean \.tsv\?"),
        (["void.tsv"], "the file is empty"),
        (["blank.tsv"], "the file is empty"),
        (["wide.tsv"], "UTF-16"),
        (["latin.tsv"], "header row cannot be read: byte 0xe9"),
        (["noscheme://a/b.tsv"], "cannot open the source"),
        (["https://127.0.0.1/*.tsv"], "no listing"),
    ],
)
def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("t.tsv", "README.md", "t.tsvv"):
        put(tmp_path / name, "id\ttext\n1\tx\n")
    put(tmp_path / "void.tsv", "")
    put(tmp_path / "blank.tsv", "\n\n")
    put(tmp_path / "wide.tsv", "id\ttext\n".encode("utf-16"))
    put(tmp_path / "latin.tsv", "id\ttext\tcaf\u00e9\n".encode("latin-1"))
    with pytest.raises(InputError, match=message):
        plan_splits(sources, ReadOptions())


@pytest.mark.parametrize(
    ("header", "columns", "what", "hint"),
    [
        ("12\tSome text\tTitle", {}, "no 'id' for the id", "columns: {id: "),
        ("id\tpassage_text\ttitle", {}, "no 'text' for the text", "did you mean 'passage_text'"),
        ("ID\tTEXT\tTITLE", {}, "no 'id' for the id", "did you mean 'ID'"),
        ("id\ttext\tTitle", {}, "no 'title' for the title", "did you mean 'Title'"),
        ("id\ttext\ttitle", {"title": "titel"}, "no 'titel' for the title", "columns: {title: "),
        ("id\ttext\ttext", {}, "two columns are named 'text'", ""),
        ("id,text,title", {}, "looks like csv: 'id,text,title'", "format: csv"),
        ("id\ttext\r1\tx\r2\ty", {}, "lines end in a bare carriage return", "tr "),
    ],
)
def test_wrong_columns(tmp_path: Path, header: str, columns: dict[str, str], what: str, hint: str) -> None:
    path = put(tmp_path / "t.tsv", f"{header}\n1\ta\tb\n")
    with pytest.raises(InputError, match=re.escape(what)) as caught:
        plan_splits(str(path), ReadOptions(columns=columns))
    assert hint in caught.value.hint
    assert caught.value.where == str(path)


def test_unreadable_file(tmp_path: Path) -> None:
    path = put(tmp_path / "t.tsv", "id\ttext\n")
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path.chmod(0)
    with pytest.raises(StorageError, match="cannot read the source"):
        plan_splits(str(path), ReadOptions())


def test_file_that_shrinks_after_planning(tmp_path: Path) -> None:
    for name, line in (("t.tsv", "1\tx\n"), ("t.jsonl", '{"id": 1, "text": "x"}\n')):
        path = put(tmp_path / name, "id\ttext\n" + line * 50 if name == "t.tsv" else line * 50)
        splits = plan_splits(str(path), ReadOptions(split_bytes=50))
        put(path, path.read_bytes()[:120])
        for split in (splits[2], splits[-1]):
            with pytest.raises(InputError, match="changed while it was read"):
                list(SplitReader(split, ReadOptions()))


def test_options_are_checked() -> None:
    for bad in (
        {"columns": {"body": "x"}},
        {"columns": {"id": ""}},
        {"split_bytes": 0},
        {"max_row_bytes": 0},
    ):
        with pytest.raises(ConfigError):
            ReadOptions(**bad)
    with pytest.raises(ConfigError, match="unknown corpus format 'xml'"):
        plan_splits(__file__, ReadOptions(format="xml"))


def test_nearest() -> None:
    assert nearest("text", ["Texts", "other"]) == "Texts"
    assert nearest("ID", ["name", "_id"]) == "_id"
    assert nearest("text", ["zzz"]) is None
    assert nearest("text", []) is None


def test_file_version_follows_the_content(tmp_path: Path) -> None:
    path = put(tmp_path / "t.tsv", "id\ttext\n1\tx\n")
    before = file_version(str(path))
    assert file_version(str(path)) == before
    os.utime(path, (1, 1))
    assert file_version(str(path)) != before
    with pytest.raises(InputError, match="no such file"):
        file_version(str(tmp_path / "none"))


# The chain


def test_check_chain() -> None:
    def split(index: int, url: str, start: int, stop: int) -> Split:
        return Split(index, url, "tsv", start, stop)

    a = [split(i, "a", 10 * i, 10 * i + 10) for i in range(5)]
    right = [(a[0], 3, 12), (a[1], 12, 35), (a[2], 30, 30), (a[3], 35, 41), (a[4], 41, 50)]
    assert check_chain(right) == {}
    assert check_chain(right[::-1]) == {}
    assert check_chain([*right[:2], (a[2], 22, 35), *right[3:]]) == {
        2: 35
    }  # nothing begins in it, but it found something
    assert check_chain([*right[:3], (a[3], 38, 41), right[4]]) == {3: 35}  # began in the wrong place
    assert check_chain([*right[:3], (a[3], 40, 40), right[4]]) == {3: 35, 4: 40}  # found nothing, where a record begins
    assert check_chain([*right[:3], (a[3], 35, 35), (a[4], 35, 50)]) == {3: 35}  # knew where one begins, and read none
    b = [(split(5, "b", 0, 10), 8, 10), (split(6, "b", 10, 20), 10, 20)]
    assert check_chain([*right, *b, (split(7, "z.gz", 0, -1), 8, 99), (split(8, "c", 0, 5), 2, 5)]) == {}


def test_settle_gives_up_on_a_file_that_never_settles() -> None:
    splits = [Split(0, "a", "tsv", 0, 10), Split(1, "a", "tsv", 10, 20)]
    ends = iter(range(11, 100))

    def read(wanted: Mapping[int, int | None]) -> dict[int, tuple[int, int]]:
        return {index: (3, next(ends)) for index in wanted}

    with pytest.raises(InputError, match="changed while it was read"):
        settle(splits, read)


# Remote


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("readers") as (url, _):
        yield url


def passages(num_rows: int) -> bytes:
    return b"id\ttext\ttitle\n" + b"".join(b'%d\t"text ""%d""\nmore"\tT%d\n' % (i, i, i) for i in range(num_rows))


def test_s3(bucket: str, tmp_path: Path) -> None:
    import boto3

    data = passages(3000)
    table = pa.table({"id": list(range(3000)), "text": ["x"] * 3000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=500)
    objects = {
        "in/a.tsv": data,
        "in/b.tsv.gz": gzip.compress(data),
        "in/c.parquet": (tmp_path / "t.parquet").read_bytes(),
    }
    client = boto3.client("s3")
    for key, body in objects.items():
        client.put_object(Bucket="readers", Key=key, Body=body)
    options = ReadOptions(split_bytes=20_000)
    local = read_every_way(put(tmp_path / "a.tsv", data), options)
    assert read_every_way(f"{bucket}/in/a.*", options) == local
    assert read_every_way(f"{bucket}/in/b.tsv.gz", options) == local
    assert ids(read_every_way(f"{bucket}/in/*.parquet", ReadOptions(split_bytes=1))) == [str(i) for i in range(3000)]
    assert [s.url for s in plan_splits(f"{bucket}/in", ReadOptions())] == [f"{bucket}/{key}" for key in objects]
    before = file_version(f"{bucket}/in/a.tsv")
    client.put_object(Bucket="readers", Key="in/a.tsv", Body=data[:-1] + b" ")
    assert file_version(f"{bucket}/in/a.tsv") != before


def test_s3_refusals(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in (f"{bucket}/in/none.tsv", f"{bucket}/none/*.tsv", "s3://no-such-bucket/a.tsv"):
        with pytest.raises(InputError, match=r"no such file|no file matches"):
            plan_splits(source, ReadOptions())


class _Server(BaseHTTPRequestHandler):
    """Serve `files`; with `ranges` off, ignore the Range header as simple servers do."""

    files: ClassVar[dict[str, bytes]] = {}
    ranges = True
    sizes = True

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path == "/secret.tsv":
            self.send_error(403)
            return
        if path not in self.files:
            self.send_error(404)
            return
        data, status = self.files[path], 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and self.ranges:
            start, stop = int(asked[1]), int(asked[2]) + 1
            data, status, total = data[start:stop], 206, len(data)
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        if self.sizes:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers: list[ThreadingHTTPServer] = []

    def start(files: dict[str, bytes], ranges: bool = True, sizes: bool = True) -> str:
        handler = type("Handler", (_Server,), {"files": files, "ranges": ranges, "sizes": sizes})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_http(serve: Callable[..., str], tmp_path: Path) -> None:
    data = passages(5000)
    parquet(tmp_path / "t.parquet", {"id": list(range(3000)), "text": ["x"] * 3000}, 500)
    base = serve(
        {"/a.tsv": data, "/b.tsv.gz": gzip.compress(data), "/c.parquet": (tmp_path / "t.parquet").read_bytes()}
    )
    assert urllib.request.urlopen(f"{base}/a.tsv").read() == data
    options = ReadOptions(split_bytes=30_000)
    local = read_every_way(put(tmp_path / "a.tsv", data), options)
    both = [f"{base}/a.tsv?download=1", f"{base}/b.tsv.gz"]
    assert list(read_all(plan_splits(both, options), options)) == local + local
    assert read_every_way(f"{base}/a.tsv", options) == local
    assert len(ids(read_every_way(f"{base}/c.parquet", ReadOptions(split_bytes=1)))) == 3000


def test_http_refusals(serve: Callable[..., str]) -> None:
    files = {"/a.tsv": passages(5000)}
    with pytest.raises(StorageError, match="cannot send byte ranges"):
        plan_splits(f"{serve(files, ranges=False)}/a.tsv", ReadOptions())
    with pytest.raises(StorageError, match="does not tell the file's size"):
        plan_splits(f"{serve(files, sizes=False)}/a.tsv", ReadOptions())
    base = serve(files)
    with pytest.raises(InputError, match="no such file"):
        plan_splits(f"{base}/none.tsv", ReadOptions())
    with pytest.raises(StorageError, match="403"):
        plan_splits(f"{base}/secret.tsv", ReadOptions())
    with pytest.raises(StorageError, match="cannot read the source"):
        plan_splits("http://127.0.0.1:1/a.tsv", ReadOptions())


# Real data


@functools.cache
def wiki() -> bytes:
    return gzip.decompress(WIKI.read_bytes())


@pytest.mark.skipif(not WIKI.exists(), reason="the shared wiki passages are not here")
def test_real_passages(tmp_path: Path) -> None:
    path = put(tmp_path / "psgs_w100.tsv", wiki())
    options = ReadOptions(split_bytes=1 << 20)
    splits = plan_splits(str(path), options)
    items, num_again = read_in_parallel(splits, options)
    rows = list(csv.reader(io.StringIO(wiki().decode(), newline=""), delimiter="\t"))[1:]
    assert len(splits) == 49
    assert len(rows) == 89_197
    assert num_again <= 2
    assert ids(items) == [row[0] for row in rows]
    assert [(i.text, i.title) for i in items if isinstance(i, Row)] == [(r[1].strip('"').strip(), r[2]) for r in rows]
