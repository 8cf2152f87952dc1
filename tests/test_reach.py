"""What lists can find at most: against what searches of them find, for every number of lists."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import ArtifactError, InputError
from pipelines.index.build import add, read, train, write
from pipelines.index.exact import exact_topk
from pipelines.index.reach import NEVER, probes_needed
from pipelines.index.search import search
from pipelines.index.spec import Metric, new_index, parse_spec
from pipelines.index.tiers import TwoTier
from pipelines.index.tune import HeldOut, knobs, tune

D, N, K, Q, C = 16, 3000, 10, 80, 32
ROUNDING = 2 / (Q * K)  # two scores that are equal but for their last bits may change places


@lru_cache
def world(metric: Metric) -> tuple[Any, HeldOut]:
    """Return (vectors (N, D), queries): clusters of vectors whose lengths differ, so that the metrics do."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, D)).astype(np.float32)
    points = centres[rng.choice(40, N + Q)] + 1.2 * rng.standard_normal((N + Q, D)).astype(np.float32)
    points *= rng.uniform(0.7, 1.4, (N + Q, 1)).astype(np.float32)
    vectors, queries = points[:N], points[N:]
    return vectors, HeldOut(queries, exact_topk(queries, [(vectors, np.arange(N))], K, metric, num_threads=1)[1])


@lru_cache
def built(factory: str, metric: Metric, rows: range = range(N)) -> Any:
    vectors, _ = world(metric)
    index = train(parse_spec(factory, D, metric), vectors, 0, num_threads=1)
    add(index, vectors[rows.start : rows.stop], np.arange(rows.start, rows.stop), num_threads=1)
    return index


def recalls(index: Any, metric: Metric) -> list[tuple[float, float]]:
    """Return (bound, recall of a search) for every nprobe."""
    asked = world(metric)[1]
    bound = asked.bound(probes_needed(index, asked.queries_QD, asked.exact_QK))
    found = []
    for nprobe in range(1, C + 1):
        rows_QK = search(index, asked.queries_QD, K, {"nprobe": nprobe}, num_threads=1)[1]
        found.append((bound({"nprobe": nprobe}).recall, asked.trial({}, rows_QK, 0.0).recall))
    return found


@pytest.mark.parametrize(
    ("factory", "metric"),
    [("IVF32,Flat", "ip"), ("IVF32,Flat", "l2"), ("OPQ2,IVF32,Flat", "ip"), ("PCAR16,IVF32,Flat", "l2")],
)
def test_codes_that_lose_nothing_find_what_the_bound_tells(factory: str, metric: Metric) -> None:
    found = recalls(built(factory, metric), metric)
    assert found[0][0] < 0.9
    assert found[-1][0] == 1.0
    assert all(abs(bound - recall) <= ROUNDING for bound, recall in found), found


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(
    ("factory", "by_chance"),
    [("IVF32,SQ8", 0), ("IVF32,PQ8x4fs", 0), ("PCA8,IVF32,SQ8", 0), ("IVF32_HNSW8,Flat", 0.02)],
)
def test_nothing_finds_more_than_the_bound(factory: str, metric: Metric, by_chance: float) -> None:
    """A graph of centroids that misses a near one visits another, where a neighbour may lie by chance."""
    found = recalls(built(factory, metric), metric)
    assert all(recall <= bound + by_chance + ROUNDING for bound, recall in found), found
    assert [bound for bound, _ in found] == sorted(bound for bound, _ in found)


def test_shards_tell_together_what_one_index_of_all_rows_tells() -> None:
    asked, halves = world("l2")[1], (range(1000), range(1000, N))
    parts = [probes_needed(built("IVF32,SQ8", "l2", rows), asked.queries_QD, asked.exact_QK) for rows in halves]
    whole = probes_needed(built("IVF32,SQ8", "l2"), asked.queries_QD, asked.exact_QK)
    assert ((parts[0] == NEVER) == (asked.exact_QK >= 1000)).all()
    assert (np.minimum(*parts) == whole).all()
    assert whole.min() == 1
    assert whole.max() <= C


