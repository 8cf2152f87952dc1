"""How true a pilot's forecast is: candidates tried on a sample, then built whole; every figure side by side.

    python -m tests.bench.forecast                       # 400,000 clustered vectors of width 128
    python -m tests.bench.forecast --rows 100000 --only IVF2048,SQ8 HNSW32

Without Ray, on one thread: the cores that share the work of a cluster are not part of what is measured. The last line
says how many figures lie within 20 %. `--vectors FILE.npy` takes real vectors instead: the last 500 are the queries.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

import numpy as np

from pipelines.index.build import add, add_whole, train, write
from pipelines.index.candidates import Candidate, candidates, default_lists
from pipelines.index.exact import exact_topk
from pipelines.index.forecast import FIGURES, Scale, compare, extrapolate
from pipelines.index.pilot import NEAR, Pilot, find_lists, measure, num_lists
from pipelines.index.search import search
from pipelines.index.spec import parse_spec
from pipelines.index.tune import HeldOut
from tests.bench.common import keep

_QUERIES, _SAMPLE, _TARGET = 500, 50_000, 0.9
_RANK = 24  # directions that the clusters' own spread has: embeddings fill few of their dimensions


def clustered(num: int, dim: int) -> Any:
    rng = np.random.default_rng(1)
    centres, directions = rng.standard_normal((2000, dim)), rng.standard_normal((_RANK, dim)) / np.sqrt(_RANK)
    near = centres[rng.integers(0, len(centres), num)] * 0.4 + rng.standard_normal((num, _RANK)) @ directions
    vectors = (near + 0.1 * rng.standard_normal((num, dim))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def built(candidate: Candidate, vectors_ND: Any, asked: HeldOut, params: dict[str, int], folder: str) -> dict[str, Any]:
    """Build the whole index; return a manifest and stages as a version's build gives them."""
    dim, rows = vectors_ND.shape[1], np.arange(len(vectors_ND))
    spec = parse_spec(candidate.factory, dim, "ip")
    picked = np.random.default_rng(7).choice(len(rows), spec.default_train_rows(len(rows)), replace=False)
    clock = [time.perf_counter()]
    index = train(spec, vectors_ND[np.sort(picked)], 7, 1)
    clock.append(time.perf_counter())
    if spec.grows:
        add_whole(index, [(vectors_ND, rows)], os.path.join(folder, "vectors"), 1)
    else:
        add(index, vectors_ND, rows, 1)
    clock.append(time.perf_counter())
    write(index, path := os.path.join(folder, "shard-000.faiss"))
    start = time.perf_counter()
    _, found_QK = search(index, asked.queries_QD, asked.k, params, 1)
    trial = asked.trial(params, found_QK, time.perf_counter() - start)
    stages = {
        name: {"seconds": b - a, "made": 1} for name, a, b in zip(("train", "add"), clock, clock[1:], strict=False)
    }
    files = {"shard-000.faiss": {"num_bytes": os.path.getsize(path)}}
    return {"version": {"files": files, "recall": {"value": trial.recall, "ms": trial.ms}}, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--sample", type=int, default=_SAMPLE)
    parser.add_argument("--vectors", help="an .npy file of vectors (N, D)")
    parser.add_argument("--only", nargs="*", help="factories; else all but those with a rotation")
    parser.add_argument("--keep", action="store_true", help="write tests/bench/results/forecast.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    whole = np.load(options.vectors) if options.vectors else clustered(options.rows + _QUERIES, options.dim)
    vectors, queries = np.asarray(whole[:-_QUERIES], np.float32), np.asarray(whole[-_QUERIES:], np.float32)
    found = run(vectors, queries, options.sample, options.only)
    ratios = [told["ratio"] for figures in found.values() for told in figures.values()]
    within = sum(abs(ratio - 1) <= 0.2 for ratio in ratios)
    result = {"rows": len(vectors), "dim": vectors.shape[1], "load_before": round(load, 2), "candidates": found}
    if options.keep:
        keep("forecast", result)
    verdict = "ok" if within == len(ratios) else "miss"
    print(f"summary: {within} of {len(ratios)} figures within 20 % of the forecast, load {load:.1f}: {verdict}")


def run(vectors: Any, queries: Any, num_sampled: int, only: list[str] | None) -> dict[str, Any]:
    """Return the figures of every candidate, forecast and actual."""
    rows, rng = np.arange(len(vectors)), np.random.default_rng(3)
    exact = exact_topk(queries, [(vectors, rows)], NEAR, "ip", 1)[1]
    sample = rng.permutation(len(rows))[: max(num_sampled, min(131_072, 39 * default_lists(len(rows))))]
    near = np.setdiff1d(np.unique(exact), sample)
    tune_on, unseen = HeldOut(queries, exact[:, :10]).halves(0)
    pilot = Pilot(vectors[sample], sample, vectors[near], near, tune_on, _TARGET, len(rows), 7)
    every = candidates(len(rows), vectors.shape[1], "ip")
    wanted = [c for c in every if (c.factory in only if only else not c.factory.startswith("OPQ"))]
    lists: dict[int, Any] = {}
    result = {}
    for candidate in wanted:
        spec = parse_spec(candidate.factory, vectors.shape[1], "ip")
        if (n := num_lists(spec)) and n not in lists:
            lists[n] = find_lists(pilot.sample_SD, n, "ip", 7, 1)
        measured = measure(candidate, spec, pilot, lists.get(n), 1)
        expected = extrapolate(measured, candidate, Scale(len(rows), 1, 1, spec.default_train_rows(len(rows)), 0.0))
        with tempfile.TemporaryDirectory() as folder:
            actual = built(candidate, vectors, unseen, expected.params, folder)
        figures = compare(expected.as_dict(), actual["version"], actual["stages"])["figures"]
        told = "  ".join(
            f"{k} {figures[k]['forecast']:.4g}->{figures[k]['actual']:.4g}" for k in FIGURES if k in figures
        )
        print(f"{candidate.factory:<24} {expected.params}  {told}", flush=True)
        result[candidate.factory] = figures
    return result


if __name__ == "__main__":
    main()
