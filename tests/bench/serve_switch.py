"""Section switch: an alias moved forth and back between three encoders under load, without anybody noticing."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from tests.bench.common import pinakes
from tests.bench.serve_answers import Check, Wrong
from tests.bench.serve_client import Answers, Load
from tests.bench.serve_data import MINILM
from tests.bench.serve_load import CLIENTS, Result, Work
from tests.bench.serve_server import Server, ours

SWITCHES, K = 20, 5
_ALIAS, _HOME, _AWAY = "switch", "paq256", ("paq728", "minilm")
_STEADY_SECONDS = 3.0
_SHORTEST_SECONDS = 0.5  # of a switch's window: a quantile of fewer requests says nothing


def switch(work: Work, switches: int = SWITCHES) -> Result:
    """Promote one of the others and roll back, so many times; judge failures, mixed answers and latency."""
    corpus = work.corpus
    corpus.build(_ALIAS, {"paq728": corpus.paq(728), "minilm": MINILM, _HOME: corpus.paq(256)})
    results = {proxy: _switching(work, proxy, switches) for proxy in work.proxies}
    return {"switches": switches, **results}


def _switching(work: Work, proxy: str, switches: int) -> Result:
    corpus, moves = work.corpus, []
    key = pinakes("keys", "create", "bench", "--scope", "admin", "--root", corpus.root)["key"]
    headers = {"Authorization": f"Bearer {key}"}
    settings = {"clients": CLIENTS, "k": K, "seconds": 3600, "warm_seconds": 2, "keep": True}
    with ours(corpus, work.folder, _HOME, proxy=proxy, admin_routes=True) as server:
        with Load(work.folder, server.address, corpus.questions, **settings) as load:
            time.sleep(settings["warm_seconds"] + _STEADY_SECONDS)
            for number in range(switches):
                target = _AWAY[number % len(_AWAY)]
                moves.append(_move(server, headers, target, corpus.versions[target]["version"]))
                moves.append(_move(server, headers, _HOME))
            answers = load.finish()
        memory = server.memory_now()
    return _told(work, proxy, answers, moves) | {"rss_mib": memory}


def _move(server: Server, headers: dict[str, str], target: str, version: str | None = None) -> Result:
    """Promote the version, or roll back; wait until things are steady again; return when it happened."""
    began = time.time()
    verb, body = ("promote", {"alias": _ALIAS, "version": version}) if version else ("rollback", {"alias": _ALIAS})
    server.call(f"/admin/{verb}", body, headers)
    ended = time.time()
    time.sleep(max(0.0, _SHORTEST_SECONDS - (ended - began)) + _STEADY_SECONDS)
    return {"verb": verb, "to": target, "began": began, "ended": ended}


def _told(work: Work, proxy: str, answers: Answers, moves: list[Result]) -> Result:
    """Judge all answers of one run."""
    check = Check(work.corpus, [_HOME, *_AWAY])
    wrong, seen = check.run(answers.good())
    ratios = {verb: _latency(answers, [m for m in moves if verb in ("all", m["verb"])])
              for verb in ("all", "promote", "rollback")}  # fmt: skip
    seconds = {verb: [m["ended"] - m["began"] for m in moves if m["verb"] == verb] for verb in ("promote", "rollback")}
    took = ", ".join(f"{verb} {np.median(s):.2f} s (at most {max(s):.2f})" for verb, s in seconds.items())
    print(f"  {proxy}: {len(moves)} moves, {took}; {len(answers)} requests, answered by {seen}", flush=True)
    for verb, found in ratios.items():
        print(f"    p99 {verb}: before {found['before_ms']:.0f} ms, during {found['during_ms']:.0f} ms, "
              f"single moves at most {found['worst']:.2f} times")  # fmt: skip
    work.judge(f"switch_failed_{proxy}", answers.failed, 0, at_most=True)
    work.judge(f"switch_mixed_{proxy}", len(wrong), 0, at_most=True)
    work.judge(f"switch_p99_ratio_{proxy}", ratios["all"]["ratio"], 2.0, at_most=True)
    _show(wrong)
    return {"latency": ratios, "seconds": seconds, "requests": len(answers), "answered_by": seen,
            "statuses": answers.statuses(), "mixed": len(wrong), "check": check.facts}  # fmt: skip


def _latency(answers: Answers, moves: list[Result]) -> dict[str, Any]:
    """Compare the latency of the requests sent during the moves with those sent just before them."""
    before = [answers.sent_within(m["began"] - _STEADY_SECONDS, m["began"]) for m in moves]
    during = [answers.sent_within(m["began"], max(m["ended"], m["began"] + _SHORTEST_SECONDS)) for m in moves]
    single = [d.milliseconds(99) / b.milliseconds(99) for b, d in zip(before, during, strict=True) if len(d)]
    old, new = (Answers.joined(parts).milliseconds(99) for parts in (before, during))
    return {"before_ms": old, "during_ms": new, "ratio": new / old, "worst": max(single), "single": single}


def _show(wrong: list[Wrong]) -> None:
    for answer in wrong[:5]:
        print(f"    mixed: {json.dumps(answer)[:300]}")
