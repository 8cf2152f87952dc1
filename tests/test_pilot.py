"""The pilot: honest recall from a sample, a model that scales as written, one choice that a re-run keeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import publish
from pipelines.build import version_name
from pipelines.config import IndexConfig
from pipelines.errors import ConfigError, QualityError
from pipelines.index.balance import balance, list_sizes
from pipelines.index.build import add, train
from pipelines.index.candidates import Candidate, candidates, shortlist
from pipelines.index.exact import exact_topk
from pipelines.index.forecast import Forecast, Limits, Scale, choose, compare, extrapolate
from pipelines.index.pilot import Measured, Pilot, find_lists, measure, num_lists
from pipelines.index.search import search
from pipelines.index.spec import parse_spec
from pipelines.index.tiers import TwoTier
from pipelines.index.tune import HeldOut
from tests.checkpoints import write_sentence_transformer
from tests.test_pipeline import pinakes, pinakes_json

N, D, Q, SAMPLE = 6000, 32, 60, 1000
_rng = np.random.default_rng(8)
_centres = _rng.standard_normal((40, D)).astype(np.float32)


def clustered(num: int) -> Any:
    spread = 0.5 * _rng.standard_normal((num, D))
    vectors = (_centres[_rng.integers(0, 40, num)] + spread).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


X, QUERIES = clustered(N), clustered(Q)
ROWS = np.arange(N, dtype=np.int64)
EXACT = exact_topk(QUERIES, [(X, ROWS)], 100, "ip", num_threads=1)[1]


def pilot_of(num: int, target: float = 0.9) -> Pilot:
    sample = _rng.permutation(N)[:num].astype(np.int64)
    near = np.setdiff1d(np.unique(EXACT), sample)
    return Pilot(X[sample], sample, X[near], near, HeldOut(QUERIES, EXACT[:, :10]), target, N, 0)


def candidate(factory: str, refine: Any = "none") -> Candidate:
    search_by: Any = "lists" if "IVF" in factory else "graph" if "HNSW" in factory else "scan"
    return Candidate(factory, "high", search_by, "HNSW" not in factory, 40.0, 40 * N, 40 * N, refine)


def tried(factory: str, pilot: Pilot, refine: str = "none") -> Measured:
    spec = parse_spec(factory, D, "ip")
    lists = find_lists(pilot.sample_SD, num_lists(spec), "ip", 0, 1) if num_lists(spec) else None
    return measure(candidate(factory, refine), spec, pilot, lists, 1)


# Trying one candidate


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "IVF16,SQ8", "PCA16,IVF16,SQ8", "IVF16,PQ8x4fs", "HNSW16"])
def test_the_sample_tells_the_recall_that_the_whole_corpus_has(factory: str) -> None:
    found = tried(factory, pilot_of(SAMPLE))
    whole = train(parse_spec(factory, D, "ip"), X, 0, 1)
    add(whole, X, ROWS, 1)
    _, rows_QK = search(whole, QUERIES, 10, found.params)
    real = HeldOut(QUERIES, EXACT[:, :10]).trial(found.params, rows_QK, 1.0)
    # Twice the half-widths of either and some more for other centroids, at 1,000 rows a 6th of the real ones.
    assert abs(found.recall - real.recall) < 0.04 + found.half_width + real.half_width
    assert found.reached == (found.recall >= 0.9)
    assert 0 < found.add_seconds < 1
    assert found.ms > 0
    assert found.p95_ms > 0


@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs", "PCA16,IVF16,SQ8", "IVF16,RaBitQ"])
def test_codes_with_their_vectors_behind_them_are_tried_as_they_are_served(factory: str) -> None:
    found = tried(factory, pilot_of(SAMPLE), "exact")
    assert list(found.params) == ["k_factor", "nprobe"]
    whole = train(parse_spec(factory, D, "ip"), X, 0, 1)
    add(whole, X, ROWS, 1)
    served = TwoTier(whole, X.astype(np.float16), 0)
    _, rows_QK = search(served, QUERIES, 10, found.params)
    real = HeldOut(QUERIES, EXACT[:, :10]).trial(found.params, rows_QK, 1.0)
    assert abs(found.recall - real.recall) < 0.04 + found.half_width + real.half_width
    assert found.reached
    assert found.recall >= tried(factory, pilot_of(SAMPLE)).recall - 0.02
    assert found.ms > 0


def test_without_the_near_rows_codes_would_look_better_than_they_are() -> None:
    coarse, pilot = "PQ8x4", pilot_of(SAMPLE)
    kept = np.isin(pilot.row_S, EXACT[:, :10])
    exact = exact_topk(QUERIES, [(pilot.sample_SD, pilot.row_S)], 10, "ip", num_threads=1)[1]
    alone = replace(pilot, near_ND=pilot.near_ND[:0], row_N=pilot.row_N[:0], asked=HeldOut(QUERIES, exact))
    assert kept.any()
    assert tried(coarse, alone).recall > tried(coarse, pilot).recall + 0.03


def test_all_rows_as_the_sample_are_the_index_itself() -> None:
    found = tried("IVF16,SQ8", pilot_of(N))
    assert found.fills[1][0] == N
    scale = Scale(N, 1, 1, N, 0.0)
    assert extrapolate(found, candidate("IVF16,SQ8"), scale).ms == pytest.approx(found.ms, abs=1e-3)


# The model


def measured(**changed: Any) -> Measured:
    known: dict[str, Any] = {
        "factory": "IVF64,SQ8", "search": "lists", "params": {"nprobe": 4}, "recall": 0.95, "half_width": 0.01,
        "reached": True, "num_lists": 64, "train_rows": 1000, "list_seconds": 2.0, "code_seconds": 1.0,
        "add_seconds": 1e-4, "fills": ((100, 0.2), (1100, 0.4)), "p95_ms": 0.6,
    }  # fmt: skip
    return Measured(**(known | changed))


def test_searches_grow_straight_with_the_rows_and_their_rest_with_the_shards() -> None:
    scale = Scale(num_rows=10_100, num_shards=1, num_cores=1, train_rows=1000, read_seconds=0.0)
    one = extrapolate(measured(), candidate("IVF64,SQ8"), scale)
    assert one.ms == pytest.approx(0.2 + 0.0002 * 10_000)
    assert one.p95_ms == pytest.approx(one.ms * 0.6 / 0.4)
    three = extrapolate(measured(), candidate("IVF64,SQ8"), replace(scale, num_shards=3))
    assert three.ms == pytest.approx(one.ms + 2 * 0.18)  # finding the lists, twice more
    walk = measured(search="graph", fills=((100, 0.4), (1100, 0.4)))
    longer = extrapolate(walk, candidate("HNSW32"), replace(scale, num_rows=1100**2))
    assert longer.ms == pytest.approx(0.8)
    assert longer.add_seconds == pytest.approx(1100**2 * 1e-4 * 2)


def test_training_grows_with_the_rows_that_it_looks_at() -> None:
    scale = Scale(num_rows=10**6, num_shards=1, num_cores=4, train_rows=10_000, read_seconds=8.0)
    found = extrapolate(measured(), candidate("IVF64,SQ8"), scale)
    assert found.train_seconds == pytest.approx(2.0 * 10 + 1.0 * 10 + 8.0)
    most = extrapolate(measured(), candidate("IVF64,SQ8"), replace(scale, train_rows=10**6))
    assert most.train_seconds == pytest.approx(2.0 * 256 * 64 / 1000 + 65.536 + 8.0, rel=1e-3)
    assert found.add_seconds == pytest.approx((10**6 * 1e-4 + 8.0) / 4)
    read_by_two = extrapolate(measured(), candidate("IVF64,SQ8"), replace(scale, num_readers=2))
    assert read_by_two.train_seconds == pytest.approx(found.train_seconds - 4.0)
    untrained = measured(num_lists=0, list_seconds=0.0, code_seconds=0.0)
    assert extrapolate(untrained, candidate("Flat"), scale).train_seconds == 0


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(2, 10**9), more=st.integers(1, 10**6), shards=st.integers(1, 40), seed=st.integers(0, 999))
def test_more_rows_never_cost_less(rows: int, more: int, shards: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = ["scan", "lists", "graph"][seed % 3]
    fills = ((10, float(rng.random())), (500, float(rng.random()) + 0.01))
    found = measured(search=kind, fills=fills)
    small, large = (extrapolate(found, candidate("SQ8"), Scale(n, shards, 2, 1000, 1.0)) for n in (rows, rows + more))
    assert 0 <= small.ms <= large.ms
    assert 0 < small.add_seconds <= large.add_seconds
    assert math.isfinite(large.ms)


# What is tried


def flat_bytes(num_rows: int, dim: int) -> int:
    return next(c.memory_bytes for c in candidates(num_rows, dim, "ip") if c.factory == "Flat")


@pytest.mark.parametrize(("num_rows", "dim"), [(600, 384), (40_000, 384), (3, 8)])
def test_small_corpora_try_no_lossy_codes_unless_memory_is_smaller_still(num_rows: int, dim: int) -> None:
    every = candidates(num_rows, dim, "ip")
    few, why = shortlist(every, num_rows, dim, math.inf)
    lossless = [c for c in every if c.recall in ("exact", "near exact")]
    is_small = flat_bytes(num_rows, dim) <= 8_000_000
    assert few == (lossless if is_small else every)
    assert bool(why) == is_small
    assert {"Flat", "HNSW32"} <= {c.factory for c in few}
    tight, _ = shortlist(every, num_rows, dim, flat_bytes(num_rows, dim) - 1)
    assert tight[: len(every)] == every
    assert {c.refine for c in tight[len(every) :]} <= {"exact"}


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 10**8), dim=st.integers(1, 900), memory=st.floats(1, 1e13), wanted=st.booleans())
def test_two_tiers_are_offered_where_the_vectors_do_not_fit(
    num_rows: int, dim: int, memory: float, wanted: bool
) -> None:
    every = candidates(num_rows, dim, "ip")
    few, _ = shortlist(every, num_rows, dim, memory, "exact" if wanted else "none")
    by_name = {c.factory: c for c in every}
    tiers = [c for c in few if c.refine == "exact"]
    assert few
    assert len({c.name for c in few}) == len(few)
    assert not tiers or wanted or flat_bytes(num_rows, dim) > memory
    assert all(c in every for c in few if c.refine == "none")
    assert not (wanted and tiers) or tiers == few
    if flat_bytes(num_rows, dim) > memory and any(c.factory.endswith(",RaBitQ") for c in every):
        assert any(c.factory.endswith(",RaBitQ") for c in tiers)
    for tier in tiers:
        codes = by_name[tier.factory]
        assert tier.memory_bytes == codes.memory_bytes
        assert tier.file_bytes == codes.file_bytes + 2 * num_rows * dim


# Choosing


def forecast(factory: str, recall: float, memory: int, ms: float, reached: bool | None = None) -> Forecast:
    is_reached = recall >= 0.9 if reached is None else reached
    return Forecast(factory, "scan", {}, is_reached, recall, 0.01, ms, ms, memory, memory, 1.0, 1.0)


FOUND = [forecast("Flat", 1.0, 400, 9.0), forecast("HNSW32", 0.97, 500, 0.5), forecast("SQ8", 0.96, 100, 6.0),
         forecast("IVF,PQ", 0.7, 20, 0.2)]  # fmt: skip


def test_the_cheapest_that_keeps_the_target_within_the_limits_is_chosen() -> None:
    assert choose(FOUND, 0.9, Limits()).factory == "HNSW32"
    assert choose(FOUND, 0.9, Limits(memory_bytes=450)).factory == "SQ8"
    assert choose(FOUND, 0.9, Limits(ms=1.0)).factory == "HNSW32"
    assert choose(list(reversed(FOUND)), 0.9, Limits(memory_bytes=100, ms=6.0)).factory == "SQ8"
    tier = replace(FOUND[3], refine="exact", recall=0.95, reached=True, index_bytes=220)
    chosen = choose([*FOUND, tier], 0.9, Limits(memory_bytes=50))
    assert (chosen.factory, chosen.refine, chosen.name) == ("IVF,PQ", "exact", "IVF,PQ with index.refine: exact")


def test_a_refusal_names_the_nearest_that_can_be_had() -> None:
    with pytest.raises(QualityError, match=r"no index keeps recall@10 0\.9 within 450 B in memory and 1 ms") as caught:
        choose(FOUND, 0.9, Limits(memory_bytes=450, ms=1.0))
    assert "'HNSW32' keeps it with 500 B and 0.5 ms" in caught.value.hint  # past the limit by a 9th
    assert "'IVF,PQ' fits and reaches 0.700" in caught.value.hint
    assert caught.value.exit_code == 7
    low = [forecast("SQ8", 0.6, 100, 6.0), forecast("PQ", 0.5, 10, 1.0)]
    with pytest.raises(QualityError) as caught:
        choose(low, 0.9, Limits())
    assert "'SQ8' fits and reaches 0.600" in caught.value.hint
    assert "keeps it" not in caught.value.hint


def test_what_happened_is_set_beside_the_forecast_where_this_run_did_the_work() -> None:
    told = forecast("SQ8", 0.96, 100, 6.0).as_dict()
    files = {
        "shard-000.faiss": {"num_bytes": 70},
        "shard-001.faiss": {"num_bytes": 40},
        "ids-000.arrow": {"num_bytes": 9},
    }
    version = {"files": files, "recall": {"value": 0.95, "ms": 9.0}}
    stages = {"train": {"seconds": 2.0, "made": 1, "reused": 0}, "add": {"seconds": 3.0, "made": 1, "reused": 1}}
    figures = compare(told, version, stages)["figures"]
    assert figures["index_bytes"] == {"forecast": 100, "actual": 110, "ratio": 1.1}
    assert figures["ms"]["ratio"] == 1.5
    assert figures["train_seconds"]["ratio"] == 2.0
    assert "add_seconds" not in figures  # half of it was done before
    two_tier = {**told, "index_bytes": 300}  # 100 of codes, 200 of vectors
    figures = compare(two_tier, version | {"files": files | {"vectors-000.npy": {"num_bytes": 200}}}, {})["figures"]
    assert figures["index_bytes"]["actual"] == 310
    assert figures["memory_bytes"]["actual"] == 110


# Lists


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=1, max_size=80))
def test_the_histogram_counts_every_list_once(sizes: list[int]) -> None:
    found = balance(np.asarray(sizes, np.int64))
    bars = found["histogram"]
    assert sum(bar["lists"] for bar in bars) == len(sizes) == found["num_lists"]
    assert bars[0] == {"up_to": 0, "lists": sizes.count(0)}
    assert [bar["up_to"] for bar in bars] == sorted({bar["up_to"] for bar in bars})
    assert bars[-1]["up_to"] == max(sizes)
    assert not any(sizes) or 0.999 <= found["imbalance"] <= len(sizes)


def test_list_sizes_are_those_of_the_inverted_file() -> None:
    index = train(parse_spec("PCA8,IVF16,SQ8", D, "ip"), X[:800], 0, 1)
    add(index, X[:800], ROWS[:800])
    sizes = list_sizes(index)
    assert sizes is not None
    assert (len(sizes), int(sizes.sum())) == (16, 800)
    assert balance(np.full(16, 50))["imbalance"] == 1.0
    assert list_sizes(train(parse_spec("SQ8", D, "ip"), X[:800])) is None


# Through the command


def test_auto_wants_a_target_and_limits_want_auto() -> None:
    for bad in ({"factory": "auto"}, {"factory": "auto", "min_recall": 0.9, "search_params": {"nprobe": 4}},
                {"factory": "SQ8", "max_ms": 3.0}, {"max_memory_gb": 1.0}):  # fmt: skip
        with pytest.raises(ValueError, match="auto"):
            IndexConfig(**bad)
    chosen = IndexConfig(factory="SQ8", min_recall=0.9)
    settings_of = [c.model_dump() for c in (chosen, chosen.model_copy(update={"pilot_rows": 7}))]
    assert version_name([1], settings_of[0], tuned=True) == version_name([1], settings_of[1], tuned=True)


TEXTS = [f"the cat number {i} sat on mat {i * 7 % 13} of {i * 31 % 97}" for i in range(250)]


class Corpus:
    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, str(folder / "root")
        (folder / "corpus.jsonl").write_text(
            "".join(json.dumps({"id": f"p{i}", "text": t}) + "\n" for i, t in enumerate(TEXTS))
        )
        write_sentence_transformer(str(folder / "model"))

    def config(self, **index: Any) -> str:
        content = {
            "root": self.root,
            "corpus": {"name": "cats", "sources": [str(self.folder / "corpus.jsonl")], "part_size": 100},
            "encoder": {"checkpoint": str(self.folder / "model"), "compute": "fp32", "storage": "fp32"},
            "index": {"name": "cats", "recall_queries": 40, "pilot_rows": 200, **index},
        }
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)


@pytest.fixture(scope="module")
def cats(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    import ray

    ray.init(address=ray_cluster, log_to_driver=False)
    return Corpus(tmp_path_factory.mktemp("pilot"))


def test_auto_builds_what_the_pilot_chose_and_a_second_run_chooses_the_same(cats: Corpus) -> None:
    auto = cats.config(factory="auto", min_recall=0.5)
    assert "run `pinakes encode" in pinakes("plan", auto, "--pilot", "--quiet", code=ConfigError.exit_code)
    version = pinakes_json("index", auto, "--quiet")
    told = version["forecast"]
    assert version["factory"] == version["config"]["factory"] == told["factory"] != "auto"
    assert told["asked"] == {"min_recall": 0.5, "max_memory_gb": None, "max_ms": None}
    assert told["figures"]["index_bytes"]["ratio"] == pytest.approx(1.0, abs=0.1)
    assert {"recall", "ms", "add_seconds"} <= set(told["figures"])
    assert version["recall"]["value"] >= 0.5
    planned = pinakes_json("plan", auto, "--pilot", "--quiet")
    assert planned["chosen"] == version["factory"]
    assert {"Flat", "SQfp16", "HNSW32"} <= {c["factory"] for c in planned["candidates"]}
    (why, names), *others = planned["untried"].items()
    assert "SQ8" in names
    assert "nothing to save where the vectors take" in why
    assert told["untried"] == planned["untried"] == {why: names, **dict(others)}
    assert not {c["factory"] for c in planned["candidates"]} & {
        name for few in planned["untried"].values() for name in few
    }
    shown = " ".join(pinakes("plan", auto, "--pilot", "--quiet").split())
    assert "Not tried: " in shown
    assert pinakes_json("index", auto, "--quiet")["version"] == version["version"]
    explicit = cats.config(factory=version["factory"], min_recall=0.5)
    assert pinakes_json("index", explicit, "--quiet")["version"] == version["version"]
    assert publish.list_versions(cats.root, "cats") == [version["version"]]


def test_auto_builds_codes_with_their_vectors_on_disk_where_that_is_asked_for(cats: Corpus) -> None:
    auto = cats.config(factory="auto", min_recall=0.5, refine="exact")
    version = pinakes_json("index", auto, "--quiet")
    told, files = version["forecast"], version["files"]
    assert version["config"]["refine"] == told["refine"] == "exact"
    assert "IVF" in version["factory"]
    assert version["recall"]["value"] >= 0.5
    vectors = sum(file["num_bytes"] for name, file in files.items() if name.startswith("vectors-"))
    assert vectors >= 2 * 250 * version["dim"]
    assert told["figures"]["index_bytes"]["ratio"] == pytest.approx(1.0, abs=0.1)
    assert told["figures"]["memory_bytes"]["forecast"] < told["figures"]["index_bytes"]["forecast"]
    assert any("their vectors on disk" in why for why in told["untried"])
    planned = pinakes_json("plan", auto, "--pilot", "--quiet")
    assert (planned["chosen"], planned["refine"]) == (version["factory"], "exact")
    page = (Path(cats.root) / "indexes" / "cats" / version["version"] / "report.html").read_text()
    assert "Not tried" in page


def test_limits_that_no_index_keeps_are_refused_and_those_that_one_keeps_are_kept(cats: Corpus) -> None:
    auto = cats.config(factory="auto", min_recall=0.5, max_memory_gb=1e-6)
    pinakes("encode", auto, "--quiet")
    refused = pinakes("index", auto, "--quiet", code=QualityError.exit_code)
    assert "no index keeps recall@10 0.5 within 1 kB in memory" in refused
    fixed = cats.config(factory="Flat", min_recall=0.5)
    shown = pinakes("plan", fixed, "--pilot", "--memory", "1kB", "--quiet", code=QualityError.exit_code)
    assert "Forecasts for 250 vectors" in " ".join(shown.split())
    planned = pinakes_json("plan", fixed, "--pilot", "--memory", "25kB", "--quiet")
    by_name = {c["factory"]: c for c in planned["candidates"]}
    assert by_name[planned["chosen"]]["memory_bytes"] <= 25_000
    assert not by_name["Flat"]["fits"]
    tiers = [c for c in planned["candidates"] if c["refine"] == "exact"]
    assert tiers  # the vectors do not fit
    assert all(c["index_bytes"] > c["memory_bytes"] for c in tiers)
    assert "add --pilot" in pinakes("plan", fixed, "--min-recall", "0.9", code=ConfigError.exit_code)
    assert "--rows" in pinakes("plan", fixed, "--pilot", "--rows", "5", code=ConfigError.exit_code)
