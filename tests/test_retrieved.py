"""Files of retrieved candidates: both forms read, written, and refused where they are broken."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import json_records
from pipelines.errors import ConfigError, InputError
from pipelines.retrieved import read_retrieved, write_retrieved
from pipelines.schema import Hit, Passage, Question

PAQ: list[dict[str, Any]] = [
    {
        "input_qa": {"question": "who wrote it", "answer": ["Homer", "A poet"], "id": "q7", "split": "test"},
        "retrieved_qas": [
            {
                "question": "who wrote the iliad",
                "answer": ["Homer"],
                "score": 0.25,
                "subsets": ["L1"],
                "passage_score": -3,
            },
            {"question": "who wrote 🏛 é", "answer": ["Virgil", "V."], "score": 1.5, "id": "42"},
        ],
    },
    {"input_qa": {"question": "empty", "answer": ["x"]}, "retrieved_qas": []},
]
DPR: list[dict[str, Any]] = [
    {
        "question": "where is it",
        "answers": ["Egypt"],
        "ctxs": [
            {
                "id": "wiki:12",
                "title": "Library",
                "text": "In Egypt.\nIt stood",
                "score": "81.23456",
                "has_answer": True,
            },
            {"id": "7", "title": "", "text": "Elsewhere", "score": "80.5", "has_answer": False},
        ],
    },
    {
        "id": 3,
        "question": "who",
        "answers": [],
        "target": "t",
        "ctxs": [{"id": "1", "title": "T", "text": "", "score": "1.0"}],
    },
]


def _lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _array(path: Path, records: list[Any], indent: int | None = 4) -> str:
    path.write_text(json.dumps(records, indent=indent) + "\n")
    return str(path)


# Reading


def test_paq_lines(tmp_path: Path) -> None:
    (first, hits), (second, none) = read_retrieved(_lines(tmp_path / "retrieved.jsonl", PAQ))
    assert (first.id, first.text, first.answers) == ("q7", "who wrote it", ["Homer", "A poet"])
    assert (second.id, second.text, none) == ("1", "empty", [])
    assert [hit.passage.text for hit in hits] == ["who wrote the iliad", "who wrote 🏛 é"]
    assert [hit.passage.answers for hit in hits] == [["Homer"], ["Virgil", "V."]]
    assert [hit.passage.id for hit in hits] == ["", "42"]
    assert [hit.row for hit in hits] == [0, 1]


def test_the_order_of_the_file_is_kept_whatever_the_scores_mean(tmp_path: Path) -> None:
    """PAQ's faiss runs store distances, so the best candidate has the smallest: nothing is sorted or negated."""
    ((_, hits), _) = read_retrieved(_lines(tmp_path / "distances.jsonl", PAQ))
    assert [hit.score for hit in hits] == [0.25, 1.5]


@pytest.mark.parametrize("indent", [None, 4])
def test_dpr_array(tmp_path: Path, indent: int | None) -> None:
    (first, hits), (second, _) = read_retrieved(_array(tmp_path / "nq.json", DPR, indent))
    assert (first.id, second.id) == ("0", "3")
    assert [hit.passage.id for hit in hits] == ["wiki:12", "7"]
    assert [hit.score for hit in hits] == [81.23456, 80.5]
    assert hits[0].passage.title == "Library"
    assert hits[0].passage.answers is None


