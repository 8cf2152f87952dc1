"""Training on a sample spread over workers: the same bytes whoever does what, as good as FAISS's, resumed anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import embeddings, train
from pipelines.build import BuildPlan, plan_build
from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, InputError
from pipelines.index import kmeans
from pipelines.index.build import read
from pipelines.index.search import search
from pipelines.index.spec import new_index, parse_spec
from pipelines.index.structure import layers
from pipelines.manifest import Receipt, put_done
from pipelines.storage import Store
from pipelines.train import State

D, N, PART = 16, 4000, 300
ENCODER = {"fingerprint": "e" * 16, "query_fingerprint": "q" * 16}
SPREAD = ["IVF16,SQ8", "IVF16,Flat", "IVF16,PQ4", "IVF16,PQ4x4fs", "OPQ4,IVF16,PQ4", "PCA8,IVF16,SQ8", "IVF16,RaBitQ",
          "IVF16_HNSW8,SQ8", "IVF16,SQ8,RFlat"]  # fmt: skip


def cluttered(seed: int = 0) -> Any:
    """Return (N, D) fp32 in clusters of uneven size."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((24, D))
    points = centres[rng.choice(24, N, p=rng.dirichlet(np.ones(24)))] + rng.standard_normal((N, D))
    return points.astype(np.float32)


X = cluttered()


