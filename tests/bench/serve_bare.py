"""What no server can be faster than: encode and search in a plain loop, in batches and one question at a time.

A job of the serving benchmark:

    python -m tests.bench.serve_bare JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.retrieve import Retriever


def loop(retriever: Retriever, questions: list[str], batch: int, k: int, seconds: float) -> list[float]:
    """Encode and search batches for that long; return the seconds each took."""
    took: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = len(took) * batch % (len(questions) - batch)
        clock = time.perf_counter()
        retriever.search_vectors(retriever.encoder.encode_queries(questions[start : start + batch]), k)
        took.append(time.perf_counter() - clock)
    return took


def run(job: dict[str, Any]) -> dict[str, Any]:
    retriever = Retriever.open(job["root"], job["alias"])
    questions = json.loads(Path(job["questions"]).read_text())
    loop(retriever, questions, job["batch"], job["k"], job["seconds"] / 10)
    many = loop(retriever, questions, job["batch"], job["k"], job["seconds"])
    one = loop(retriever, questions, 1, job["k"], job["seconds"] / 3)
    return {"rate": len(many) * job["batch"] / sum(many), "one_p50_ms": float(np.median(one)) * 1000}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(run(job)))


if __name__ == "__main__":
    main()
