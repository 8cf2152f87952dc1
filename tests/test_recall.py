"""What recall is measured on: the same however rows and queries are cut, and without the rows that are never found."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import index as index_verb
from pipelines import recall
from pipelines.build import Rows, row_groups
from pipelines.index.exact import exact_topk
from pipelines.index.search import merge_topk
from pipelines.index.tune import HeldOut, Trial
from tests.test_twins import N, World, X, build

QUERIES = np.concatenate([X[::9] + 0.05, X[1::9] * 0.1]).astype(np.float32)
UNFIT = [0, 9, 150, 201]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def in_some_order(function: Any, items: Sequence[Any], *common: Any, num_cpus: float = 1.0) -> Iterator[Any]:
    """Run tasks in this process; they finish in an order of their own."""
    positions = random.Random(3).sample(range(len(items)), len(items))
    return ((position, function(items[position], *common)) for position in positions)


def tried(plan: Any, monkeypatch: pytest.MonkeyPatch, num_pieces: int, params: dict[str, int]) -> tuple[Trial, Any]:
    """Try a setting on the built shards; return the trial and the rows that were found."""
    monkeypatch.setattr(index_verb, "run_tasks", in_some_order)
    files = {receipt.name: receipt.as_entry() for receipt in build(plan)}
    content = {"name": plan.config.name, "version": plan.version, "dim": plan.dim, "files": files,
               "quarantined": plan.unfit_rows}  # fmt: skip
    exact = merge_topk([recall.exact_in(plan, rows, QUERIES, 5) for rows in row_groups(plan)], 5)[1]
    found: list[Any] = []
    asked = HeldOut(QUERIES, exact)

    class Told(HeldOut):
        def trial(self, params: Any, found_QK: Any, seconds: float) -> Trial:
            found.append(found_QK)
            return super().trial(params, found_QK, seconds)

    return index_verb._try(plan, content, Told(asked.queries_QD, asked.exact_QK), params, num_pieces), found[0]


@pytest.mark.parametrize("index", [{"factory": "IVF4,SQ8", "num_shards": 2}, {"factory": "HNSW8", "num_shards": 1}])
def test_a_setting_finds_the_same_however_the_queries_are_cut(
    world: World, monkeypatch: pytest.MonkeyPatch, index: dict[str, Any]
) -> None:
    params = {"nprobe": 2} if "IVF" in index["factory"] else {"efSearch": 8}
    whole, expected = tried(world.plan(**index), monkeypatch, 1, params)
    for num_pieces in (2, 7):
        trial, found_QK = tried(world.plan(**index), monkeypatch, num_pieces, params)
        np.testing.assert_array_equal(found_QK, expected)
        assert (trial.recall, trial.half_width, trial.params) == (whole.recall, whole.half_width, params)
        assert trial.ms > 0


@pytest.mark.parametrize(("num_shards", "num_queries", "pieces"), [(1, 500, 10), (1, 2000, 16), (2, 500, 8),
                         (16, 500, 1), (40, 500, 1), (1, 60, 1), (3, 10, 1)])  # fmt: skip
def test_few_shards_cut_the_queries_and_many_do_not(
    world: World, num_shards: int, num_queries: int, pieces: int
) -> None:
    asked = HeldOut(np.zeros((num_queries, 8), np.float32), np.zeros((num_queries, 5), np.int64))
    assert index_verb._num_pieces(world.plan(num_shards=num_shards), asked) == pieces


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_rows_that_could_not_be_encoded_are_neither_sought_nor_found(
    world: World, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    every = exact_topk(QUERIES, [(X, np.arange(N))], 5, metric)[1]  # type: ignore[arg-type]
    assert np.isin(UNFIT, every).any()
    world.embedded["quarantined"] = [{"row": row} for row in UNFIT]
    plan = world.plan(metric=metric, factory="Flat")
    fit = np.setdiff1d(np.arange(N), UNFIT)
    expected = exact_topk(QUERIES, [(X[fit], fit)], 5, metric)[1]  # type: ignore[arg-type]
    for cut in (row_groups(plan), [Rows(0, N)], [Rows(0, 9), Rows(9, 10), Rows(10, N)]):
        parts = [recall.exact_in(plan, rows, QUERIES, 5) for rows in cut]
        np.testing.assert_array_equal(merge_topk(parts, 5)[1], expected)
    trial, found_QK = tried(plan, monkeypatch, 2, {})
    assert not np.isin(found_QK, UNFIT).any()
    assert trial.recall == 1.0


def test_rows_are_cut_into_groups_whatever_the_index(world: World) -> None:
    for factory in ("HNSW8", "IVF4,SQ8"):
        groups = row_groups(world.plan(factory=factory, num_shards=2, group_rows=70))
        assert [len(rows) for rows in groups] == [66, 67, 67, 66, 67, 67]
        assert (groups[0].start, groups[-1].stop) == (0, N)