def embedded_parts(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Write the embedding parts of X; return the root that they lie under, and their entries."""
    root, entries = str(folder), []
    store = Store(root).child("embeddings", "s" * 16, ENCODER["fingerprint"])
    for number, first in enumerate(range(0, N, PART)):
        rows = X[first : first + PART]
        data = embeddings.to_parquet([""] * len(rows), rows, "fp32")
        receipt = put_done(store, embeddings.part_name(number), data, "", {"num_rows": len(rows)})
        entries.append({**receipt.as_entry(), "first_row": first})
    return root, entries


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    return embedded_parts(tmp_path_factory.mktemp("vectors"))


def planned(parts: tuple[str, list[dict[str, Any]]], **index: Any) -> BuildPlan:
    """Return a plan of an index of its own name, so that its files are its own, over the shared vectors."""
    root, entries = parts
    num_rows = sum(entry["num_rows"] for entry in entries)
    embedded = {"encoder": ENCODER, "snapshot": "s" * 16, "dim": D, "num_rows": num_rows, "parts": entries}
    given = {"factory": "IVF16,SQ8", "train": "distributed", "train_rows": 3000, "group_rows": 1100, **index}
    return plan_build(root, IndexConfig(**given), {}, embedded, 1)


def steps(plan: BuildPlan, backwards: bool = False, on_gpu: bool = False) -> Iterator[Receipt]:
    """Do what a cluster does, one task after the other; shares may come in any order."""
    spread = train.spread_of(plan)
    assert spread

    def all_of(task: Any, items: Any) -> Iterator[Receipt]:
        done = {}
        for position, item in sorted(enumerate(items), reverse=backwards):
            done[position] = task(item)
            yield done[position]
        return [done[i] for i in range(len(items))]  # type: ignore[return-value]

    shares = yield from all_of(partial(train.draw_share, plan), spread.shares)  # type: ignore[func-returns-value]
    state: State = train.find_state(plan, spread) or train.start(plan, shares)
    yield state.centroids
    while state.iteration < spread.coarse.num_iterations:
        sums = yield from all_of(  # type: ignore[func-returns-value]
            partial(train.sum_share, plan=plan, state=state, on_gpu=on_gpu), shares
        )
        before, state = state, train.step(plan, state, sums)
        yield state.centroids
        if before.centroids.sha256 == state.centroids.sha256:
            break
    yield train.train_quantizer(plan, shares, state)


def trained(plan: BuildPlan, backwards: bool = False, on_gpu: bool = False) -> tuple[Any, str]:
    *_, receipt = steps(plan, backwards, on_gpu)
    return read(plan.store.local(receipt.name, receipt.sha256)), receipt.sha256


def score_with_lists(index: Any) -> float:
    """Return the mean score of the vectors with the centroids of their lists, as k-means sees it."""
    front = kmeans.in_front(index, X)
    score, _ = faiss.downcast_index(layers(index)[-1].quantizer).search(front, 1)
    return float(score.mean())


@pytest.mark.parametrize("factory", SPREAD)
def test_it_is_as_good_as_faiss_and_the_same_in_any_order(
    parts: tuple[str, list[dict[str, Any]]], factory: str
) -> None:
    metric = "l2" if factory in ("IVF16,Flat", "PCA8,IVF16,SQ8", "IVF16_HNSW8,SQ8", "IVF16,PQ4x4fs") else "ip"
    rows = {"train_rows": 1000, "group_rows": 250} if "OPQ" in factory else {}
    plan = partial(planned, parts, factory=factory, metric=metric, **rows)
    name = factory.replace(",", "-")
    index, sha256 = trained(plan(name=f"a{name}"))
    assert trained(plan(name=f"b{name}"), backwards=True)[1] == sha256
    local = plan(name=f"c{name}", train="local")
    faiss_own = read(local.store.local(train.TRAINED, train.train_quantizer(local).sha256))
    assert score_with_lists(index) == pytest.approx(score_with_lists(faiss_own), rel=0.15)
    found = []
    for empty in (index, faiss_own):
        assert empty.is_trained
        assert empty.ntotal == 0
        empty.add_with_ids(X, np.arange(N))
        found.append(search(empty, X[:200], 1, {"nprobe": 16}, num_threads=1)[1][:, 0] == np.arange(200))
    assert found[0].mean() >= found[1].mean() - 0.05


def test_a_stopped_training_makes_what_is_missing_and_no_more(parts: tuple[str, list[dict[str, Any]]]) -> None:
    *before, whole = steps(planned(parts, name="whole"))
    num_steps = len(before) + 1
    for stop_after in (2, 4, 7, num_steps - 1):  # within the shares, before k-means, within it, before the rest
        plan = planned(parts, name=f"stop{stop_after}")
        for done, _ in enumerate(steps(plan), start=1):
            if done == stop_after:
                break
        again = [receipt.reused for receipt in steps(plan)]
        assert again.count(False) == num_steps - stop_after
        assert train.find_trained(plan).sha256 == whole.sha256  # type: ignore[union-attr]
        train.clear(plan)
        assert plan.work.files() == []
        assert train.find_trained(plan)


def test_what_cannot_be_spread_is_refused_or_left_to_faiss(parts: tuple[str, list[dict[str, Any]]]) -> None:
    for factory in ("Flat", "SQ8", "HNSW16", "IVF16(PQ4),SQ8"):
        with pytest.raises(ConfigError, match="no lists"):
            train.spread_of(planned(parts, factory=factory))
        assert train.spread_of(planned(parts, factory=factory, train="auto")) is None
    few = planned(parts, factory="IVF2048,SQ8", train_rows=500)
    assert train.spread_of(few) is None
    with pytest.raises(InputError, match="500 rows"):
        train.train_quantizer(few)


def test_a_large_sample_is_spread_by_itself() -> None:
    """Wikipedia's 21 million passages: too much for one process, in shares that each hold a bounded number of rows."""
    entries = [{"num_rows": 16_384, "first_row": first} for first in range(0, 21_000_000, 16_384)]
    embedded = {"encoder": ENCODER, "snapshot": "s", "dim": 768, "parts": entries}
    embedded["num_rows"] = 16_384 * len(entries)

    def spread(factory: str) -> train.Spread | None:
        return train.spread_of(plan_build("r", IndexConfig(factory=factory), {}, embedded, 1))

    assert spread("IVF1024,SQ8") is None
    assert spread("OPQ64,PQ64") is None
    for factory, rows in (("IVF4096,SQ8", 4096 * 256), ("IVF65536_HNSW32,PQ64", 65536 * 39)):
        found = spread(factory)
        assert found
        assert sum(map(len, found.shares)) == rows
        assert max(map(len, found.shares)) < max(65_536, 4 * found.coarse.num_lists) + 16_384
        assert len(found.shares) >= 9


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), wanted=st.integers(0, 500))
def test_every_part_gives_its_share_of_the_sample(sizes: list[int], wanted: int) -> None:
    counts = embeddings.sample_counts([{"num_rows": size} for size in sizes], wanted)
    total = sum(sizes)
    assert sum(counts) == min(wanted, total)
    for size, count in zip(sizes, counts, strict=True):
        assert 0 <= count <= size
        assert abs(count - size * min(wanted, total) / max(1, total)) < 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), metric=st.sampled_from(["ip", "l2"]), num_lists=st.integers(1, 9))
