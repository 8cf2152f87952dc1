"""Exact search, k-means and shards by torch, as on a GPU: what FAISS finds on a CPU. On CUDA too, where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.serve_stages import DeviceWatch
from pipelines import publish
from pipelines.build import row_groups
from pipelines.config import ServeConfig
from pipelines.errors import ArtifactError, ConfigError, InputError, StorageError
from pipelines.index import exact, kmeans, on_gpu
from pipelines.index.build import add, read, train, write
from pipelines.index.exact import exact_topk
from pipelines.index.on_gpu import VectorsOnGpu
from pipelines.index.spec import Metric, parse_spec
from pipelines.index.tiers import TwoTier
from pipelines.recall import exact_in
from pipelines.retrieve import LocalShard
from tests.test_train import embedded_parts, planned, score_with_lists, trained
from tests.test_twins import World, build

N, D = 90, 8
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"))]
# Small integers: every product is exact, and there are ties.
_rng = np.random.default_rng(3)
X = _rng.integers(-3, 4, (N, D)).astype(np.float32)
QUERIES = _rng.integers(-3, 4, (7, D)).astype(np.float32)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, and many chunks of each."""
    monkeypatch.setattr(on_gpu, "_ROWS_AT_ONCE", 40)
    monkeypatch.setattr(exact, "_GPU_ROWS_AT_ONCE", 16)


def shard(factory: str, metric: Metric, rows_N: Any, vectors_ND: Any = X) -> Any:
    index = train(parse_spec(factory, D, metric), vectors_ND)
    add(index, vectors_ND, rows_N)
    return index


def same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), k=st.integers(1, 100), metric=st.sampled_from(["ip", "l2"]), dtype=st.sampled_from([2, 4]))
def test_exact_search_finds_what_faiss_finds_ties_included(
    data: st.DataObject, k: int, metric: Metric, dtype: int
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, N), max_size=4)))
    rows_N = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(N)
    blocks = list(zip(np.split(X.astype(f"f{dtype}"), cuts), np.split(rows_N, cuts), strict=True))
    num = data.draw(st.integers(0, len(QUERIES)))
    found = exact_topk(QUERIES[:num], blocks, k, metric, device="cpu")
    same(found, exact_topk(QUERIES[:num], blocks, k, metric))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("by", [None, "cpu"])
def test_of_many_equals_the_smaller_rows_are_found_and_few_are_sorted(
    monkeypatch: pytest.MonkeyPatch, metric: Metric, by: str | None
) -> None:
    sorted_at_once: list[int] = []
    keep_best = exact._keep_best

    def counted(best: Any, picked: Any, rows_N: Any, k: int) -> Any:
        sorted_at_once.append(len(picked[0]))
        return keep_best(best, picked, rows_N, k)

    monkeypatch.setattr(exact, "_keep_best", counted)
    same_N = np.ones((5000, D), np.float32)
    same_N[[17, 4000]] += 1
    queries = np.stack([np.zeros(D), np.ones(D), -np.ones(D)]).astype(np.float32)
    blocks = [(same_N[2000:], np.arange(2000, 5000)), (same_N[:2000], np.arange(2000))]
    for upside_down in (False, True):
        given = [(v[::-1], r[::-1]) for v, r in blocks] if upside_down else blocks
        score_BK, row_BK = exact_topk(queries, given, 5, metric, 1, by)
        score_BN = queries @ same_N.T if metric == "ip" else -((queries[:, None] - same_N) ** 2).sum(-1)
        expected_BK = np.lexsort((np.arange(5000)[None].repeat(3, 0), -score_BN), axis=1)[:, :5]
        np.testing.assert_array_equal(row_BK, expected_BK)
        np.testing.assert_array_equal(score_BK, np.take_along_axis(score_BN, expected_BK, axis=1))
        if not upside_down:
            assert max(sorted_at_once) <= 8 * 5 * 3


