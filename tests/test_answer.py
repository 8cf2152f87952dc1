"""Answers from hits: stored ones, and those of a tiny FiD reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.answer import StoredAnswers, answer, answers, check_reader, load_reader
from pipelines.errors import CheckpointError, ConfigError
from pipelines.models.base import Answer
from pipelines.models.fid import FidReader
from pipelines.schema import Hit, Passage
from tests.checkpoints import write_cross_encoder, write_dpr
from tests.checkpoints.fid import write_fid, write_t5_tokeniser

QA = [
    Hit(0, 3.0, Passage("0", "", "who was king", [])),
    Hit(1, 2.5, Passage("1", "", "who wrote the book", ["Ray", "the king"])),
    Hit(2, 2.0, Passage("2", "", "who was first", ["Egypt"])),
]
TEXTS = [Hit(row, -float(row), Passage(str(row), "Alexandria", text)) for row, text in enumerate(["a king", "a river"])]


@pytest.fixture(scope="module")
def fid_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A reader in the released layout, and the tokeniser it lacks."""
    folder = tmp_path_factory.mktemp("fid")
    return write_fid(str(folder / "reader"), seed=4), write_t5_tokeniser(str(folder / "t5"))


def test_stored_answers_come_from_the_first_hit_that_has_any() -> None:
    reader = StoredAnswers()
    assert answer(reader, "who wrote it?", QA, 3) == [Answer("Ray", 0.5, 1)]
    assert answer(reader, "who wrote it?", QA[1:], 3) == [Answer("Ray", 1.0, 0)]
    assert answer(reader, "who wrote it?", QA[2:], 1) == [Answer("Egypt", 1.0, 0)]


def test_without_stored_answers_there_is_none() -> None:
    assert answer(StoredAnswers(), "who?", QA, 1) == []
    assert answer(StoredAnswers(), "who?", TEXTS, 5) == []
    assert answer(StoredAnswers(), "who?", [], 5) == []
    with pytest.raises(ValueError, match="shorter"):
        answers(StoredAnswers(), ["who?", "what?"], [QA], 5)


def test_many_questions_are_each_answered_from_their_own_hits() -> None:
    found = answers(StoredAnswers(), ["a", "b", "c"], [QA, [], QA[2:]], 2)
    assert found == [[Answer("Ray", 0.5, 1)], [], [Answer("Egypt", 1.0, 0)]]
    assert answers(StoredAnswers(), [], [], 2) == []


@pytest.mark.parametrize("depth", [0, -1])
def test_a_depth_of_nothing_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match="depth"):
        answer(StoredAnswers(), "who?", QA, depth)


def test_load_reader_by_what_the_checkpoint_is(fid_checkpoint: tuple[str, str]) -> None:
    checkpoint, tokeniser = fid_checkpoint
    assert isinstance(load_reader("stored"), StoredAnswers)
    reader = load_reader(checkpoint, "fp32", "cpu", tokeniser)
    assert isinstance(reader, FidReader)
    assert isinstance(load_reader(f"file://{checkpoint}", tokeniser=f"file://{tokeniser}"), FidReader)
    alone = reader.answer(["who?"], [[hit.passage for hit in TEXTS[:1]]])[0]
    both = reader.answer(["who?"], [[hit.passage for hit in TEXTS]])[0]
    assert answer(reader, "who?", TEXTS, 1) == alone
    assert answer(reader, "who?", TEXTS, 9) == both
    assert alone[0].score != both[0].score
    (one, none, two) = answers(reader, ["who?", "who?", "who?"], [TEXTS[:1], [], TEXTS], 9)
    assert none == []
    assert [own[0].text for own in (one, two)] == [own[0].text for own in (alone, both)]
    assert both[0].passage == -1


def test_a_dpr_reader_brings_its_own_tokeniser(tmp_path: Path, fid_checkpoint: tuple[str, str]) -> None:
    checkpoint = write_dpr(str(tmp_path), "reader")
    found = answer(load_reader(checkpoint), "who wrote it?", TEXTS, 2)
    assert {own.passage for own in found} <= {0, 1}
    assert all(TEXTS[own.passage].passage.text[own.start : own.end] == own.text for own in found)
    assert found
    with pytest.raises(ConfigError, match="its own tokeniser"):
        load_reader(checkpoint, tokeniser=fid_checkpoint[1])


def test_what_is_no_reader_is_refused(tmp_path: Path, fid_checkpoint: tuple[str, str]) -> None:
    checkpoint, tokeniser = fid_checkpoint
    with pytest.raises(CheckpointError, match=r"set answer\.tokeniser"):
        load_reader(checkpoint)
    with pytest.raises(ConfigError, match="stored answers"):
        load_reader("stored", tokeniser=tokeniser)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_reader("storedd")
    with pytest.raises(CheckpointError, match="cross encoder"):
        load_reader(write_cross_encoder(str(tmp_path / "reranker")))
    with pytest.raises(CheckpointError, match="encoder"):
        load_reader(write_dpr(str(tmp_path / "dpr"), "query"))
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(CheckpointError, match="file"):
        load_reader(str(tmp_path / "notes.txt"))


def test_auto_is_settled_before_the_reader_sees_it(tmp_path: Path, fid_checkpoint: tuple[str, str]) -> None:
    checkpoint, t5 = fid_checkpoint
    auto, plain = load_reader(checkpoint, "auto", tokeniser=t5), load_reader(checkpoint, "fp32", tokeniser=t5)
    assert [a.passage for a in answer(auto, "who?", TEXTS, 2)] == [a.passage for a in answer(plain, "who?", TEXTS, 2)]
    reader = write_dpr(str(tmp_path / "dpr"), "reader")
    assert len(answer(load_reader(reader, "auto"), "who?", TEXTS, 2)) > 0


def test_a_reader_is_looked_at_before_it_is_loaded(tmp_path: Path, fid_checkpoint: tuple[str, str]) -> None:
    checkpoint, t5 = fid_checkpoint
    check_reader(checkpoint, t5)
    check_reader("stored")
    with pytest.raises(CheckpointError, match="without a tokeniser"):
        check_reader(checkpoint)
    with pytest.raises(ConfigError, match="stored answers"):
        check_reader("stored", t5)
    with pytest.raises(CheckpointError, match="not a reader"):
        check_reader(write_cross_encoder(str(tmp_path / "ce")))
