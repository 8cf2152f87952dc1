"""Consistency filtering: which lines are marked, from what evidence, with what questions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ConfigError, InputError
from pipelines.models.base import Answer
from pipelines.questions import read_lines, write_lines
from pipelines.questions.filter import filter_questions, global_evidence, local_evidence, mark_all
from pipelines.schema import Hit, Passage
from tests.checkpoints.fid import write_fid, write_t5_tokeniser

PASSAGES = {str(n): Passage(str(n), f"title {n}", text) for n, text in enumerate(["The Nile.", "a king", "Egypt"])}


def _line(question: str, answer: str, passage_id: str = "0", **metadata: Any) -> dict[str, Any]:
    return {"passage_id": passage_id, "answer": answer, "question": question, "metadata": metadata}


class FirstText:
    """A reader that answers the text of the first passage, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> list[list[Answer]]:
        self.asked.append(list(questions))
        return [[Answer(own[0].text, -1.0)] if own else [] for _, own in zip(questions, passages, strict=True)]


def _marks(lines: Iterator[dict[str, Any]]) -> list[tuple[Any, Any]]:
    return [(line["metadata"]["consistent"], line["metadata"]["filter_answer"]) for line in lines]


def test_local_reads_the_source_passage() -> None:
    """The test is exact match after normalisation: case, punctuation and articles do not count."""
    lines = [_line("where?", "nile", "0"), _line("who?", "the king", "1"), _line("who?", "king of Egypt", "1")]
    marked = filter_questions(iter(lines), FirstText(), local_evidence(PASSAGES.get))
    assert _marks(marked) == [(True, "The Nile."), (True, "a king"), (False, "a king")]


def test_no_evidence_is_no_agreement() -> None:
    lines = [_line("who?", "king", "9"), _line("who?", "", "9")]
    assert _marks(filter_questions(lines, FirstText(), local_evidence(PASSAGES.get))) == [(False, None)] * 2
    assert _marks(filter_questions(lines, FirstText(), lambda batch: [[] for _ in batch])) == [(False, None)] * 2


def test_global_searches_with_the_normalised_question_and_reads_the_written_one() -> None:
    searched: list[tuple[list[str], int]] = []

    def search(queries: list[str], k: int) -> list[list[Hit]]:
        searched.append((queries, k))
        return [[Hit(2, 1.0, PASSAGES["2"]), Hit(0, 0.5, PASSAGES["0"])] if query else [] for query in queries]

    reader = FirstText()
    lines = [_line(" Which Country?? ", "egypt"), _line("??", "egypt")]
    assert _marks(filter_questions(lines, reader, global_evidence(search))) == [(True, "Egypt"), (False, None)]
    assert searched == [(["which country", ""], 50)]
    assert reader.asked == [["Which Country??", "??"]]
    list(filter_questions(lines, reader, global_evidence(search, k=3)))
    assert searched[1][1] == 3


def test_global_gives_the_reader_every_hit_in_order() -> None:
    hits = [Hit(row, 1.0 / (row + 1), passage) for row, passage in enumerate(PASSAGES.values())]
    evidence = global_evidence(lambda queries, k: [hits[:k] for _ in queries], k=2)
    assert evidence([_line("who?", "x")]) == [[PASSAGES["0"], PASSAGES["1"]]]


def test_lines_stay_whole_in_order_and_unchanged() -> None:
    """Nothing is removed, other metadata stays, the input is not written to, and batches do not matter."""
    lines = [_line(f"question {n}?", "nile", str(n % 4), ae_score=n, consistent="old") for n in range(11)]
    before = copy.deepcopy(lines)
    results = [list(filter_questions(lines, FirstText(), local_evidence(PASSAGES.get), size)) for size in (1, 4, 100)]
    assert lines == before
    assert results[0] == results[1] == results[2]
    for line, marked in zip(lines, results[0], strict=True):
        own = marked["metadata"]
        assert {**marked, "metadata": None} == {**line, "metadata": None}
        assert own == {"ae_score": line["metadata"]["ae_score"], **{k: own[k] for k in ("consistent", "filter_answer")}}
    assert [line["metadata"]["consistent"] for line in results[0]] == [n % 4 == 0 for n in range(11)]


def test_lines_are_read_no_further_than_asked() -> None:
    taken: list[int] = []

    def source() -> Iterator[dict[str, Any]]:
        for number in range(100):
            taken.append(number)
            yield _line("where?", "nile")

    marked = filter_questions(source(), FirstText(), local_evidence(PASSAGES.get), batch_size=4)
    next(marked)
    assert len(taken) == 4


def test_a_line_without_metadata_gets_some() -> None:
    line = {"question": "where?", "answer": "nile", "passage_id": "0", "metadata": None}
    (marked,) = filter_questions([line], FirstText(), local_evidence(PASSAGES.get))
    assert marked["metadata"] == {"consistent": True, "filter_answer": "The Nile."}


def test_dummy_marks_everything() -> None:
    lines = [_line("who?", "king", ae_score=1), _line("", "")]
    marked = list(mark_all(iter(lines)))
    assert _marks(iter(marked)) == [(True, None), (True, None)]
    assert marked[0]["metadata"]["ae_score"] == 1
    assert "consistent" not in lines[0]["metadata"]


def test_malformed_lines_and_settings_are_refused(tmp_path: Path) -> None:
    evidence = local_evidence(PASSAGES.get)
    good = _line("where?", "nile")
    for change, message in [
        ({"question": None}, "has no question"),
        ({"answer": ["x"]}, "has no answer"),
        ({"passage_id": None}, "no passage_id"),
        ({"metadata": "x"}, "metadata is no object"),
    ]:
        write_lines(str(tmp_path / "in.jsonl"), [good, good | change])
        for read in (mark_all, lambda lines: filter_questions(lines, FirstText(), evidence, 1)):
            with pytest.raises(InputError, match=rf"{message}[\s\S]*in\.jsonl, line 2"):
                list(read(read_lines(str(tmp_path / "in.jsonl"))))
    with pytest.raises(ConfigError, match="batch_size is 0"):
        list(filter_questions([good], FirstText(), evidence, 0))
    with pytest.raises(ConfigError, match="k is 0"):
        global_evidence(lambda queries, k: [], k=0)


def test_with_a_fid_reader(tmp_path: Path) -> None:
    """Marked consistent exactly where the extracted answer is what the reader writes."""
    from pipelines.models import fid

    reader = fid.load(write_fid(str(tmp_path), seed=4), tokeniser=write_t5_tokeniser(str(tmp_path / "t5")))
    questions = [f"{word} is the king?" for word in ("who", "what", "where", "when")]
    written = [own[0].text for own in reader.answer(questions, [[PASSAGES["0"]]] * 4)]
    assert any(written)
    right = [_line(f" {question}", text.upper()) for question, text in zip(questions, written, strict=True)]
    wrong = [_line(question, f"{text} river") for question, text in zip(questions, written, strict=True)]
    marked = filter_questions([*right, *wrong], reader, local_evidence(PASSAGES.get), 3)
    assert _marks(marked) == [(True, text) for text in written] + [(False, text) for text in written]
