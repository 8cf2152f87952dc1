"""Sources become the same snapshot however they come and however they are read; bad rows are counted, never lost."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import corpus
from pipelines.config import CorpusConfig
from pipelines.errors import ArtifactError, InputError
from pipelines.readers import settle
from pipelines.schema import PASSAGE
from pipelines.storage import Store


def ingest(root: Path, **options: Any) -> tuple[dict[str, Any], Store]:
    """Do the whole ingest in a plain loop."""
    plan = corpus.plan_ingest(CorpusConfig(**options))
    staging = corpus.staging_store(str(root), plan)
    staged: dict[int, corpus.Staged] = {}

    def read(start_at: Mapping[int, int | None]) -> dict[int, tuple[int, int]]:
        staged.update({i: corpus.stage_split(staging, plan, plan.splits[i], start) for i, start in start_at.items()})
        return {i: (staged[i].first, staged[i].end) for i in start_at}

    settle(plan.splits, read)
    ordered = [staged[i] for i in sorted(staged)]
    resolved = corpus.resolve(staging, plan, ordered)
    snapshot = corpus.corpus_store(str(root), plan.config.name).child(resolved.snapshot)
    refused = corpus.write_quarantine(staging, snapshot, ordered, resolved.dropped, plan)
    parts = [corpus.cut_part(staging, snapshot, resolved, i) for i in range(len(resolved.parts))]
    return corpus.publish_snapshot(str(root), plan, resolved, parts, refused, {}), snapshot


def rows_of(manifest: dict[str, Any], store: Store) -> list[dict[str, Any]]:
    return [row for entry in manifest["parts"] for row in corpus.read_part(store, entry).to_pylist()]


def write_tsv(path: Path, rows: list[tuple[str, str, str]]) -> str:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
        writer.writerows([("id", "text", "title"), *rows])
    return str(path)


ROWS = [(str(i), f'text "{i}"\nwith a newline and ünïcode', f"title {i}") for i in range(100)]


def test_parts_are_full_in_order_and_readable_by_plain_pyarrow(tmp_path: Path) -> None:
    manifest, store = ingest(tmp_path, sources=[write_tsv(tmp_path / "a.tsv", ROWS)], part_size=32, split_bytes=500)
    assert [p["num_rows"] for p in manifest["parts"]] == [32, 32, 32, 4]
    assert [p["first_row"] for p in manifest["parts"]] == [0, 32, 64, 96]
    assert [(r["id"], r["text"], r["title"]) for r in rows_of(manifest, store)] == ROWS
    assert pq.read_schema(store.path("part-00000.parquet")).equals(PASSAGE)


def test_same_rows_same_snapshot_whatever_the_form(tmp_path: Path) -> None:
    texts = write_tsv(tmp_path / "a.tsv", ROWS)
    zipped = write_tsv(tmp_path / "a.tsv.gz", ROWS)
    first, second = write_tsv(tmp_path / "b0.tsv", ROWS[:41]), write_tsv(tmp_path / "b1.tsv", ROWS[41:])
    table = pa.table({"id": [r[0] for r in ROWS], "text": [r[1] for r in ROWS], "title": [r[2] for r in ROWS]})
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=7)
    lines = "".join(json.dumps({"id": i, "text": t, "title": n}) + "\n" for i, t, n in ROWS)
    (tmp_path / "d.jsonl").write_text(lines)
    forms = [[texts], [zipped], [first, second], [str(tmp_path / "c.parquet")], [str(tmp_path / "d.jsonl")]]
    found = [ingest(tmp_path / f"root{i}", sources=s, part_size=32, split_bytes=300) for i, s in enumerate(forms)]
    assert len({m["snapshot"] for m, _ in found}) == 1
    assert len({p["sha256"] for m, _ in found for p in m["parts"]}) == 4
    other, _ = ingest(tmp_path / "other", sources=[first], part_size=32)
    assert other["snapshot"] != found[0][0]["snapshot"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    split_bytes=st.integers(20, 2000),
    part_size=st.integers(1, 40),
    at_once=st.integers(1, 70),
)
def test_duplicates_go_to_quarantine_first_one_stays(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], split_bytes: int, part_size: int, at_once: int
) -> None:
    tmp_path = tmp_path_factory.mktemp("dup")
    rows = [(f"p{i}", f"text number {n}", "") for n, i in enumerate(ids)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_ROWS_AT_ONCE", at_once)  # several rounds, as with a corpus larger than memory
        manifest, store = ingest(
            tmp_path,
            sources=[write_tsv(tmp_path / "a.tsv", rows)],
            part_size=part_size,
            split_bytes=split_bytes,
            max_quarantined_share=1.0,
        )
    expected = {}
    for row in rows:
        expected.setdefault(row[0], row)
    assert [(r["id"], r["text"], r["title"]) for r in rows_of(manifest, store)] == list(expected.values())
    refused = pq.read_table(store.path("quarantine.parquet")).to_pylist()
    assert len(refused) == manifest["num_quarantined"] == len(rows) - len(expected)
    assert {r["reason"] for r in refused} <= {"duplicate_id"}
    assert sorted(r["snippet"] for r in refused) == sorted(r[1] for r in rows if r not in expected.values())


def test_bad_rows_are_quarantined_with_reasons_and_too_many_stop_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    good = "".join(f"{i}\ttext {i}\t\n" for i in range(20)).encode()
    path.write_bytes(
        b"id\ttext\ttitle\n" + good + b"21\t \tblank\n22\tonly two\n23\t\xff\xfe\tundecodable\n\tno id\t\n3\tagain\t\n"
    )
    options = {"sources": [str(path)], "max_quarantined_share": 0.5}
    manifest, store = ingest(tmp_path / "root", **options)
    reasons = sorted(r["reason"] for r in pq.read_table(store.path("quarantine.parquet")).to_pylist())
    assert reasons == ["duplicate_id", "missing_id", "missing_text", "undecodable", "wrong_field_count"]
    assert manifest["num_rows"] == 20
    with pytest.raises(InputError, match=r"5 of 25 rows were refused.*1 undecodable"):
        ingest(tmp_path / "strict", sources=[str(path)])


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no passages"):
        ingest(tmp_path, sources=[write_tsv(tmp_path / "a.tsv", [])])


def test_staging_is_resumed_and_a_truncated_chunk_is_redone(tmp_path: Path) -> None:
    plan = corpus.plan_ingest(CorpusConfig(sources=[write_tsv(tmp_path / "a.tsv", ROWS)], split_bytes=2000))
    staging = corpus.staging_store(str(tmp_path), plan)
    first = [corpus.stage_split(staging, plan, s) for s in plan.splits]
    again = [corpus.stage_split(staging, plan, s) for s in plan.splits]
    assert not any(s.reused for s in first)
    assert all(s.reused for s in again)
    chunk = Path(staging.path(first[0].chunks[0][0]))
    chunk.write_bytes(chunk.read_bytes()[:-10])
    assert not corpus.stage_split(staging, plan, plan.splits[0]).reused


def test_unchanged_sources_are_recognised_and_changed_ones_are_not(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", ROWS)
    manifest, _ = ingest(tmp_path, sources=[path])
    plan = corpus.plan_ingest(CorpusConfig(sources=[path]))
    left = tmp_path / "corpora" / "corpus" / f".staging-{plan.inputs}" / "chunk-000000-00000.parquet"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"what a slower driver on the same inputs wrote after the faster one had cleaned up")
    assert corpus.find_snapshot(str(tmp_path), plan) == manifest
    assert not left.parent.exists()
    write_tsv(tmp_path / "a.tsv", ROWS[:-1])
    assert corpus.find_snapshot(str(tmp_path), corpus.plan_ingest(CorpusConfig(sources=[path]))) is None


def test_a_tampered_part_is_refused(tmp_path: Path) -> None:
    manifest, store = ingest(tmp_path, sources=[write_tsv(tmp_path / "a.tsv", ROWS)])
    path = Path(store.path("part-00000.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        corpus.read_part(store, manifest["parts"][0])


def test_qa_pairs_carry_their_answers(tmp_path: Path) -> None:
    (tmp_path / "paq.jsonl").write_text(
        '{"question": "who?", "answer": ["me", "I"]}\n{"question": "when?", "answer": ["now"]}\n'
    )
    manifest, store = ingest(tmp_path, sources=[str(tmp_path / "paq.jsonl")])
    assert [(r["text"], r["answers"]) for r in rows_of(manifest, store)] == [("who?", ["me", "I"]), ("when?", ["now"])]
