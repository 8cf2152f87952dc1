"""Peak memory of every worker, and time per vector, while up to 4,000,000 x 256 vectors become IVF2048,SQ8 in 8 shards.

    python -m tests.bench.index_memory [--sizes 500000,1000000,2000000,4000000] [--factory IVF2048,SQ8]

The vectors are synthetic, in clusters, written straight as embedding parts. Memory is each process's own (RssAnon: what
it holds beside mapped files), read ten times a second; time per vector is that of add and merge, which come after
training. The timings want a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from cluster.encode import embedding_store
from pipelines import corpus, embeddings
from pipelines.config import load_config
from pipelines.encode import resolve
from pipelines.manifest import drop_receipts, fingerprint, put_done, write_manifest
from tests.bench.common import PINAKES, keep, pinakes
from tests.checkpoints import write_sentence_transformer

SIZES = (500_000, 1_000_000, 2_000_000, 4_000_000)
DIM, NUM_SHARDS, NUM_CLUSTERS = 256, 8, 4000
MOST_MIB, MOST_SPREAD = 2048, 0.15
INDEX = {"name": "synthetic", "factory": "IVF2048,SQ8", "num_shards": NUM_SHARDS, "group_rows": 131_072,
         "search_params": {"nprobe": 16}, "recall_queries": 20}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of vectors, with commas")
    parser.add_argument(
        "--factory", default=INDEX["factory"], help="another index: from IVF4096 on, training is spread"
    )
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="write the results file")
    options = parser.parse_args()
    measured = {}
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            config = prepare(Path(folder), size, options.factory)
            measured[str(size)] = found = build(config, size)
        worker = max(found["peak_mib"].items(), key=lambda pair: pair[1])
        print(f"{size:>9,} vectors: train {found['train_seconds']:.1f} s, add {found['add_seconds']:.1f} s, merge "
              f"{found['merge_seconds']:.1f} s, {found['us_per_vector']:.2f} us a vector; the largest worker: "
              f"{worker[1]:.0f} MiB in {worker[0]}", flush=True)  # fmt: skip
    peak = max(mib for found in measured.values() for mib in found["peak_mib"].values())
    times = [found["us_per_vector"] for found in measured.values()]
    spread = max(times) / min(times) - 1
    if options.keep:
        keep(
            "index_memory",
            {
                "index": {**INDEX, "factory": options.factory},
                "dim": DIM,
                "sizes": measured,
                "peak_mib": peak,
                "spread": spread,
            },
        )
    reached = peak < MOST_MIB and spread <= MOST_SPREAD
    print(f"peak_worker_mib {peak:.0f} spread_time_per_vector {spread:.3f} {'ok' if reached else 'miss'}")


def prepare(folder: Path, size: int, factory: str) -> str:
    """Write a corpus of short passages, ingest it, and put its embeddings in place; return the config."""
    source = folder / "corpus.tsv"
    with source.open("w") as out:
        out.write("id\ttext\ttitle\n")
        out.writelines(f"{row}\tthe passage of row {row}\t\n" for row in range(size))
    content = {
        "root": str(folder / "root"),
        "corpus": {"name": "synthetic", "sources": [str(source)]},
        "encoder": {"checkpoint": write_sentence_transformer(str(folder / "model"), DIM), "compute": "fp32"},
        "index": {**INDEX, "factory": factory},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(content))
    pinakes("ingest", str(path), "--quiet")
    write_embeddings(str(path))
    return str(path)


def write_embeddings(config_path: str) -> None:
    """Put unit vectors in clusters in place as the finished embeddings of the snapshot."""
    config = load_config(config_path)
    snapshot = corpus.find_snapshot(config.root, corpus.plan_ingest(config.corpus))
    assert snapshot
    spec = resolve(config.encoder)
    store = embedding_store(config.root, snapshot["snapshot"], spec)
    centres = np.random.default_rng(0).standard_normal((NUM_CLUSTERS, DIM), dtype=np.float32)
    entries = []
    for number, part in enumerate(snapshot["parts"]):
        rng = np.random.default_rng([1, number])
        emb_ND = 0.5 * rng.standard_normal((part["num_rows"], DIM), dtype=np.float32)
        emb_ND += centres[rng.integers(NUM_CLUSTERS, size=len(emb_ND))]
        emb_ND /= np.linalg.norm(emb_ND, axis=1, keepdims=True)
        data = embeddings.to_parquet([""] * len(emb_ND), emb_ND, spec.storage)
        name = embeddings.part_name(number)
        receipt = put_done(store, name, data, fingerprint(name), {"num_rows": len(emb_ND), "num_tokens": 0})
        entries.append({**receipt.as_entry(), "first_row": part["first_row"]})
    content = {**{key: snapshot[key] for key in ("snapshot", "num_rows")}, "corpus": "synthetic", "dim": DIM}
    write_manifest(store, "embeddings", {**content, "encoder": spec.as_dict(), "parts": entries})
    drop_receipts(store)


def build(config: str, size: int) -> dict[str, Any]:
    """Build the index through the command, watching every process below it; return times and peaks by task."""
    process = subprocess.Popen([PINAKES, "index", config, "--quiet", "--json"], stdout=subprocess.PIPE, text=True)
    peaks: dict[str, float] = defaultdict(float)
    watching = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peaks, watching))
    watcher.start()
    told, _ = process.communicate()
    watching.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"pinakes index failed with {process.returncode}")
    stages = json.loads(told)["stages"]
    seconds = {f"{stage}_seconds": stages[stage]["seconds"] for stage in ("train", "add", "merge")}
    us = (seconds["add_seconds"] + seconds["merge_seconds"]) / size * 1e6
    return {**seconds, "us_per_vector": us, "peak_mib": dict(peaks)}


def watch(pid: int, peaks: dict[str, float], stop: threading.Event) -> None:
    """Note the most that any one worker of Ray, and the command itself, held: by what it was doing then."""
    while not stop.wait(0.1):
        try:
            tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for member in tree:
            try:
                title = "command" if member.pid == pid else " ".join(member.cmdline())[:40]
                if title == "command" or title.startswith("ray::"):
                    peaks[title] = max(peaks[title], own_mib(member.pid))
            except (psutil.Error, OSError):
                continue


def own_mib(pid: int) -> float:
    """Return the memory that a process holds beside files, MiB."""
    with open(f"/proc/{pid}/status") as lines:
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")), 0.0)


if __name__ == "__main__":
    main()
