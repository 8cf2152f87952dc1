"""Metadata of passages: typed as it is read, the same from every format, carried into snapshots and versions."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import corpus
from pipelines.build import plan_build, write_passages
from pipelines.config import CorpusConfig, IndexConfig, parse_config
from pipelines.errors import ConfigError, InputError
from pipelines.manifest import fingerprint
from pipelines.readers import Reject, Row, file_version, read_all
from pipelines.readers.base import RefusedRowError
from pipelines.readers.metadata import typed
from pipelines.retrieve import Passages
from pipelines.schema import FORMAT_VERSION, METADATA_TYPES, PASSAGE, MetadataField
from pipelines.staging import read_options
from tests.test_corpus import ingest, rows_of

METADATA: list[Any] = [
    "lang", {"name": "year", "type": "int"}, {"name": "score", "type": "float"}, {"name": "open", "type": "bool"},
    {"name": "tags", "type": "strings", "column": "keywords"},
]  # fmt: skip
FACTS: list[dict[str, Any]] = [
    {"lang": "en", "year": 1999, "score": 0.5, "open": True, "tags": ["a", "b c"]},
    {"lang": "français", "year": -4, "score": 3.0, "open": False, "tags": ["x"]},
    {"lang": None, "year": None, "score": None, "open": None, "tags": None},
]
COLUMN = {"lang": "lang", "year": "year", "score": "score", "open": "open", "tags": "keywords"}


def source(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    """Write passages with metadata as one format writes them."""
    named = [{COLUMN[name]: value for name, value in row.items()} for row in rows]
    passages = [{"id": str(i), "text": f"t {i}", **row} for i, row in enumerate(named)]
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(passages), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({k: v for k, v in p.items() if v is not None}) + "\n" for p in passages))
    else:
        sink = io.StringIO()
        writer = csv.DictWriter(sink, list(passages[0]), delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
        writer.writeheader()
        for p in passages:
            cells = {k: json.dumps(v) if isinstance(v, list) else "" if v is None else str(v) for k, v in p.items()}
            writer.writerow(cells)
        path.write_text(sink.getvalue())
    return str(path)


def read(path: str, metadata: list[Any]) -> list[Row | Reject]:
    config = CorpusConfig(sources=[path], metadata=metadata)
    return list(read_all(corpus.plan_ingest(config).splits, read_options(config)))


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_format_gives_the_same_types_and_the_same_snapshot(tmp_path: Path, kind: str) -> None:
    path = source(tmp_path, kind, FACTS)
    assert [i.metadata for i in read(path, METADATA) if isinstance(i, Row)] == FACTS
    manifest, store = ingest(tmp_path / "root", sources=[path], metadata=METADATA)
    assert [row["metadata"] for row in rows_of(manifest, store)] == FACTS
    other, _ = ingest(tmp_path / "other", sources=[source(tmp_path, "jsonl", FACTS)], metadata=METADATA)
    assert manifest["snapshot"] == other["snapshot"]


def test_values_that_do_not_fit_send_the_row_to_quarantine(tmp_path: Path) -> None:
    rows = [{**FACTS[0]}, {**FACTS[0], "year": "soon"}, {**FACTS[0], "tags": [{"a": 1}]}, {**FACTS[0], "lang": 5}]
    items = read(source(tmp_path, "jsonl", rows), METADATA)
    assert [type(i) for i in items] == [Row, Reject, Reject, Reject]
    assert {i.reason for i in items[1:] if isinstance(i, Reject)} == {"bad_metadata"}
    assert isinstance(items[1], Reject)
    assert items[1].detail == "metadata 'year' is 'soon'; expected a whole number of 64 bits"
    manifest, _ = ingest(tmp_path, sources=[str(tmp_path / "rows.jsonl")], metadata=METADATA, max_quarantined_share=0.8)
    assert (manifest["num_rows"], manifest["num_quarantined"]) == (1, 3)


@pytest.mark.parametrize(
    ("kind", "fits", "misfits"),
    [
        ("string", [("a", "a"), ("", "")], [1, 1.5, True, ["a"], {}]),
        ("int", [(3, 3), (3.0, 3), ("-3", -3), (" 7 ", 7), (2**63 - 1, 2**63 - 1), (float("nan"), None)],
         [1.5, "1.5", "", "x", "1_0", True, 2**63, float("inf"), "9" * 20, "9" * 5000, [1]]),
        ("float", [(1, 1.0), ("1e3", 1000.0), (float("nan"), None), ("nan", None)],
         ["", "x", "1_0", True, 10**400, float("-inf"), "inf", [1.0]]),
        ("bool", [(True, True), ("FALSE", False), ("1", True), (0, False)], ["yes", 2, 1.0, "", []]),
        ("strings", [(["a"], ["a"]), ("a", ["a"]), ('["a", "b"]', ["a", "b"]), ([], []), ([1], ["1"])],
         [[["a"]], {}, 1, [True]]),
    ],
)  # fmt: skip
def test_what_fits_a_type(kind: str, fits: list[tuple[Any, Any]], misfits: list[Any]) -> None:
    field = MetadataField("f", kind, "f")
    for value, expected in fits:
        found = typed([(field, value)])
        assert found == {"f": expected}
        assert type(found["f"]) is type(expected)
    for value in misfits:
        with pytest.raises(RefusedRowError, match="bad_metadata"):
            typed([(field, value)])


@given(st.sampled_from(["int", "float", "bool", "strings", "string"]), st.data())
def test_whatever_is_typed_fits_its_arrow_type(kind: str, data: st.DataObject) -> None:
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    value = data.draw(scalar | st.lists(scalar, max_size=3))
    try:
        found = typed([(MetadataField("f", kind, "f"), value)])
    except RefusedRowError:
        return
    assert found is not None
    assert pa.array([found["f"]], METADATA_TYPES[kind]).to_pylist() == [found["f"]]


def test_parquet_columns_of_dates_dictionaries_and_missing_numbers(tmp_path: Path) -> None:
    import datetime

    day = datetime.date(2020, 2, 29)
    table = pa.table({
        "id": ["1", "2"], "text": ["a", "b"], "day": [day, None], "lang": pa.array(["en", None]).dictionary_encode(),
        "at": pa.array([1, None], pa.timestamp("ns")), "year": [1990.0, float("nan")],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    found = read(str(tmp_path / "t.parquet"), ["day", "lang", "at", {"name": "year", "type": "int"}])
    assert [i.metadata for i in found if isinstance(i, Row)] == [
        {"day": "2020-02-29", "lang": "en", "at": "1970-01-01 00:00:00.000000001", "year": 1990},
        {"day": None, "lang": None, "at": None, "year": None},
    ]


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_a_misspelt_column_is_told_with_the_nearest(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=r"no 'keyword' for metadata 'tags'[\s\S]*did you mean 'keywords'"):
        read(source(tmp_path, kind, FACTS), [{"name": "tags", "type": "strings", "column": "keyword"}])


def test_a_parquet_column_of_another_type_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"column 'year' holds int64, metadata 'year' is of type string[\s\S]*: int"):
        read(source(tmp_path, "parquet", FACTS), ["year"])


def test_nested_keys_of_json(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": "1", "text": "a", "meta": {"year": 7}}\n{"id": "2", "text": "b"}\n')
    found = read(str(tmp_path / "t.jsonl"), [{"name": "year", "type": "int", "column": "meta.year"}])
    assert [i.metadata for i in found if isinstance(i, Row)] == [{"year": 7}, {"year": None}]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (["any"], "word of the filter language"),
        (["a", {"name": "a"}], "names a field twice: a, a"),
        ([{"name": "a", "type": "date"}], "type"),
        (["a b"], "String should match pattern"),
        ([{"name": "a", "typ": "int"}], r"unknown key 'corpus.metadata.0.typ'; did you mean 'type'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(metadata: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"corpus": {"sources": ["x"], "metadata": metadata}, "encoder": {"checkpoint": "x"}})


@pytest.mark.parametrize("form", ["pydocs", "images"])
def test_formats_without_columns_refuse_metadata(form: str) -> None:
    content = {"corpus": {"sources": ["x"], "format": form, "metadata": ["a"]}, "encoder": {"checkpoint": "x"}}
    with pytest.raises(ConfigError, match="no columns to take metadata from"):
        parse_config(content)


def test_without_metadata_snapshots_and_inputs_keep_their_names(tmp_path: Path) -> None:
    """The names are those that versions before metadata gave, so that nothing is ingested or encoded again."""
    rows = [json.dumps({"id": str(i), "text": f"t {i}", "year": 1990 + i}) + "\n" for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    config = CorpusConfig(sources=[str(tmp_path / "a.jsonl")])
    plan = corpus.plan_ingest(config)
    settings = {"format": "auto", "columns": {}, "part_size": 16384, "split_bytes": 64 << 20, "max_row_bytes": 1 << 20}
    version = corpus.plan_ingest(config).splits[0].url
    assert plan.inputs == fingerprint([FORMAT_VERSION, [[version, file_version(version)]], settings])
    manifest, store = ingest(tmp_path, sources=[str(tmp_path / "a.jsonl")])
    assert manifest["snapshot"] == "039725897fcbf0d1"
    assert pq.read_schema(store.path("part-00000.parquet")).equals(PASSAGE)
    with_year, _ = ingest(tmp_path, sources=[str(tmp_path / "a.jsonl")], metadata=[{"name": "year", "type": "int"}])
    as_float, _ = ingest(tmp_path, sources=[str(tmp_path / "a.jsonl")], metadata=[{"name": "year", "type": "float"}])
    assert len({m["snapshot"] for m in (manifest, with_year, as_float)}) == 3


def test_a_versions_passages_carry_the_metadata(tmp_path: Path) -> None:
    manifest, _ = ingest(tmp_path, sources=[source(tmp_path, "jsonl", FACTS * 3)], metadata=METADATA, part_size=2)
    encoder = {"fingerprint": "f", "query_fingerprint": "f"}
    embedded = {"encoder": encoder, "snapshot": manifest["snapshot"], "dim": 8, "num_rows": 9}
    plan = plan_build(str(tmp_path), IndexConfig(num_shards=2), manifest, embedded, 1)
    receipts = [receipt for shard in plan.shards for receipt in write_passages(plan, shard)]
    files = {receipt.name: receipt.as_entry() for receipt in receipts}
    described = {"name": "index", "version": plan.version, "num_shards": 2, "files": files}
    passages = Passages(str(tmp_path), described)
    assert passages.fields == {"lang": "string", "year": "int", "score": "float", "open": "bool", "tags": "strings"}
    hits = passages.hits(np.zeros((1, 9), np.float32), np.arange(9)[None])[0]
    assert [hit.passage.metadata for hit in hits] == FACTS * 3
    assert hits[0].passage.as_dict()["metadata"] == FACTS[0]
    assert hits[2].passage.as_dict()["metadata"] == {}
