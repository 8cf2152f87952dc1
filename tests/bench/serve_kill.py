"""Section kill: parts of the server killed under load."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tests.bench.encode_models import write_cross_encoder
from tests.bench.serve_client import Answers, Load
from tests.bench.serve_data import MINILM, model_directory
from tests.bench.serve_load import CLIENTS, K, Result, Work
from tests.bench.serve_server import Server, ours

_SETTLE_SECONDS = 4.0
_BACK_SECONDS = 90.0
_DEPTH = 5  # hits reranked: enough to need the reranker, few enough for 2 cores


def kill(work: Work) -> Result:
    """Kill one replica of each kind, with a second beside it, then the only one of a shard."""
    work.corpus.build("two", {"two": MINILM}, two=2)
    model = write_cross_encoder(work.folder, model_directory())
    rerank = {"checkpoint": model, "depth": _DEPTH}
    results: Result = {}
    for proxy in work.proxies:
        spread = {"proxy": proxy, "placement": "spread"}
        with ours(work.corpus, work.folder, "two", replicas=2, shard_replicas=2, **spread) as server:
            for role in ("shard", "gateway"):
                results[f"{role}_of_2_{proxy}"] = _killing(work, server, role, proxy, {})
        stages = {"rerank": rerank, "stage_replicas": 2, "cpus_per_stage": 0.2}
        with ours(work.corpus, work.folder, "two", proxy=proxy, **stages) as server:
            results[f"reranker_of_2_{proxy}"] = _killing(work, server, "reranker", proxy, {"rerank": True})
        with ours(work.corpus, work.folder, "two", **spread) as server:
            results[f"shard_of_1_{proxy}"] = _killing(work, server, "shard", proxy, {}, lonely=True)
    return results


def _killing(work: Work, server: Server, role: str, proxy: str, fields: dict[str, Any], lonely: bool = False) -> Result:
    """Kill one process of a role under load and watch until another stands in its place."""
    clients = CLIENTS if not fields else 8
    settings = {"clients": clients, "k": K, "seconds": 3600, "warm_seconds": 2, "fields": fields}
    many = len(server.role(role))
    with Load(work.folder, server.address, work.corpus.questions, **settings) as load:
        time.sleep(settings["warm_seconds"] + _SETTLE_SECONDS)
        killed = time.time()
        pid = server.kill(role)
        back = _until_back(server, role, pid, many, killed)
        time.sleep(_SETTLE_SECONDS)
        answers = load.finish()
    name = f"{role} of {1 if lonely else 2}, {proxy}"
    result = _after(answers, killed) | {"back_seconds": back}
    print(f"  {name}: {result['failed']} failed {result['statuses']}, {result['partial']} partial, all well after "
          f"{result['recovery_seconds']:.2f} s, a new process after {back:.1f} s; p99 {result['p99_before_ms']:.0f} -> "
          f"{result['p99_ms']:.0f} ms of {len(answers)} requests", flush=True)  # fmt: skip
    if lonely:  # one half is gone for a while: answers must say so, and none may be lost
        work.judge(f"kill_{role}_alone_unanswered_{proxy}", result["lost"], 0, at_most=True)
        work.judge(f"kill_{role}_alone_recovery_seconds_{proxy}", result["recovery_seconds"], 60.0, at_most=True)
    else:
        work.judge(f"kill_{role}_failed_{proxy}", result["failed"] + result["partial"], 0, at_most=True)
    return result


def _until_back(server: Server, role: str, pid: int, many: int, killed: float) -> float:
    """Return the seconds until as many processes of the role are there as before, none of them the killed one."""
    while time.time() - killed < _BACK_SECONDS:
        pids = [member.pid for member in server.role(role)]
        if len(pids) >= many and pid not in pids:
            return time.time() - killed
        time.sleep(0.25)
    return float("inf")


def _after(answers: Answers, killed: float) -> Result:
    """Return counts since the kill, and how long after it the last answer ended that was none, or not whole."""
    bad = answers.where((answers.status_N != 200) | answers.partial_N)
    late = (bad.started_N + bad.seconds_N).max() - killed if len(bad) else 0.0
    early = bool(len(bad)) and bool((bad.started_N + bad.seconds_N < killed).any())
    refused = int(np.isin(answers.status_N, (200, 429, 503)).sum())
    before = answers.sent_within(0, killed - 1)
    return {**answers.summary(), "recovery_seconds": float(late), "bad_before_the_kill": early,
            "lost": len(answers) - refused, "p99_before_ms": before.milliseconds(99)}  # fmt: skip
