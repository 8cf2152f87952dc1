"""Recall and time of filtered search, against brute force among the selected rows.

    python -m tests.bench.filters --data FOLDER [--num 100000]

Real sentences and questions (`index_data`, which keeps their vectors in FOLDER). Rows are selected at random, or as a
run of neighbours in the wiki file, which is sorted by topic: then most of a question's neighbours are filtered away,
and what is left lies where an index would not look. `as is` is FAISS with the same selector and parameters; one thread.
The last line says whether recall among the selected rows is nowhere more than 0.02 below recall among all.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.index.among import search_among, select
from pipelines.index.build import add, train
from pipelines.index.exact import exact_topk
from pipelines.index.search import parameters, search
from pipelines.index.spec import parse_spec
from tests.bench.common import keep
from tests.bench.index_data import Data, prepare

Array = npt.NDArray[Any]
K = 10
_TOLERANCE = 0.02
SETUPS: list[tuple[str, dict[str, float]]] = [
    ("Flat", {}), ("SQ8", {}), ("IVF1024,SQ8", {"nprobe": 48}), ("IVF1024,Flat", {"nprobe": 48}),
    ("IVF1024,PQ64x4fs,RFlat", {"nprobe": 48, "k_factor": 8}), ("HNSW32", {"efSearch": 64}),
    ("HNSW32_SQ8", {"efSearch": 64}),
]  # fmt: skip
SHARES = (0.5, 0.1, 0.01, 0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that keeps the vectors from run to run")
    parser.add_argument("--num", type=int, default=100_000, help="sentences")
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    data = Data(options.data)
    prepare({"folder": str(options.data), "num": options.num})
    vectors = np.load(data.vectors, mmap_mode="r")[: options.num].astype(np.float32)
    queries = np.load(data.unseen)[: options.queries]
    masks = {(kind, share): _mask(kind, share, len(vectors)) for kind in ("random", "topic") for share in SHARES}
    exact = {key: _exact(vectors, mask, queries) for key, mask in masks.items()}
    everything = _exact(vectors, np.ones(len(vectors), np.bool_), queries)
    print(f"{len(vectors):,} vectors, {len(queries)} questions, recall@{K} and ms a question")
    print(f"{'index':<24} {'all rows':>14}  {'selected':>14} {'filtered':>14} {'as is':>14}")
    table: list[dict[str, Any]] = []
    for factory, params in SETUPS:
        table += _measure(_built(factory, vectors), factory, params, queries, everything, masks, exact)
    worst = min(row["recall"] - row["recall_of_all"] for row in table)
    keep("filters", {"rows": table, "num": len(vectors), "queries": len(queries), "k": K})
    print(f"recall among the selected, at worst against recall among all {worst:+.3f} "
          f"{'ok' if worst >= -_TOLERANCE else 'miss'}")  # fmt: skip


def _mask(kind: str, share: float, num: int) -> npt.NDArray[np.bool_]:
    if kind == "random":
        return np.random.default_rng(0).random(num) < share
    start = num // 3
    return (np.arange(num) >= start) & (np.arange(num) < start + int(share * num))


def _exact(vectors: Array, mask: Array, queries: Array) -> Array:
    rows = np.flatnonzero(mask)
    return exact_topk(queries, [(vectors[rows], rows)], K, "ip")[1]


def _built(factory: str, vectors: Array) -> Any:
    spec = parse_spec(factory, vectors.shape[1], "ip")
    sample = np.random.default_rng(0).permutation(len(vectors))[: spec.default_train_rows(len(vectors))]
    index = train(spec, vectors[np.sort(sample)])
    add(index, vectors, np.arange(len(vectors)))
    return index


def _measure(
    index: Any, factory: str, params: dict[str, float], queries: Array, everything: Array, masks: Any, exact: Any
) -> list[dict[str, Any]]:
    """Return and print a row for each selection."""
    table = []
    recall_of_all, ms_of_all = _timed(lambda: search(index, queries, K, params, 1)[1], everything)
    for (kind, share), mask in masks.items():
        selection = select(index, mask, 0)
        recall, ms = _timed(lambda s=selection: search_among(index, s, queries, K, params, 1)[1], exact[kind, share])  # type: ignore[misc]
        plain_recall, plain_ms = _timed(lambda s=selection: _as_is(index, s, params, queries), exact[kind, share])  # type: ignore[misc]
        print(f"{factory:<24} {recall_of_all:6.3f} {ms_of_all:7.3f}  {kind:>7} {share:6.1%} "
              f"{recall:6.3f} {ms:7.3f} {plain_recall:6.3f} {plain_ms:7.3f}", flush=True)  # fmt: skip
        table.append({
            "factory": factory, "params": params, "kind": kind, "share": share, "selected": selection.count,
            "recall_of_all": recall_of_all, "ms_of_all": ms_of_all, "recall": recall, "ms": ms,
            "recall_as_is": plain_recall, "ms_as_is": plain_ms,
        })  # fmt: skip
    return table


def _as_is(index: Any, selection: Any, params: dict[str, float], queries: Array) -> Array:
    """Return the rows that FAISS finds with the selector and unchanged parameters."""
    found: Array = index.search(queries, K, params=parameters(index, params, selection.selector()))[1]
    return found


def _timed(find: Any, exact: Array) -> tuple[float, float]:
    find()
    began = time.perf_counter()
    found = find()
    ms = (time.perf_counter() - began) * 1000 / len(found)
    pairs = zip(found.tolist(), exact.tolist(), strict=True)
    recall = np.mean([len({r for r in a if r >= 0} & set(b)) / max(1, sum(r >= 0 for r in b)) for a, b in pairs])
    return float(recall), ms


if __name__ == "__main__":
    main()
