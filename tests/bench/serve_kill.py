"""Sections kill and overload: parts of the server killed under load, and ten times what it can answer."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from tests.bench.encode_models import write_cross_encoder
from tests.bench.serve_client import Answers, Load, ask
from tests.bench.serve_data import MINILM, model_directory
from tests.bench.serve_load import CLIENTS, K, Result, Work
from tests.bench.serve_server import Server, ours

_SETTLE_SECONDS = 4.0
_BACK_SECONDS = 90.0
_DEPTH = 5  # hits reranked: enough to need the reranker, few enough for 2 cores
_CROWD = 10 * CLIENTS
_ONGOING, _QUEUED = 32, 32
_PAUSE_SECONDS = 0.05  # a refused caller's, before it asks again


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


def overload(work: Work) -> Result:
    """Send what ten times as many callers can, in front of short queues; then as many as before."""
    work.corpus.build("bench", {"one": MINILM})
    return {proxy: _overloading(work, proxy) for proxy in work.proxies}


def _overloading(work: Work, proxy: str) -> Result:
    questions, seconds = work.corpus.questions, max(5.0, work.seconds / 3)
    limits = {"max_ongoing": _ONGOING, "max_queued": _QUEUED}
    with ours(work.corpus, work.folder, "one", proxy=proxy, **limits) as server:
        few = {"clients": CLIENTS, "k": K, "seconds": seconds, "warm_seconds": 3}
        before = ask(work.folder, server.address, questions, **few).summary()
        usual = server.memory_now()
        with server.memory() as peaks:
            crowd = ask(work.folder, server.address, questions, clients=_CROWD, k=K, seconds=seconds,
                        pause_refused=_PAUSE_SECONDS)  # fmt: skip
        after = ask(work.folder, server.address, questions, **few).summary()
    during = crowd.summary()
    offered = len(crowd) / max(1e-9, float(np.ptp(crowd.started_N)))
    bound = 1000 * 3 * (_ONGOING + _QUEUED) / before["rate"]  # thrice the time of everything ahead of a request
    print(f"  {proxy}: {before['rate']:.0f} queries/s before; {offered:.0f} asked of it a second by {_CROWD} callers: "
          f"{during['rate']:.0f} answered, {during['statuses']}, p99 of the answered {during['p99_ms']:.0f} ms; memory "
          f"{usual['all']:.0f} -> {peaks['all']:.0f} MiB; {after['rate']:.0f} queries/s after", flush=True)  # fmt: skip
    others = len(crowd) - int(np.isin(crowd.status_N, (200, 429, 503)).sum())
    work.judge(f"overload_other_answers_{proxy}", others, 0, at_most=True)
    work.judge(f"overload_p99_ms_{proxy}", during["p99_ms"], round(bound), at_most=True)
    work.judge(f"overload_memory_growth_{proxy}", peaks["all"] / usual["all"], 1.2, at_most=True)
    work.judge(f"overload_rate_after_{proxy}", after["rate"] / before["rate"], 0.9)
    return {"before": before, "during": during, "after": after, "offered": offered, "usual_mib": usual,
            "peak_mib": peaks}  # fmt: skip