def test_exact_search_in_chunks_and_of_another_width(device: str, small_blocks: None) -> None:
    for metric in ("ip", "l2"):
        blocks = [(X[:50].astype(np.float16), np.arange(50)), (X[50:], np.arange(50, N))]
        same(exact_topk(QUERIES, blocks, 5, metric, device=device), exact_topk(QUERIES, blocks, 5, metric))
    with pytest.raises(ArtifactError, match="a block has shape"):
        exact_topk(QUERIES, [(X[:, :4], np.arange(N))], 5, "ip", device=device)


def test_sums_are_those_of_faiss(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_ROWS_AT_ONCE", 16)
    rows, centroids = _rng.standard_normal((200, D)).astype(np.float32), np.eye(D, dtype=np.float32)[:5]
    for is_similarity in (True, False):
        coarse = kmeans.Coarse(5, D, 10, is_similarity, is_similarity)
        expected = kmeans.add_up(coarse, [rows[:150], rows[150:]], centroids)
        sums = kmeans.add_up(coarse, [rows[:150], rows[150:]], centroids, device)
        np.testing.assert_array_equal(sums.count_C, expected.count_C)
        np.testing.assert_allclose(sums.sum_CD, expected.sum_CD, rtol=0, atol=1e-12)
        assert sums.objective == pytest.approx(expected.objective, rel=1e-6)
        again = kmeans.add_up(coarse, [rows[:150], rows[150:]], centroids, device)
        np.testing.assert_array_equal(sums.sum_CD, again.sum_CD)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(device: str, value: float) -> None:
    rows = np.ones((3, D), np.float32)
    rows[1, 2] = value
    for is_similarity in (True, False):
        coarse = kmeans.Coarse(2, D, 10, is_similarity, False)
        with pytest.raises(InputError, match="not finite"):
            kmeans.add_up(coarse, [rows], np.eye(2, D, dtype=np.float32), device)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_a_flat_shard_is_searched_whole(
    tmp_path: Path, device: str, small_blocks: None, factory: str, metric: Metric
) -> None:
    write(shard(factory, metric, np.arange(100, 100 + N)), str(tmp_path / "shard.faiss"))
    index = read(str(tmp_path / "shard.faiss"), mmap=True)
    vectors = VectorsOnGpu(index, device)
    for k in (1, 10, N + 5):
        same(vectors.search(QUERIES, k), exact_topk(QUERIES, [(X, np.arange(100, 100 + N))], k, metric))


def test_vectors_beside_codes_are_searched_in_the_codes_place(device: str, small_blocks: None) -> None:
    index = TwoTier(shard("IVF4,PQ4x4", "ip", np.arange(50, 50 + N)), X.astype(np.float16), 50)
    found = VectorsOnGpu(index, device).search(QUERIES, 10)
    same(found, exact_topk(QUERIES, [(X, np.arange(50, 50 + N))], 10, "ip"))


def test_vectors_that_fp16_would_round_stay_in_fp32(device: str) -> None:
    fine = X + np.float32(1e-4) * _rng.standard_normal((N, D)).astype(np.float32)
    vectors = VectorsOnGpu(shard("Flat", "ip", np.arange(N), fine), device)
    assert {block.dtype for block, _ in vectors._blocks} == {torch.float32}
    expected = exact_topk(QUERIES, [(fine, np.arange(N))], 10, "ip")
    found = vectors.search(QUERIES, 10)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("factory", ["IVF4,Flat", "HNSW8", "SQ8", "PCA4,Flat", "PQ4x4"])
def test_a_shard_of_codes_or_behind_a_transform_is_refused(factory: str) -> None:
    with pytest.raises(ConfigError, match="keeps no vectors") as caught:
        VectorsOnGpu(shard(factory, "ip", np.arange(N)), "cpu")
    assert "index.refine: exact" in str(caught.value)


def test_an_imported_flat_file_is_searched_by_its_places(device: str) -> None:
    index = faiss.IndexFlatL2(D)
    index.add(X)
    same(VectorsOnGpu(index, device).search(QUERIES, 5), exact_topk(QUERIES, [(X, np.arange(N))], 5, "l2"))


def test_queries_of_another_width_and_no_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    index = shard("Flat", "ip", np.arange(N))
    with pytest.raises(ArtifactError, match="another encoder"):
        VectorsOnGpu(index, "cpu").search(QUERIES[:, :4], 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device is visible") as caught:
        VectorsOnGpu(index, "cuda")
    assert "serve.gpus_per_shard: 0" in str(caught.value)


def test_a_gpu_without_room_is_told_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 80 << 30))
    with pytest.raises(StorageError, match=r"no room for 0\.0 GB of vectors, of 4\.3 GB free"):
        VectorsOnGpu(shard("Flat", "ip", np.arange(N)), "cuda")