def test_fid_lines_without_scores_keep_their_order(tmp_path: Path) -> None:
    record = {"question": "q", "answers": ["a"], "ctxs": [{"title": "t", "text": "x"}, {"title": None, "text": "y"}]}
    ((_, hits),) = read_retrieved(_lines(tmp_path / "fid.jsonl", [record]))
    assert [(hit.score, hit.passage.id, hit.passage.title) for hit in hits] == [(0.0, "", "t"), (-1.0, "", "")]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Objects and characters cut by a read are put together again."""
    expected = list(read_retrieved(_array(tmp_path / "a.json", DPR)))
    lines = list(read_retrieved(_lines(tmp_path / "b.jsonl", PAQ)))
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    assert list(read_retrieved(str(tmp_path / "a.json"))) == expected
    raw = "\ufeff" + "\r\n\r\n".join(json.dumps(record, ensure_ascii=False) for record in PAQ)
    (tmp_path / "b.jsonl").write_text(raw, encoding="utf-8")
    assert list(read_retrieved(str(tmp_path / "b.jsonl"))) == lines


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", 16)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAQ[0]) + "\nbroken\n")
    records = read_retrieved(str(path))
    assert next(records)[0].id == "q7"
    with pytest.raises(InputError, match="not JSON"):
        next(records)


# Round trips


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "new/folder/out.jsonl"])
def test_paq_round_trip(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    assert write_retrieved(str(target), read_retrieved(_lines(tmp_path / "in.jsonl", PAQ))) == 2
    text = gzip.decompress(target.read_bytes()).decode() if name.endswith("gz") else target.read_text()
    assert [json.loads(line) for line in text.splitlines()] == PAQ
    assert list(read_retrieved(str(target))) == list(read_retrieved(str(tmp_path / "in.jsonl")))
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


def test_dpr_round_trip(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    write_retrieved(str(target), read_retrieved(_array(tmp_path / "in.json", DPR)), "dpr")
    assert json.loads(target.read_text()) == DPR


def test_object_store_round_trip() -> None:
    records = [(Question("1", "q", ["a"]), [Hit(5, 1.0, Passage("p", "", "who", ["a"]))])]
    write_retrieved("memory://retrieved/out.jsonl.gz", records)
    ((question, hits),) = read_retrieved("memory://retrieved/out.jsonl.gz")
    assert (question.id, hits[0].passage.id, hits[0].score) == ("1", "p", 1.0)


def test_own_hits_are_written_with_ids_answers_and_rerank_scores(tmp_path: Path) -> None:
    question = Question("q1", "Where?", ["egypt"])
    hits = [Hit(9, 2.0, Passage("p", "T", "In Egypt.", ["here"]), 0.5), Hit(4, 3.0, Passage("r", "", "No"))]
    write_retrieved(str(tmp_path / "out.json"), [(question, hits)], "dpr")
    (record,) = json.loads((tmp_path / "out.json").read_text())
    assert record["id"] == "q1"
    assert [context["has_answer"] for context in record["ctxs"]] == [True, False]
    assert record["ctxs"][0]["score"] == "2.0"
    ((_, again),) = read_retrieved(str(tmp_path / "out.json"))
    assert [(h.score, h.rerank_score, h.passage.answers) for h in again] == [(2.0, 0.5, ["here"]), (3.0, None, None)]


@given(st.lists(st.tuples(st.text(), st.text(), st.floats(allow_nan=False, allow_infinity=False)), max_size=4))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str, float]]) -> None:
    path = str(tmp_path_factory.mktemp("any") / "out")
    hits = [Hit(i, score, Passage("", "", text, [answer])) for i, (text, answer, score) in enumerate(pairs)]
    for form in ("paq", "dpr"):
        write_retrieved(path, [(Question("1", "q"), hits)], form)
        ((_, again),) = read_retrieved(path)
        assert [(h.passage.text, h.passage.answers, h.score) for h in again] == [(t, [a], s) for t, a, s in pairs]


# Reranked


def _predictions(path: str) -> list[tuple[Any, ...]]:
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [tuple(record[key] for key in ("question", "prediction", "score", "index")) for record in records]


def test_the_rerankers_output(tmp_path: Path) -> None:
    """The prediction is the first answer of the best logit; its index counts in the list that was retrieved."""
    path = str(tmp_path / "reranked.jsonl")
    records = []
    for question, hits in read_retrieved(_lines(tmp_path / "in.jsonl", PAQ)):
        scored = [replace(hit, rerank_score=logit) for hit, logit in zip(hits, [-2.0, -1.5], strict=False)]
        records.append((question, sorted(scored, key=lambda hit: -(hit.rerank_score or 0))))
    assert write_retrieved(path, records, "reranked") == 2
    assert _predictions(path) == [("who wrote it", "Virgil", -1.5, 1), ("empty", "", None, -1)]


def test_without_logits_the_first_hit_wins(tmp_path: Path) -> None:
    path = str(tmp_path / "reranked.jsonl")
    write_retrieved(path, read_retrieved(_lines(tmp_path / "in.jsonl", PAQ)), "reranked")
    assert _predictions(path)[0] == ("who wrote it", "Homer", 0.25, 0)


def test_the_index_of_own_hits_follows_the_retrieval_score(tmp_path: Path) -> None:
    path = str(tmp_path / "reranked.jsonl")
    hits = [Hit(3, 1.0, Passage("b", "", "q", ["B"]), 9.0), Hit(8, 2.0, Passage("a", "", "q", ["A"]), 1.0)]
    write_retrieved(path, [(Question("1", "q"), hits)], "reranked")
    assert _predictions(path) == [("q", "B", 9.0, 1)]


# Refusals


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{"a": 1}\n', 1, "neither PAQ's nor DPR's"),
        ("\n\n[1]\n", 3, "JSON int"),
        ("3\n", 1, "JSON int"),
        ('{"question": "q", "ctxs": []}\n{"question"\n', 2, "not JSON"),
        ('{"question": "q", "ctxs": []} x\n', 1, "not JSON"),
        ('[{"question": "q", "ctxs": []},\n{"question": "q", "ctxs": [}]', 2, "not JSON"),
        ('[{"question": "q", "ctxs": []}\n{"question": "q", "ctxs": []}]', 2, "',' is missing"),
        ('[{"question": "q", "ctxs": []}\n', 2, "',' is missing"),
        ('[{"question": "q", "ctxs": []}]\n\nmore', 3, "after the end"),
        ('{"question": "q", "ctxs": {}}', 1, "no list of objects"),
        ('{"question": "q", "ctxs": ["x"]}', 1, "no list of objects"),
        ('{"question": 3, "ctxs": []}', 1, "`question` holds a int"),
        ('{"ctxs": []}', 1, "`question` is missing"),
        ('{"input_qa": "q", "retrieved_qas": []}', 1, "no object"),
        ('{"question": "q", "answers": [3], "ctxs": []}', 1, "`answers` holds a int"),
        ('{"question": "q", "ctxs": [{"text": "x", "score": "high"}]}', 1, "`score` holds 'high'"),
        ('{"question": "q", "ctxs": [{"text": "x", "score": NaN}]}', 1, "`score` holds 'nan'"),
        ('{"question": "q", "ctxs": [{"text": "x", "score": true}]}', 1, "`score` holds 'True'"),
        ('{"question": "q", "ctxs": [{"title": "x"}]}', 1, "`text` is missing"),
        ('{"question": "\\ud800", "ctxs": []}', 1, "not valid Unicode"),
        ("[" * 100_000, 1, "nested too deeply"),
        ('{"question": "q", "ctxs": []}\n{"id": ' + "1" * 5000 + "}\n", 2, "not JSON"),
        ('{"question": "q", "prediction": "p", "score": 1, "index": 0}', 1, "neither"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        list(read_retrieved(str(path)))
    assert f"line {line}" in caught.value.where


@pytest.mark.parametrize(
    "text", ['{"question": "q", "ctxs": []}\n{"question": "%s"}', '[{"question": "q", "ctxs": []},\n["%s']
)
def test_an_endless_record_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(json_records, "_CHUNK", 16)
    monkeypatch.setattr(json_records, "_LONGEST", 1000)
    path = tmp_path / "long.json"
    path.write_text(text % ("x" * 5000))
    pulled = 0
    more = json_records._Text.more

    def counting(self: Any, size: int = 16) -> None:
        nonlocal pulled
        pulled += size
        more(self, size)

    monkeypatch.setattr(json_records._Text, "more", counting)
    with pytest.raises(InputError, match="longer than 1,000 characters") as caught:
        list(read_retrieved(str(path)))
    assert caught.value.where == f"{path}, line 2"
    assert pulled < 1200


def test_other_bytes_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"question": "q", "ctxs": []}\n\xff\n')
    with pytest.raises(InputError, match="not UTF-8") as caught:
        list(read_retrieved(str(path)))
    assert caught.value.where.endswith("line 2")


def test_absent_empty_and_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "array").write_text("[]")
    (tmp_path / "plain.gz").write_text("{}")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(PAQ[0]).encode() * 50)[:60])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as handle:
        handle.writestr("a.jsonl", json.dumps(PAQ[0]))
    (tmp_path / "cut.zip").write_bytes(packed.getvalue()[:-30])
    (tmp_path / "cut.jsonl.zst").write_bytes(b"(\xb5/\xfd no more")
    found = {"empty": "no records", "array": "no records", "absent": "no such file", "plain.gz": "decompressed"}
    found |= {"cut.zip": "decompressed", "cut.jsonl.zst": "damaged"}
    for name, words in {**found, "cut.gz": "decompressed"}.items():
        with pytest.raises(InputError, match=words):
            list(read_retrieved(str(tmp_path / name)))
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_retrieved("nosuch://x/y"))


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    question, passage = Question("q3", "q"), Passage("p", "", "text")
    bad: list[tuple[Any, Any, str]] = [
        ([(question, [Hit(0, 1.0, passage)])], "paq", "no answer"),
        ([(question, [Hit(0, 1.0, passage)])], "reranked", "no answer"),
        ([(question, [Hit(0, float("nan"), replace(passage, answers=["a"]))])], "paq", "cannot be written"),
    ]
    for records, form, words in bad:
        with pytest.raises(InputError, match=words) as caught:
            write_retrieved(str(path), records, form)
        assert "q3" in caught.value.where
    with pytest.raises(ConfigError, match="unknown form"):
        write_retrieved(str(path), [], "csv")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no folder"):
        write_retrieved("memory://out.jsonl", [])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
