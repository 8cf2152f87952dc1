"""What Ray costs: the whole pipeline on Ray against the same encoder loop in plain processes on the same cores.

    python -m tests.bench.pipeline

Both read Parquet parts, tokenise, encode with all-MiniLM-L6-v2 and write embedding parts with receipts. Both rates are
read off the modification times of the files they write: the passages of all parts after each worker's first, over the
time from then to the last file in place. Start-up is printed on its own.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.encode import embedding_store, encode
from cluster.ingest import ingest
from cluster.progress import Progress
from cluster.session import session
from pipelines import corpus, embeddings
from pipelines.config import ClusterConfig, CorpusConfig, EncoderConfig
from pipelines.encode import Encoder, EncoderSpec, resolve
from pipelines.manifest import put_done
from pipelines.storage import Store
from tests.bench.common import keep, write_wiki

NUM_PASSAGES, PART_SIZE, ROUNDS = 6_144, 256, 3
WORKERS = os.cpu_count() or 1


def main() -> None:
    spec = resolve(EncoderConfig(checkpoint="sentence-transformers/all-MiniLM-L6-v2"))
    rates: dict[str, list[float]] = {"ray": [], "plain": []}
    startups: dict[str, list[float]] = {"ray": [], "plain": []}
    with tempfile.TemporaryDirectory() as folder:
        source = write_wiki(Path(folder) / "wiki.tsv", NUM_PASSAGES)
        config = CorpusConfig(name="bench", sources=[source], part_size=PART_SIZE)
        with session(ClusterConfig()):
            snapshot = ingest(folder, config, Progress(quiet=True))
        for _ in range(ROUNDS):  # in turn, so that a drift of the machine's speed touches both
            for kind, measure in (("plain", plain), ("ray", on_ray)):
                store = embedding_store(folder, snapshot["snapshot"], spec)
                store.remove_all()
                rate, startup = measure(folder, snapshot, spec, store)
                rates[kind].append(rate)
                startups[kind].append(startup)
                print(f"{kind:<6} {rate:8.1f} passages/s in steady state, start-up {startup:.1f} s", flush=True)
    ratios = sorted(r / p for r, p in zip(rates["ray"], rates["plain"], strict=True))
    ratio = ratios[len(ratios) // 2]
    keep("pipeline", {"rates": rates, "startup_seconds": startups, "ratios": ratios, "compute": spec.compute})
    print(f"ratio_ray_to_plain {ratio:.3f} {'ok' if ratio >= 0.9 else 'miss'}")


def plain(root: str, snapshot: dict[str, Any], spec: EncoderSpec, store: Store) -> tuple[float, float]:
    """Encode with one process a core and nothing else."""
    started = time.time()
    processes = [
        multiprocessing.get_context("spawn").Process(target=_loop, args=(root, snapshot, spec, store, n))
        for n in range(WORKERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return steady(store, started, snapshot)


def on_ray(root: str, snapshot: dict[str, Any], spec: EncoderSpec, store: Store) -> tuple[float, float]:
    """Encode with the pipeline, from a cluster that is not up yet."""
    started = time.time()
    with session(ClusterConfig()):
        encode(root, snapshot, spec, ClusterConfig(), Progress(quiet=True))
    return steady(store, started, snapshot)


def _loop(root: str, snapshot: dict[str, Any], spec: EncoderSpec, store: Store, worker: int) -> None:
    passages = corpus.corpus_store(root, snapshot["corpus"]).child(snapshot["snapshot"])
    encoder = Encoder(spec, "passage", num_threads=1)
    for number in range(worker, len(snapshot["parts"]), WORKERS):
        table = corpus.read_part(passages, snapshot["parts"][number])
        emb_ND = encoder.encode_passages(table["title"].to_pylist(), table["text"].to_pylist())
        data = embeddings.to_parquet(table["id"], emb_ND, spec.storage)
        put_done(store, embeddings.part_name(number), data, "bench", {"num_rows": len(table)})


def steady(store: Store, started: float, snapshot: dict[str, Any]) -> tuple[float, float]:
    """Return (passages/s after the first part of each worker, seconds until then)."""
    rows = {p["name"]: p["num_rows"] for p in snapshot["parts"]}
    finished = sorted((os.stat(store.path(n)).st_mtime, rows[n]) for n in store.files("part-"))
    assert len(finished) == len(rows)
    ready = finished[WORKERS - 1][0]
    return sum(r for _, r in finished[WORKERS:]) / (finished[-1][0] - ready), ready - started


if __name__ == "__main__":
    main()
