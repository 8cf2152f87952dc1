"""What the encode benchmark's parts share: jobs in fresh processes, rates of the steady state, agreement, tables.

A job is a dict written as JSON for another interpreter, which writes its result, a dict too, beside it. Imports nothing
heavy: the jobs do.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WORKERS = os.cpu_count() or 1
_LOG_TAIL = 2000  # characters of a failed job's output that are shown
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "CUDA_VISIBLE_DEVICES": ""}

Result = dict[str, Any]
Span = tuple[float, float, int]
"""(begun, ended, rows) of one piece of work; times as time.time() gives them."""


def run_job(program: Sequence[str], job: dict[str, Any], folder: Path, *, threads: int | None = None) -> Result:
    """Run `program JOB.json` in a fresh process and return its result; end the benchmark when it fails.

    threads: OMP_NUM_THREADS of the process and its children; None leaves torch's own default.
    """
    number = len(list(folder.glob("job-*.json")))
    path, result, log = (folder / f"job-{number:03d}.{end}" for end in ("json", "result", "log"))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | _QUIET
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    path.write_text(json.dumps({**job, "result": str(result), "started": time.time()}))
    with log.open("wb") as output:
        done = subprocess.run([*program, str(path)], env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode or not result.is_file():
        print(log.read_text(errors="replace")[-_LOG_TAIL:])
        sys.exit(f"a job failed (exit status {done.returncode}): {' '.join(program)} {path}")
    content: Result = json.loads(result.read_text())
    return content


def module(name: str) -> list[str]:
    """Return the command of a benchmark module, in this interpreter."""
    return [sys.executable, "-m", f"tests.bench.{name}"]


def steady(spans: Sequence[Span], end: float, workers: int) -> tuple[float, float]:
    """Return (rows/s in the steady state, when it began).

    It begins when `workers` pieces are under way at once and lasts until `end`. Of a piece that began before, the rows
    of the time since count.
    """
    events = sorted([(begun, 1) for begun, _, _ in spans] + [(ended, -1) for _, ended, _ in spans])
    busy, start = 0, max(begun for begun, _, _ in spans)  # when they never were: as late as can be
    for moment, step in events:
        busy += step
        if busy == workers:
            start = moment
            break
    rows: float = sum(n * max(0.0, ended - max(begun, start)) / (ended - begun) for begun, ended, n in spans)
    return rows / (end - start), start


def agreement(found: Path, expected: Path) -> dict[str, float]:
    """Return the smallest and the mean cosine of two files of vectors (N, D), row by row."""
    a_ND, b_ND = (np.load(path).astype(np.float64) for path in (found, expected))
    assert a_ND.shape == b_ND.shape, f"{a_ND.shape} vectors against {b_ND.shape}"
    cosine_N = (a_ND * b_ND).sum(1) / (np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1))
    return {"min_cosine": float(cosine_N.min()), "mean_cosine": float(cosine_N.mean())}


@dataclass
class Row:
    """One line of a table: what was run, what each run gave, and ours over it.

    ratios: each against the mean of our runs just before and just after it, so that a drift of the machine's speed
    touches both.
    """

    name: str
    runs: list[Result] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return statistics.median(float(run["rate"]) for run in self.runs)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios) if self.ratios else 1.0

    def as_dict(self) -> dict[str, Any]:
        own = {"rate": self.rate, "ratio": self.ratio, "ratios": self.ratios}
        return {**own, **self.facts, "runs": self.runs}


def compare(
    ours: Callable[[], Result], peers: dict[str, Callable[[], Result]], rounds: int, unit: str
) -> dict[str, Row]:
    """Run ours, a peer, ours, the next peer, ..., ours; print each run. The first row is ours."""
    rows = {"ours": Row("ours"), **{name: Row(name) for name in peers}}

    def measure(name: str, run: Callable[[], Result]) -> float:
        result = run()
        rows[name].runs.append(result)
        rate = float(result["rate"])
        print(f"  {name:<{max(map(len, rows))}} {rate:8.2f} {unit}/s, start-up {result['startup']:5.1f} s", flush=True)
        return rate

    before = measure("ours", ours)
    for _ in range(rounds):
        for name, peer in peers.items():
            rate = measure(name, peer)
            after = measure("ours", ours)
            rows[name].ratios.append((before + after) / 2 / rate)
            before = after
    return rows


def print_table(rows: dict[str, Row], unit: str, limit: float) -> None:
    """Print medians, ours over each, and what ours over each would be at the machine's matrix limit (`limit`/s)."""
    facts = sorted({name for row in rows.values() for name in row.facts if isinstance(row.facts[name], float)})
    wide = max(len(name) for name in rows)
    print(f"{'':<{wide}} {unit + '/s':>12} {'ours / it':>10} {'limit / it':>10}" + "".join(f" {f:>14}" for f in facts))
    for row in rows.values():
        values = "".join(f" {row.facts[f]:14.6f}" if f in row.facts else "" for f in facts)
        print(f"{row.name:<{wide}} {row.rate:12.2f} {row.ratio:10.2f} {limit / row.rate:10.2f}{values}")


def judge(name: str, value: float, wanted: float, *, at_most: bool = False) -> str:
    """Return "name value, wanted ...: ok" or the same with "miss"."""
    held = value <= wanted if at_most else value >= wanted
    return f"{name} {value:.4g} (wanted {'<=' if at_most else '>='} {wanted:g}) {'ok' if held else 'miss'}"
