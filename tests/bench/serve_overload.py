"""Section overload: ten times what the server can answer, from callers who wait for their answer and who do not."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.bench.serve_client import Answers, ask
from tests.bench.serve_data import MINILM
from tests.bench.serve_load import CLIENTS, K, Result, Work
from tests.bench.serve_server import Server, ours

_TIMES = 10
_ONGOING, _QUEUED = 32, 32
_PAUSE_SECONDS = 0.05  # a refused caller's, before it asks again, whatever Retry-After says
_CONNECTIONS = 3000  # of those who do not wait; HAProxy takes 4,096
_SHARE = 0.5  # of the usual rate that is answered all the same


def overload(work: Work) -> Result:
    """Ask in front of short queues, with each proxy.

    crowd: ten times as many callers, each with one question under way, come back at once after a refusal. flood: ten
    times the usual rate arrives, by as many connections as that takes. After both, as many callers as before.
    """
    work.corpus.build("bench", {"one": MINILM})
    return {proxy: _overloading(work, proxy) for proxy in work.proxies}


def _overloading(work: Work, proxy: str) -> Result:
    questions, seconds = work.corpus.questions, max(5.0, work.seconds / 3)
    limits = {"max_ongoing": _ONGOING, "max_queued": _QUEUED}
    with ours(work.corpus, work.folder, "one", proxy=proxy, **limits) as server:
        few = {"clients": CLIENTS, "k": K, "seconds": seconds, "warm_seconds": 3}
        before = ask(work.folder, server.address, questions, **few).summary()
        many = {
            "crowd": {"clients": _TIMES * CLIENTS, "pause_refused": _PAUSE_SECONDS},
            "flood": {"clients": _CONNECTIONS, "rate": _TIMES * before["rate"]},
        }
        result: Result = {"before": before}
        for kind, settings in many.items():
            asked = {"k": K, "seconds": seconds, **settings}
            result[kind] = _asking(work, server, f"{kind}_{proxy}", before["rate"], asked)
            after = ask(work.folder, server.address, questions, **few).summary()
            work.judge(f"{kind}_rate_after_{proxy}", after["rate"] / before["rate"], 0.9)
            result[kind]["after"] = after
    return result


def _asking(work: Work, server: Server, name: str, usual: float, settings: dict[str, Any]) -> Result:
    """Ask too much of a server and judge how it bears that. usual: the rate that it answers."""
    memory = server.memory_now()
    with server.memory() as peaks:
        answers = ask(work.folder, server.address, work.corpus.questions, **settings)
    found = answers.summary()
    offered = len(answers) / max(1e-9, float(np.ptp(answers.started_N)))
    bound = 1000 * 3 * (_ONGOING + _QUEUED) / usual  # thrice the time of everything ahead of a request
    print(f"  {name}: {offered:.0f} asked a second of a server that does {usual:.0f}: {found['rate']:.0f} answered, "
          f"{found['statuses']}, p99 of the answered {found['p99_ms']:.0f} ms; memory {memory['all']:.0f} -> "
          f"{peaks['all']:.0f} MiB; the callers took {found['caller_cores']:.2f} cores", flush=True)  # fmt: skip
    work.judge(f"{name}_other_answers", _others(answers), 0, at_most=True)
    work.judge(f"{name}_answered_share", found["rate"] / usual, _SHARE)
    work.judge(f"{name}_p99_ms", found["p99_ms"], round(bound), at_most=True)
    work.judge(f"{name}_memory_growth", peaks["all"] / memory["all"], 1.2, at_most=True)
    return {"during": found, "offered": offered, "usual_mib": memory, "peak_mib": peaks}


def _others(answers: Answers) -> int:
    """Count what is neither an answer nor a refusal that says in problem JSON when to come back."""
    return len(answers) - int(np.isin(answers.status_N, (200, 429, 503)).sum())
