"""Run the real `pinakes` command as a process of its own, and kill it while it works."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

PINAKES = str(Path(sys.executable).with_name("pinakes"))
STAGES = ("ingest", "cut", "encode", "train", "add", "merge", "passages", "verify", "publish")
# How long after a stage has started a kill may come: about as long as the stage takes here.
_WITHIN_SECONDS = {
    "ingest": 1.5,
    "cut": 0.8,
    "encode": 0.05,
    "train": 4.0,
    "add": 2.0,
    "merge": 0.6,
    "passages": 0.5,
    "tune": 1.5,
    "verify": 2.0,
    "publish": 0.1,
}


def write_config(path: Path, corpus: str, checkpoint: str, root: str, **index: Any) -> str:
    """Write a config whose job has many small pieces in every stage."""
    content = {
        "root": root,
        "corpus": {"name": "c", "sources": [corpus], "part_size": 64, "split_bytes": 20_000},
        "encoder": {"checkpoint": checkpoint, "compute": "fp32"},
        "index": {
            "name": "i",
            "factory": "IVF16,SQ8",
            "num_shards": 3,
            "group_rows": 150,
            "recall_queries": 20,
            "search_params": {"nprobe": 4},
            **index,
        },
    }
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run(config: str, *options: str, check: bool = True, **env: str) -> dict[str, Any]:
    """Run `pinakes run` to its end and return its JSON result."""
    done = subprocess.run(
        [PINAKES, "run", config, "--json", *options], capture_output=True, text=True, env={**os.environ, **env}
    )
    if check and done.returncode:
        raise AssertionError(f"pinakes run failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return {"code": done.returncode, "stderr": done.stderr, **(json.loads(done.stdout) if done.stdout.strip() else {})}


def start(config: str) -> subprocess.Popen[str]:
    """Start `pinakes run` and return at once."""
    return subprocess.Popen(
        [PINAKES, "run", config, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_and_kill(config: str, stage: str, rng: random.Random) -> str:
    """Start `pinakes run`, SIGKILL it at a random moment of `stage`; say when, or that it had finished already."""
    process = subprocess.Popen(
        [PINAKES, "run", config, "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(f"{stage} ") and "started" in line:
            break
    else:
        code = process.wait()
        assert code == 0, f"the driver failed by itself with {code}:\n{''.join(lines)}"
        return f"{stage}: nothing left to do"
    if stage == "encode":  # most of this stage is start-up: come back when some of its parts are in place
        wait_for_parts(Path(yaml.safe_load(Path(config).read_text())["root"]), rng.randrange(1, 20), process)
    delay = rng.random() * _WITHIN_SECONDS[stage]
    try:
        process.communicate(timeout=delay)
        return f"{stage}: finished before the kill ({process.returncode})"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return f"{stage}: killed after {delay:.2f} s"


def wait_for_parts(root: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until `count` embedding parts are in place, or the process ends."""
    while process.poll() is None and len(list(root.glob("embeddings/*/*/part-*.parquet"))) < count:
        time.sleep(0.02)


def content_of(root: Path) -> dict[str, str]:
    """Return the sha256 of every data file under a root (manifests and reports carry times, so they are left out)."""
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix in (".parquet", ".faiss", ".arrow")]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def wait_for_quiet(root: Path, seconds: float = 1.0) -> None:
    """Wait until nothing under `root` changes any more: a killed driver's last workers take a moment to die."""
    before = None
    while (now := sorted((str(p), p.stat().st_mtime_ns) for p in root.rglob("*") if p.exists())) != before:
        before = now
        time.sleep(seconds)