def test_a_served_shard_finds_no_row_that_could_not_be_encoded(tmp_path: Path) -> None:
    world = World(tmp_path)
    plan = world.plan(factory="Flat", num_shards=2)
    files = {receipt.name: receipt.as_entry() for receipt in build(plan)}
    content = publish.version_content(plan, [], {}, {}) | {"files": files}
    queries = QUERIES[:, :1].repeat(plan.dim, 1) + 0.1
    usual = LocalShard(plan.root, content, 1).search(queries, 9)
    content["quarantined"] = usual[1][0, :2].tolist()
    expected = LocalShard(plan.root, content, 1).search(queries, 9)
    found = LocalShard(plan.root, content, 1, device="cpu").search(queries, 9)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert not np.isin(found[1], content["quarantined"]).any()


def test_a_config_with_gpus_for_shards_that_are_none_of_their_own_is_refused() -> None:
    assert ServeConfig(placement="spread", gpus_per_shard=0.5).gpus_per_shard == 0.5
    with pytest.raises(ValueError, match="placement: spread"):
        ServeConfig(gpus_per_shard=1)


def test_a_replica_whose_gpu_is_lost_is_not_healthy() -> None:
    watch = DeviceWatch()
    for passing in (ValueError("a bad query"), torch.OutOfMemoryError("no room for now")):
        with pytest.raises(type(passing)), watch:
            raise passing
    watch.check()
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError), watch:
        raise lost
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        watch.check()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    """Give every task that has a GPU torch's `device`; return what is asked, a word each time."""
    words: list[str] = []

    def gpu_here() -> str:
        words.append("asked")
        return device

    for module in ("pipelines.recall", "pipelines.train"):
        monkeypatch.setattr(f"{module}.gpu_here", gpu_here)
    return words


def test_exact_results_come_from_the_gpu_of_a_task_that_has_one(tmp_path: Path, asked: list[str]) -> None:
    plan = World(tmp_path).plan(factory="Flat")
    queries, rows = np.ones((3, plan.dim), np.float32), row_groups(plan)[0]
    usual = exact_in(plan, rows, queries, 5)
    assert not asked
    plan.work.remove_all()
    found = exact_in(plan, rows, queries, 5, on_gpu=True)
    assert asked
    np.testing.assert_array_equal(found[1], usual[1])


@pytest.mark.parametrize(("factory", "metric"), [("IVF16,SQ8", "ip"), ("PCA8,IVF16,SQ8", "l2")])
def test_training_on_a_gpu_is_as_good_and_the_same_in_any_order(
    tmp_path: Path, asked: list[str], factory: str, metric: str
) -> None:
    given = {"factory": factory, "metric": metric}
    parts = embedded_parts(tmp_path)
    usual, _ = trained(planned(parts, name="usual", **given))
    assert not asked
    index, sha256 = trained(planned(parts, name="one", **given), on_gpu=True)
    assert asked
    assert trained(planned(parts, name="other", **given), backwards=True, on_gpu=True)[1] == sha256
    assert score_with_lists(index) == pytest.approx(score_with_lists(usual), rel=0.02)
