"""Reranking as a function, and the time that the stages behind retrieval are given."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.serve_stages import _Stage, within
from pipelines.answer import answers_within
from pipelines.models.base import Answer
from pipelines.rerank import rerank, rerank_all, rerank_within
from pipelines.schema import Hit, Passage


class LengthScorer:
    """A cross-encoder's double: the longer the passage, the better; a pause before each call."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause, self.calls = pause, 0

    def score(self, queries: Sequence[str], passages: Sequence[Passage]) -> npt.NDArray[np.float32]:
        assert len(queries) == len(passages)
        self.calls += 1
        time.sleep(self.pause)
        return np.array([len(passage.text) for passage in passages], np.float32)


class EchoReader:
    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> list[list[Answer]]:
        time.sleep(self.pause)
        return [[Answer(question, 1.0, 0)] if own else [] for question, own in zip(questions, passages, strict=True)]


def hits_of(lengths: Sequence[int]) -> list[Hit]:
    return [Hit(row, -float(row), Passage(str(row), "", "x" * length)) for row, length in enumerate(lengths)]


LENGTHS = st.lists(st.integers(1, 5), max_size=12)


@given(st.lists(LENGTHS, max_size=5), st.integers(1, 15))
def test_reranking_many_equals_reranking_each(lengths: list[list[int]], depth: int) -> None:
    hits = [hits_of(few) for few in lengths]
    together = rerank_all(LengthScorer(), [str(i) for i in range(len(hits))], hits, depth)
    assert together == [rerank(LengthScorer(), str(i), few, depth) for i, few in enumerate(hits)]
    for before, after in zip(hits, together, strict=True):
        assert sorted(h.row for h in after) == [h.row for h in before]  # nothing lost or doubled
        head = after[:depth]
        assert [h.rerank_score for h in head] == sorted((float(len(h.passage.text)) for h in head), reverse=True)
        ties = [(h.rerank_score, -h.row) for h in head]
        assert ties == sorted(ties, reverse=True)  # equal scores keep the order of retrieval
        assert after[depth:] == before[depth:]


def test_a_reranking_that_takes_too_long_gives_nothing() -> None:
    slow, hits = LengthScorer(pause=0.05), hits_of([1] * 500)
    assert rerank_within(slow, ["q"], [hits], None, 0.02) is None
    assert slow.calls == 1  # it looked at the clock after the first pairs
    assert rerank_within(LengthScorer(), ["q"], [hits], None, 60.0) == [rerank(LengthScorer(), "q", hits)]
    assert rerank_within(LengthScorer(), [], [], None, 60.0) == []


def test_an_answering_that_takes_too_long_gives_nothing() -> None:
    hits = [hits_of([3]), hits_of([3]), []]
    assert answers_within(EchoReader(0.05), ["a", "b", "c"], hits, 5, 0.02) is None
    assert answers_within(EchoReader(), ["a", "b", "c"], hits, 5, 60.0) == [
        [Answer("a", 1.0, 0)],
        [Answer("b", 1.0, 0)],
        [],
    ]


class Reply:
    """A deployment's reply that comes after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.cancelled = seconds, False

    def __await__(self) -> Any:
        yield from asyncio.sleep(self.seconds).__await__()
        return "answer"

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(("takes", "left", "expected"), [(0.0, 5.0, "answer"), (5.0, 0.05, None), (0.0, -1.0, None)])
def test_a_request_waits_for_a_stage_no_longer_than_it_may(takes: float, left: float, expected: str | None) -> None:
    reply = Reply(takes)
    found = asyncio.run(within(time.monotonic() + left, lambda seconds: reply))
    assert found == expected
    assert reply.cancelled is (left > 0 and expected is None)


def test_a_stage_works_for_one_request_after_the_other_and_not_for_late_ones() -> None:
    """Waiting for one's turn counts; a request whose time is over by then costs no work."""
    running, worst, done = 0, 0, []
    lock = threading.Lock()

    def work(left: float) -> str:
        nonlocal running, worst
        with lock:
            running += 1
            worst = max(worst, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        done.append(left)
        return "done"

    async def ask() -> list[Any]:
        stage = _Stage()
        return await asyncio.gather(*(stage._run(seconds, work) for seconds in (30.0, 30.0, 0.05, 30.0)))

    assert asyncio.run(ask()) == ["done", "done", None, "done"]
    assert (worst, len(done)) == (1, 3)
