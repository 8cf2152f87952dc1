"""The index benchmark's builds, each in a fresh process: `python -m tests.bench.index_jobs JOB.json`.

Tasks: prepare (the data), ours (a version built, tuned, verified and published on a cluster that is up), plain (the
same factory through FAISS alone, on the same number of threads, from vectors in memory to a file).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.index_autofaiss import milliseconds_a_query, recall
from tests.bench.index_data import Data, K, Result, prepare

_CORES = os.cpu_count() or 1
_BUILD_STAGES = ("train", "add", "merge")


def ours(job: dict[str, Any]) -> Result:
    """Build job["factory"] to the recall job["min_recall"] through Ray; measure what was published on unseen queries.

    The rate counts training, adding and merging, from embedding parts on disk to checked files in place, as plain FAISS
    does its part, from a file of vectors; tuning, passages and the rest are told apart.
    """
    from cluster.index import build_version
    from cluster.pools import run_tasks
    from cluster.progress import Progress
    from cluster.session import session
    from pipelines.config import ClusterConfig, IndexConfig
    from pipelines.errors import QualityError
    from pipelines.index.build import read
    from pipelines.publish import index_store

    data = Data(Path(job["folder"]))
    made = data.manifests()
    settings = {"factory": job["factory"], "min_recall": job["min_recall"], "train_rows": job["train_rows"]}
    config = IndexConfig(name=f"bench-{os.getpid()}", **settings)
    progress, refused, manifest = Progress(quiet=True), "", {}
    with session(ClusterConfig()):
        list(run_tasks(_nothing, range(4 * _CORES)))  # the cluster is up: its workers, too
        begun = time.time()
        try:
            manifest = build_version(data.root, config, made["snapshot"], made["embeddings"], progress, str(data.given))
        except QualityError as error:
            refused = str(error)
        wall = time.time() - begun
    stages = {name: stage["seconds"] for name, stage in progress.stages.items()}
    seconds = sum(stages[name] for name in _BUILD_STAGES)
    num_rows = made["embeddings"]["num_rows"]
    told = {"rate": num_rows / seconds, "startup": begun - job["started"], "seconds": seconds, "wall_seconds": wall,
            "stages": stages, "factory": job["factory"], "refused": refused}  # fmt: skip
    store = index_store(data.root, config.name)
    if manifest:
        names = [name for name in manifest["files"] if name.startswith("shard-")]
        folder = store.child(manifest["version"])
        shards = [read(folder.path(name), mmap=True) for name in names]
        told |= _measured(data, shards, manifest["search_params"])
        told |= {"verified": manifest["recall"]["value"], "index_bytes": sum(folder.size(name) for name in names)}
    shutil.rmtree(store.path())
    return told


def _nothing(item: int) -> int:
    time.sleep(0.05)
    return item


def _measured(data: Data, shards: list[Any], params: dict[str, int]) -> Result:
    """Return what queries that no build saw say of an index, searched on one thread."""
    from pipelines.index.search import merge_topk, search

    unseen_QD, exact_QK = np.load(data.unseen), np.load(data.exact)

    def ask(queries_BD: Any) -> Any:
        return merge_topk([search(shard, queries_BD, K, params, num_threads=1) for shard in shards], K)[1]

    return {
        "params": params,
        "recall": recall(ask(unseen_QD), exact_QK),
        "ms_a_query": milliseconds_a_query(ask, unseen_QD),
    }


def plain(job: dict[str, Any]) -> Result:
    """Train, add and write job["factory"] with FAISS alone, and search with the parameters that ours was tuned to."""
    import faiss

    data = Data(Path(job["folder"]))
    faiss.omp_set_num_threads(_CORES)
    ready = time.time()
    emb_ND = np.load(data.vectors)
    loaded = time.time()
    index = faiss.index_factory(emb_ND.shape[1], job["factory"], faiss.METRIC_INNER_PRODUCT)
    rows = np.sort(np.random.default_rng(0).choice(len(emb_ND), min(job["train_rows"], len(emb_ND)), replace=False))
    index.train(emb_ND[rows])
    trained = time.time()
    index.add(emb_ND)
    added = time.time()
    with tempfile.TemporaryDirectory(dir=data.folder) as folder:
        faiss.write_index(index, os.path.join(folder, "plain.faiss"))
        ended = time.time()
    stages = {"read": loaded - ready, "train": trained - loaded, "add": added - trained, "write": ended - added}
    told = {"rate": len(emb_ND) / (ended - ready), "startup": ready - job["started"], "seconds": ended - ready,
            "stages": stages}  # fmt: skip
    return told | (_measured(data, [index], job["params"]) if job["params"] else {})


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {"prepare": prepare, "ours": ours, "plain": plain}[job["task"]](job)
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
