"""Ray Data's documented way to embed texts, as a peer of the encode benchmark.

    python -m tests.bench.encode_ray_data JOB.json

`read_parquet`, `map_batches` with an actor that holds a SentenceTransformer, one actor a core (Ray gives each one
thread), `write_parquet`. The cluster is told of twice the cores: with every core given to an actor, the tasks that read
and write would wait for ever. Small files end up in one block, and so on one actor: blocks are cut so that every actor
has work.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.encode_jobs import WORKERS, Result, steady

_BATCH = 256  # rows that an actor gets at once; the model cuts them into batches of its own default, 32


class _Embedder:
    def __init__(self, checkpoint: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(checkpoint, device="cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        begun = time.time()
        batch["vector"] = self.model.encode(list(batch["text"]), show_progress_bar=False)
        rows = len(batch["text"])
        return batch | {"begun": [begun] * rows, "ended": [time.time()] * rows}


def run(job: dict[str, Any]) -> Result:
    """Embed the Parquet files under job["texts"]; the rate is of the steady state, as ours."""
    import pyarrow.parquet as pq
    import ray

    ray.init(num_cpus=2 * WORKERS, include_dashboard=False, log_to_driver=False)
    actors = ray.data.ActorPoolStrategy(size=WORKERS)
    (
        ray.data.read_parquet(job["texts"])
        .repartition(target_num_rows_per_block=_BATCH)
        .map_batches(_Embedder, fn_constructor_args=(job["checkpoint"],), batch_size=_BATCH, num_cpus=1, compute=actors)
        .write_parquet(job["target"])
    )
    ray.shutdown()
    files = sorted(Path(job["target"]).glob("*.parquet"))
    batches: dict[tuple[float, float], int] = {}
    for file in files:
        table = pq.read_table(file, columns=["begun", "ended"])
        for key in zip(table["begun"].to_pylist(), table["ended"].to_pylist(), strict=True):
            batches[key] = batches.get(key, 0) + 1
    spans = [(begun, ended, rows) for (begun, ended), rows in batches.items()]
    last = max(os.stat(file).st_mtime for file in files)
    rate, ready = steady(spans, last, min(WORKERS, len(spans)))
    num_rows = sum(batches.values())
    wall = last - job["started"]
    return {"rate": rate, "startup": ready - job["started"], "seconds": last - ready, "wall_seconds": wall,
            "num_rows": num_rows, "setting": {"batch": _BATCH}, "packages": {"ray": ray.__version__}}  # fmt: skip


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(run(job)))


if __name__ == "__main__":
    main()
