"""Serving under load: against the obvious alternative, while it switches, while parts of it die, and overloaded.

    python -m tests.bench.serve [--only load,switch,kill,overload,shards,fuzz] [--data FOLDER] [--seconds 60] [--quick]

load: callers against one FastAPI process with sentence-transformers and FAISS over the same index, and the bare loop.
switch: an alias moved between three encoders. kill: replicas killed. overload: ten times as many callers, who come
straight back when they are refused, then ten times as many questions a second. shards: the same answers from any number
of shards, and reranked. fuzz: 10,000 requests of every kind behind each proxy, and as many cases of schemathesis
(--schemathesis, where it is not on the PATH). The callers' process shares the cores with what it calls.

--data keeps what is built (a few minutes' encoding) for the next run. --quick: little data, short loads, nothing kept.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench.common import keep, need_data
from tests.bench.serve_data import Corpus
from tests.bench.serve_fuzz import fuzz
from tests.bench.serve_kill import kill
from tests.bench.serve_load import PROXIES, Result, Work, load
from tests.bench.serve_overload import overload
from tests.bench.serve_shards import shards
from tests.bench.serve_switch import switch

WIKI_ROWS, SECONDS = 5_000, 60.0
_QUICK_SECONDS, _QUICK_SWITCHES, _QUICK_QUESTIONS, _QUICK_REQUESTS = 6.0, 4, 200, 300
_QUIET_LOAD = 0.5  # processes, over the last minute: with more, somebody else takes part of the cores

SECTIONS: dict[str, Callable[[Work], Result]] = {
    "load": load, "switch": switch, "kill": kill, "overload": overload, "shards": shards, "fuzz": fuzz
}  # fmt: skip


def main() -> None:
    arguments = _arguments()
    sections = {**SECTIONS, "fuzz": partial(fuzz, program=arguments.schemathesis)}
    if arguments.quick:
        sections["switch"] = partial(switch, switches=_QUICK_SWITCHES)
        sections["shards"] = partial(shards, questions=_QUICK_QUESTIONS)
        sections["fuzz"] = partial(fuzz, requests=_QUICK_REQUESTS, program=arguments.schemathesis)
    chosen = [name for name in arguments.only.split(",") if name] or list(SECTIONS)
    held: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(Path(arguments.data or folder) / "data", 0 if arguments.quick else arguments.wiki)
        for name in chosen:
            held += _section(name, sections[name], corpus, Path(folder), arguments)
    missed = [line for line in held if line.endswith("miss")]
    for line in missed:
        print(line)
    print(f"serve: {len(held) - len(missed)} of {len(held)} figures held {'miss' if missed else 'ok'}")


def _section(
    name: str, section: Callable[[Work], Result], corpus: Corpus, folder: Path, arguments: argparse.Namespace
) -> list[str]:
    """Run one section, keep its results, and return what was judged."""
    load_before = os.getloadavg()[0]
    busy = "; OTHERS ARE AT WORK HERE, the figures mean little" if load_before > _QUIET_LOAD else ""
    print(f"{name}: {os.cpu_count()} cores, load {load_before:.2f}{busy}", flush=True)
    place = folder / name
    place.mkdir()
    seconds = arguments.seconds or (_QUICK_SECONDS if arguments.quick else SECONDS)
    work = Work(corpus, place, seconds, arguments.rounds, tuple(arguments.proxies.split(",")))
    result = section(work)
    facts = {"load_before": load_before, "seconds": seconds, "wiki_rows": corpus.wiki_rows, "judged": work.held}
    if not arguments.quick:
        keep("serve", {name: result | facts}, merge=True)
    return work.held


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="sections, separated by commas: " + ", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="little data, short loads, nothing kept")
    parser.add_argument("--data", help="a folder that keeps what is built (default: a temporary one)")
    parser.add_argument("--wiki", type=int, default=WIKI_ROWS, help="wiki passages beside SQuAD's and NQ's")
    parser.add_argument("--seconds", type=float, help=f"of each measured load (default {SECONDS:.0f})")
    parser.add_argument("--rounds", type=int, default=1, help="how often the servers of `load` are run in turn")
    parser.add_argument("--schemathesis", help="the program, where it is not on the PATH")
    parser.add_argument("--proxies", default=",".join(PROXIES), help="which of Serve's proxies (default both)")
    return parser.parse_args()


if __name__ == "__main__":
    need_data()
    main()
