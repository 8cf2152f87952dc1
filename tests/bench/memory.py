"""Peak memory of ingest and index on 89,197 passages and on ten times as many.

    python -m tests.bench.memory

The corpus is the Wikipedia file repeated under new ids. The vectors are random (their values do not matter here), 384-d
fp16. Every process of the run counts, Ray's included: the peak of the sum of their proportional set sizes (PSS, which
counts a shared page once), read five times a second.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from cluster.encode import embedding_store
from pipelines import corpus, embeddings
from pipelines.config import EncoderConfig, load_config
from pipelines.encode import resolve
from pipelines.manifest import drop_receipts, fingerprint, put_done, write_manifest
from tests.bench.common import PINAKES, keep, need_data, write_wiki

NUM_PASSAGES = 89_197
_DIM_SEED = 384


def main() -> None:
    need_data()
    peaks: dict[str, dict[int, float]] = {"ingest": {}, "index": {}}
    seconds: dict[str, dict[int, float]] = {"ingest": {}, "index": {}}
    with tempfile.TemporaryDirectory() as folder:
        for copies in (1, 10):
            source = write_wiki(Path(folder) / f"wiki{copies}.tsv", NUM_PASSAGES, copies)
            config = write_config(Path(folder), source, copies)
            for verb in ("ingest", "index"):
                if verb == "index":
                    random_embeddings(config)
                peaks[verb][copies], seconds[verb][copies] = peak_of([PINAKES, verb, config, "--quiet"])
                print(f"{verb:<7} {copies * NUM_PASSAGES:>8,} passages: peak {peaks[verb][copies]:7.0f} MiB, "
                      f"{seconds[verb][copies]:.1f} s", flush=True)  # fmt: skip
            Path(source).unlink()
    growth = {verb: found[10] / found[1] for verb, found in peaks.items()}
    keep("memory", {"peak_mib": peaks, "seconds": seconds, "growth": growth})
    reached = all(g <= 1.2 for g in growth.values())
    print(f"growth_ingest {growth['ingest']:.3f} growth_index {growth['index']:.3f} {'ok' if reached else 'miss'}")


def write_config(folder: Path, source: str, copies: int) -> str:
    content = {
        "root": str(folder / f"root{copies}"),
        "corpus": {"name": "wiki", "sources": [source], "split_bytes": 16 << 20},
        "encoder": {"checkpoint": "sentence-transformers/all-MiniLM-L6-v2"},
        "index": {
            "name": "wiki",
            "factory": "IVF512,SQ8",
            "max_shard_rows": 45_000,
            "train_rows": 40_000,
            "recall_queries": 50,
        },
    }
    path = folder / f"{copies}.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def random_embeddings(config_path: str) -> None:
    """Write finished embeddings of the snapshot with random unit vectors."""
    config = load_config(config_path)
    plan = corpus.plan_ingest(config.corpus)
    snapshot = corpus.find_snapshot(config.root, plan)
    assert snapshot
    spec = resolve(EncoderConfig(checkpoint=config.encoder.checkpoint))
    store = embedding_store(config.root, snapshot["snapshot"], spec)
    rng, entries = np.random.default_rng(_DIM_SEED), []
    for number, part in enumerate(snapshot["parts"]):
        emb_ND = rng.standard_normal((part["num_rows"], spec.dim), dtype=np.float32)
        emb_ND /= np.linalg.norm(emb_ND, axis=1, keepdims=True)
        name = embeddings.part_name(number)
        data = embeddings.to_parquet([""] * len(emb_ND), emb_ND, spec.storage)
        facts = {"num_rows": len(emb_ND), "num_tokens": 0}
        receipt = put_done(store, name, data, fingerprint(name), facts)
        entries.append({**receipt.as_entry(), "first_row": part["first_row"]})
    content: dict[str, Any] = {
        **{key: snapshot[key] for key in ("snapshot", "num_rows")},
        "corpus": "wiki",
        "encoder": spec.as_dict(),
        "dim": spec.dim,
        "parts": entries,
    }
    write_manifest(store, "embeddings", content)
    drop_receipts(store)


def peak_of(command: list[str]) -> tuple[float, float]:
    """Run a command; return the peak of its process tree's PSS in MiB, and its wall seconds."""
    started, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        for member in [tree, *tree.children(recursive=True)]:
            try:
                total += member.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                continue
        peak = max(peak, total / 2**20)
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with {process.returncode}")
    return peak, time.monotonic() - started


if __name__ == "__main__":
    main()
