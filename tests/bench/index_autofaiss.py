"""autofaiss, as a peer of the index benchmark, in an interpreter of its own: `PYTHON index_autofaiss.py JOB.json`.

It needs pyarrow < 21 and numpy < 2. It gets the vectors in memory and a budget, chooses an index, builds it and tunes
it to its own default query time. A build that dies is a result, and kept with its last words. Also here, because they
need nothing but NumPy and FAISS: how every index of the benchmark is measured.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_LAST_WORDS = 400  # characters
_NUM_TIMED = 500  # queries


def recall(found_QK: Any, exact_QK: Any) -> float:
    """Return the mean share of the exact rows that were found."""
    shares = [len(set(f) & set(e)) / len(e) for f, e in zip(found_QK.tolist(), exact_QK.tolist(), strict=True)]
    return float(np.mean(shares))


def milliseconds_a_query(search: Callable[[Any], Any], queries_QD: Any) -> float:
    """Return the median time of one query asked alone; the first ones, which warm the caches, are not counted."""
    spent = []
    for query_D in queries_QD[:_NUM_TIMED]:
        begun = time.perf_counter()
        search(query_D[None, :])
        spent.append(time.perf_counter() - begun)
    return float(1000 * np.median(spent[len(spent) // 10 :]))


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Build and measure one index. The clock runs from vectors in memory to an index on disk."""
    import autofaiss
    import faiss

    emb_ND, cores = np.load(job["vectors"]), os.cpu_count() or 1
    ready = time.time()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "knn.index")
        index, told = autofaiss.build_index(
            emb_ND,
            index_path=path,
            index_infos_path=os.path.join(folder, "infos.json"),
            max_index_memory_usage=job["budget"],
            current_memory_available="16GB",
            metric_type="ip",
            nb_cores=cores,
        )
        seconds = time.time() - ready
        num_bytes = os.path.getsize(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    queries, exact = np.load(job["queries"]), np.load(job["exact"])
    faiss.omp_set_num_threads(1)
    k = exact.shape[1]
    return {
        "rate": len(emb_ND) / seconds,
        "startup": ready - job["started"],
        "seconds": seconds,
        "factory": told.get("index_key"),
        "params": told.get("index_param"),
        "recall": recall(index.search(queries, k)[1], exact),
        "ms_a_query": milliseconds_a_query(lambda query: index.search(query, k), queries),
        "index_bytes": num_bytes,
        "peak_bytes": peak,
        "packages": {"autofaiss": _version("autofaiss"), "faiss-cpu": faiss.__version__, "numpy": np.__version__},
    }


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def main() -> None:
    path = sys.argv[1]
    job = json.loads(Path(path).read_text())
    if len(sys.argv) > 2:  # the child, whose death must not be ours
        Path(job["result"]).write_text(json.dumps(build(job)))
        return
    begun = time.time()
    done = subprocess.run([sys.executable, __file__, path, "build"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    words = done.stdout.decode(errors="replace")
    print(words)
    if done.returncode:
        crash = {"exit_status": done.returncode, "seconds": time.time() - begun, "last_words": words[-_LAST_WORDS:]}
        Path(job["result"]).write_text(json.dumps({"crashed": crash}))


if __name__ == "__main__":
    main()