def test_sums_are_those_of_the_nearest_centroids(data: st.DataObject, metric: Any, num_lists: int) -> None:
    # Small integers: every sum is exact.
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows, centroids = (rng.integers(-3, 4, (n, 3)).astype(np.float32) for n in (60, num_lists))
    coarse = kmeans.Coarse(num_lists, 3, 10, metric == "ip", False)
    cuts = sorted(data.draw(st.lists(st.integers(0, 60), max_size=4)))
    sums = kmeans.add_up(coarse, np.split(rows, cuts), centroids)
    score = rows @ centroids.T if metric == "ip" else -((rows[:, None] - centroids) ** 2).sum(-1)
    assert sums.count_C.sum() == 60
    assert sums.objective == (1 if metric == "ip" else -1) * score.max(axis=1).sum()
    np.testing.assert_array_equal(sums.sum_CD.sum(axis=0), rows.sum(axis=0))
    clear = (score == score.max(axis=1, keepdims=True)).sum(axis=1) == 1  # where the nearest is not a matter of ties
    least = np.bincount(score.argmax(axis=1)[clear], minlength=num_lists)
    assert (sums.count_C >= least).all()


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 30), min_size=2, max_size=12), seed=st.integers(0, 99), spherical=st.booleans())
def test_an_empty_list_takes_half_of_a_full_one(counts: list[int], seed: int, spherical: bool) -> None:
    count_C = np.array(counts, np.int64)
    if count_C.sum() < len(counts):
        count_C[0] += len(counts)
    rng = np.random.default_rng(seed)
    mean_CD = rng.standard_normal((len(counts), 4))
    coarse = kmeans.Coarse(len(counts), 4, 10, spherical, spherical)
    sums = kmeans.Sums(mean_CD * count_C[:, None], count_C.copy())
    centroids = kmeans.next_centroids(coarse, sums, [seed, 1])
    np.testing.assert_array_equal(centroids, kmeans.next_centroids(coarse, sums, [seed, 1]))
    np.testing.assert_array_equal(sums.count_C, count_C)
    assert np.isfinite(centroids).all()
    assert len(np.unique(centroids, axis=0)) == len(counts)  # no two lists are left the same
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
    wanted = mean_CD / (np.linalg.norm(mean_CD, axis=1, keepdims=True) if spherical else 1)
    for empty in np.flatnonzero(count_C == 0):
        near = np.abs(wanted[count_C > 0] - centroids[empty]).max(axis=1) / np.abs(wanted[count_C > 0]).max(axis=1)
        assert near.min() < 0.02  # beside a list that holds rows


def test_vectors_that_are_not_finite_are_refused() -> None:
    coarse = kmeans.coarse_of(new_index(parse_spec("IVF2,Flat", 4, "l2")))
    assert coarse
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = np.nan
    with pytest.raises(InputError, match="not finite"):
        kmeans.add_up(coarse, [rows], np.eye(2, 4, dtype=np.float32))