def test_vectors_beside_the_codes_change_nothing() -> None:
    vectors, asked = world("ip")
    codes = built("IVF32,PQ8x4fs", "ip")
    tiers = TwoTier(codes, vectors.astype(np.float16), 0)
    told = [probes_needed(index, asked.queries_QD, asked.exact_QK) for index in (codes, tiers)]
    assert (told[0] == told[1]).all()


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "IVF32,PQ8x4fs", "IVF32_HNSW8,Flat"])
def test_a_mapped_file_tells_what_the_index_in_memory_tells(factory: str, tmp_path: Path) -> None:
    asked, index, path = world("ip")[1], built(factory, "ip"), str(tmp_path / "i.faiss")
    write(index, path)
    asked.queries_QD.flags.writeable = asked.exact_QK.flags.writeable = False  # as arrays that come from elsewhere
    told = [probes_needed(each, asked.queries_QD, asked.exact_QK) for each in (index, read(path, mmap=True))]
    assert (told[0] == told[1]).all()
    assert told[0].max() <= C


def test_rows_that_are_not_there_are_never_seen() -> None:
    asked, empty = world("l2")[1], built("IVF32,Flat", "l2", range(0))
    assert (probes_needed(empty, asked.queries_QD, asked.exact_QK) == NEVER).all()
    wanted = np.array([[0, -1, N, 0]])
    needed = probes_needed(built("IVF32,Flat", "l2"), asked.queries_QD[:1], wanted)
    assert needed[0, 0] == needed[0, 3] <= C
    assert needed[0, 1:3].tolist() == [NEVER, NEVER]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF32,PQ8,RFlat", "IMI2x4,PQ8"])
def test_types_whose_lists_tell_nothing_say_so(factory: str) -> None:
    assert probes_needed(new_index(parse_spec(factory, D, "l2")), world("l2")[1].queries_QD, np.zeros((Q, K))) is None


def test_queries_that_do_not_fit_are_refused() -> None:
    index, wanted = built("IVF32,Flat", "l2"), np.zeros((2, 3), np.int64)
    with pytest.raises(ArtifactError, match="width 5, the index 16"):
        probes_needed(index, np.zeros((2, 5)), wanted)
    with pytest.raises(InputError, match="not finite"):
        probes_needed(index, np.full((2, D), np.nan), wanted)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize(
    ("factory", "most_searches"), [("IVF32,Flat", 3), ("IVF32,SQ8", 5), ("IVF32,PQ8x4fs", 6), ("IVF32_HNSW8,SQ8", 5)]
)
def test_few_searches_are_enough_and_choose_as_many_would(factory: str, metric: Metric, most_searches: int) -> None:
    index, asked, target = built(factory, metric), world(metric)[1], 0.45 if "PQ8" in factory else 0.9

    def measure(params: dict[str, int]) -> Any:
        return asked.trial(params, search(index, asked.queries_QD, K, params, num_threads=1)[1], 1.0)

    tunable = knobs(index, N, K)
    many = tune(tunable, measure, target)
    few = tune(tunable, measure, target, asked.bound(probes_needed(index, asked.queries_QD, asked.exact_QK)))
    assert many.reached
    assert few.best == many.best
    assert len(few.curve) <= most_searches


def test_a_target_near_one_takes_no_search_of_more_lists_than_hold_all_neighbours() -> None:
    """Eighty queries leave no room for a margin above 0.99: what counts then is the most that can be found."""
    index, asked = built("IVF32,Flat", "l2"), world("l2")[1]
    needed = probes_needed(index, asked.queries_QD, asked.exact_QK)

    def measure(params: dict[str, int]) -> Any:
        return asked.trial(params, search(index, asked.queries_QD, K, params, num_threads=1)[1], 1.0)

    found = tune(knobs(index, N, K), measure, 0.99, asked.bound(needed))
    assert (found.reached, found.best.recall) == (True, 1.0)
    assert found.best.params == {"nprobe": needed.max()}
    assert len(found.curve) <= 3
