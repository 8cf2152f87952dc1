"""Queries of many requests in one batch: all get their own answers, in time, and only the guilty one an error."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.batcher import Batcher
from pipelines.errors import BusyError, InputError
from pipelines.retrieve import Retriever
from tests.local_backend import TEXTS
from tests.two_versions import build_two

FAR = float("inf")


@pytest.fixture(scope="module")
def retrievers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Retriever, Retriever]:
    """An unsharded and a sharded version, of different encoders."""
    two = build_two(tmp_path_factory.mktemp("batcher"))
    return Retriever(two.root, two.manifest(two.old)), Retriever(two.root, two.manifest(two.new))


def run_all(batcher: Batcher, requests: list[tuple[Retriever, list[str], int]]) -> list[Any]:
    async def together() -> list[Any]:
        asked = [batcher.run(retriever, texts, (k, None), FAR) for retriever, texts, k in requests]
        return await asyncio.gather(*asked, return_exceptions=True)

    try:
        return asyncio.run(together())
    finally:
        batcher.close()


REQUESTS = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.sampled_from(TEXTS), min_size=1, max_size=9), st.integers(1, 12)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(requests=REQUESTS, max_tokens=st.sampled_from([1, 20, 64, 4096]))
def test_every_request_gets_what_it_would_alone(
    retrievers: tuple[Retriever, Retriever], requests: list[tuple[int, list[str], int]], max_tokens: int
) -> None:
    wanted = [(retrievers[which], texts, k) for which, texts, k in requests]
    for (retriever, texts, k), found in zip(wanted, run_all(Batcher(max_tokens, 1), wanted), strict=True):
        emb_BD = retriever.encoder.encode_queries(texts)
        score_BK, row_BK = retriever.search_vectors(emb_BD, k)
        np.testing.assert_allclose(found.emb_BD, emb_BD, atol=1e-6)
        np.testing.assert_allclose(found.score_BK, score_BK, atol=1e-5)
        assert found.row_BK.shape == row_BK.shape
        assert set(found.seconds) == {"wait", "encode", "search"}


def test_what_arrives_together_is_one_batch_and_tokens_bound_it(retrievers: tuple[Retriever, Retriever]) -> None:
    whole, _ = retrievers
    tokens = len(whole.encoder.tokeniser.queries(TEXTS[:1]).ids)
    requests = [(whole, TEXTS[:1], 3)] * 30
    wide = max(found.num_batched for found in run_all(Batcher(100_000, 1), requests))
    narrow = max(found.num_batched for found in run_all(Batcher(4 * tokens, 1), requests))
    assert wide > 4
    assert narrow <= 4


def test_a_long_request_lets_short_ones_through(retrievers: tuple[Retriever, Retriever]) -> None:
    whole, _ = retrievers
    batcher, order = Batcher(64, 1), list[str]()

    async def ask(name: str, texts: list[str]) -> None:
        await batcher.run(whole, texts, (3, None), FAR)
        order.append(name)

    async def both() -> None:
        long = asyncio.create_task(ask("long", TEXTS * 10))
        await asyncio.sleep(0)
        await asyncio.gather(long, ask("short", TEXTS[:1]))

    asyncio.run(both())
    batcher.close()
    assert order == ["short", "long"]


def test_only_the_guilty_request_fails(retrievers: tuple[Retriever, Retriever]) -> None:
    whole, _ = retrievers
    good, bad = (whole, TEXTS[:2], 3), (whole, TEXTS[:2], 10_000)  # more hits than there are passages
    found = run_all(Batcher(4096, 1), [good, bad, good])
    assert [isinstance(one, BaseException) for one in found] == [False, True, False]
    assert "10000" in str(found[1])


def test_a_tokeniser_that_refuses_fails_its_request_alone(
    retrievers: tuple[Retriever, Retriever], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = retrievers
    real = whole.encoder.tokeniser.queries

    def picky(texts: list[str]) -> Any:
        if "bad" in texts:
            raise InputError("this text cannot be tokenised")
        return real(texts)

    monkeypatch.setattr(whole.encoder.tokeniser, "queries", picky)
    found = run_all(Batcher(4096, 1), [(whole, ["bad"], 3), (whole, TEXTS[:1], 3)])
    assert isinstance(found[0], InputError)
    assert len(found[1].row_BK) == 1


def test_a_query_whose_time_is_over_is_not_encoded(retrievers: tuple[Retriever, Retriever]) -> None:
    batcher = Batcher(4096, 1)
    with pytest.raises(BusyError, match="time was over"):
        asyncio.run(batcher.run(retrievers[0], TEXTS[:1], (3, None), time.monotonic() - 1))
    batcher.close()


def test_a_caller_who_left_costs_nothing_and_the_next_is_answered(retrievers: tuple[Retriever, Retriever]) -> None:
    batcher = Batcher(4096, 1)

    async def leave_and_ask() -> Any:
        gone = asyncio.create_task(batcher.run(retrievers[0], TEXTS[:1], (3, None), FAR))
        await asyncio.sleep(0)
        gone.cancel()
        return await batcher.run(retrievers[0], TEXTS[:2], (3, None), FAR)

    assert len(asyncio.run(leave_and_ask()).row_BK) == 2
    batcher.close()
