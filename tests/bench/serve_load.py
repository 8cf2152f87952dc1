"""Section load: queries/s and latency under many callers and under one, against the alternative and the bare loop."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.encode_jobs import judge, module, run_job
from tests.bench.serve_client import ask
from tests.bench.serve_data import MINILM, Corpus
from tests.bench.serve_server import Server, baseline, ours

CLIENTS, K = 32, 10
PROXIES = ("python", "haproxy")
_PILOTS = (
    {"threads": 1},
    {"threads": 2},
    {"threads": 1, "dtype": "bfloat16"},
    {"threads": 1, "batches": 64},
    {"threads": 1, "batches": 64, "dtype": "bfloat16"},
)
_GATEWAYS = "ours, haproxy, 2 gateways"
_SAME_ANSWERS = 200  # questions asked of both sides
_ALIKE = 0.98  # of them with the same best passage: bf16 may turn a near tie around

Result = dict[str, Any]


@dataclass
class Work:
    """What every section gets. seconds: of each measured load."""

    corpus: Corpus
    folder: Path
    seconds: float
    rounds: int = 1
    proxies: tuple[str, ...] = PROXIES
    held: list[str] = field(default_factory=list)

    def judge(self, name: str, value: float, wanted: float, *, at_most: bool = False) -> None:
        """Print whether a figure holds, and remember it for the summary."""
        line = judge(name, value, wanted, at_most=at_most)
        self.held.append(line)
        print(line, flush=True)


def load(work: Work) -> Result:
    work.corpus.build("bench", {"one": MINILM})
    plain, batching = _pilot(work)
    bare = [_bare(work)]
    rows: dict[str, list[Result]] = {}
    for _ in range(work.rounds):
        runs = {"alternative": partial(baseline, work.corpus, work.folder, plain)}
        for proxy in work.proxies:
            runs[f"ours, {proxy}"] = partial(ours, work.corpus, work.folder, "one", proxy=proxy)
        if "haproxy" in work.proxies:
            runs[_GATEWAYS] = partial(ours, work.corpus, work.folder, "one", proxy="haproxy", replicas=2, threads=1)
        runs["alternative, batching"] = partial(baseline, work.corpus, work.folder, batching)
        for name, server in runs.items():
            rows.setdefault(name, []).append(_measure(work, name, server()))
    bare.append(_bare(work))
    return _compare(work, rows, bare, {"plain": plain, "batching": batching})


def _pilot(work: Work) -> tuple[Result, Result]:
    """Return the alternative's best setting without and with batching, by a short load of each."""
    rates: dict[bool, list[tuple[float, Result]]] = {True: [], False: []}
    for setting in _PILOTS:
        with baseline(work.corpus, work.folder, setting) as server:
            seconds = max(3.0, work.seconds / 10)
            found = ask(work.folder, server.address, work.corpus.questions, clients=CLIENTS, k=K, seconds=seconds,
                        warm_seconds=2).summary()  # fmt: skip
        print(f"  alternative {setting}: {found['rate']:.0f} queries/s, {found['failed']} failed", flush=True)
        rates["batches" in setting].append((0.0 if found["failed"] else found["rate"], setting))
    return tuple(max(rates[kind], key=lambda pair: pair[0])[1] for kind in (False, True))  # type: ignore[return-value]


def _measure(work: Work, name: str, server: Server) -> Result:
    """Load a server with many callers, then with one."""
    questions = work.corpus.questions
    with server:
        same = best_rows(server.address, json.loads(questions.read_text())[:_SAME_ANSWERS])
        many = ask(work.folder, server.address, questions, clients=CLIENTS, k=K, seconds=work.seconds, warm_seconds=3)
        one = ask(work.folder, server.address, questions, clients=1, k=K, seconds=work.seconds / 4, warm_seconds=1)
        memory = server.memory_now()
    result = {**many.summary(), "one": one.summary(), "rss_mib": memory, "startup_seconds": server.startup_seconds}
    told = "  ".join(f"p{p} {result[f'p{p}_ms']:.0f}" for p in (50, 95, 99))
    print(f"  {name:<25} {result['rate']:7.1f} queries/s  {told} ms  failed {result['failed']}; one caller: "
          f"p50 {result['one']['p50_ms']:.2f} ms; {memory['all']:.0f} MiB", flush=True)  # fmt: skip
    return result | {"best_rows": same}


def best_rows(address: str, questions: list[str]) -> list[int]:
    """Return the row of the best hit of each question."""
    rows = []
    for question in questions:
        body = json.dumps({"query": question, "k": 1}).encode()
        request = urllib.request.Request(f"{address}/search", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            rows.append(json.load(response)["hits"][0]["row"])
    return rows


def _bare(work: Work) -> Result:
    sizes = {"batch": CLIENTS, "k": K, "seconds": work.seconds / 4}
    job = {"root": work.corpus.root, "alias": "bench", "questions": str(work.corpus.questions), **sizes}
    found = run_job(module("serve_bare"), job, work.folder)
    print(f"  bare loop                 {found['rate']:7.1f} queries/s in batches of {CLIENTS}; one question: "
          f"p50 {found['one_p50_ms']:.2f} ms", flush=True)  # fmt: skip
    return found


def _compare(work: Work, rows: dict[str, list[Result]], bare: list[Result], settings: Result) -> Result:
    middle = {name: sorted(runs, key=lambda run: float(run["rate"]))[len(runs) // 2] for name, runs in rows.items()}
    alternative = middle["alternative"]
    reference = alternative.pop("best_rows")
    bare_rate = sum(found["rate"] for found in bare) / len(bare)
    bare_one = sum(found["one_p50_ms"] for found in bare) / len(bare)
    for name, row in middle.items():
        row["share_of_bare"] = row["rate"] / bare_rate
        row["ratio"] = row["rate"] / alternative["rate"]
        row["overhead_ms"] = row["one"]["p50_ms"] - bare_one
        alike = [a == b for a, b in zip(row.pop("best_rows", reference), reference, strict=True)]
        row["same_best_passage"] = sum(alike) / len(alike)
        assert row["same_best_passage"] >= _ALIKE, f"{name} does not answer what the alternative answers"
        print(f"  {name:<25} {row['ratio']:.2f} of the alternative, {row['share_of_bare']:.2f} of the bare loop, "
              f"overhead {row['overhead_ms']:.2f} ms")  # fmt: skip
    for proxy in work.proxies:
        row = middle[f"ours, {proxy}"]
        work.judge(f"ratio_{proxy}", row["ratio"], 1.5)
        work.judge(f"p99_over_alternative_{proxy}", row["p99_ms"] / alternative["p99_ms"], 1.0, at_most=True)
        work.judge(f"overhead_ms_{proxy}", row["overhead_ms"], 5.0, at_most=True)
        work.judge(f"failed_{proxy}", row["failed"] + row["one"]["failed"], 0, at_most=True)
    runs = {name: [{k: v for k, v in run.items() if k != "best_rows"} for run in found] for name, found in rows.items()}
    return {"rows": middle, "bare": bare, "alternative": settings, "runs": runs, "clients": CLIENTS, "k": K}
