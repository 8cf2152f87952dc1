"""Retrieval quality on real questions, offline and through the served API.

    python -m tests.bench.quality

Corpus: the SQuAD and NQ passages and the first 15,000 Wikipedia passages; encoder all-MiniLM-L6-v2; exact index.
The same questions are then asked over HTTP in batches, and both are scored by the same code.
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from cluster.jobs import serving
from pipelines.config import Config, load_config
from pipelines.evaluate import read_questions, score_retrieval
from pipelines.schema import Hit, Passage
from tests.bench.common import keep, need_data, pinakes, write_wiki

TARGETS = {"squad": 0.922, "nq": 0.989}
KS = (1, 5, 20, 100)
_BATCH = 128


def main() -> None:
    data = need_data()
    with tempfile.TemporaryDirectory() as folder:
        passages = [str(data / name / "passages.tsv.gz") for name in TARGETS]
        wiki = write_wiki(Path(folder) / "wiki15k.tsv", 15_000)
        content = {
            "root": f"{folder}/root",
            "corpus": {"name": "bench", "part_size": 1024, "sources": [*passages, wiki]},
            "encoder": {"checkpoint": "sentence-transformers/all-MiniLM-L6-v2"},
            "index": {"name": "bench", "factory": "Flat", "num_shards": 2},
            "evaluate": {"k": list(KS)},
            "serve": {"port": 8765},
        }  # fmt: skip
        path = Path(folder) / "bench.yaml"
        path.write_text(yaml.safe_dump(content))
        job = pinakes("run", str(path))
        results: dict[str, Any] = {"encode": job["stages"]["encode"]}
        offline = {n: pinakes("evaluate", str(path), "--questions", questions_of(data, n)) for n in TARGETS}
        served = ask_all(load_config(str(path)), {n: questions_of(data, n) for n in TARGETS})
    worst = 0.0
    for name, target in TARGETS.items():
        results[name] = {
            "offline": metrics(offline[name]),
            "served": metrics(served[name]),
            "target_gold_top@20": target,
        }
        print(f"\n{name:<8}" + "".join(f"{m:>14}" for m in metrics(offline[name])))
        for kind, found in (("offline", offline[name]), ("served", served[name])):
            print(f"{kind:<8}" + "".join(f"{v:14.4f}" for v in metrics(found).values()))
        worst = max(worst, *(abs(metrics(offline[name])[m] - v) for m, v in metrics(served[name]).items()))
    reached = all(results[n]["offline"]["gold_top@20"] >= t for n, t in TARGETS.items()) and worst <= 0.003
    results["largest_difference"] = worst
    keep("quality", results)
    top20 = " ".join(f"{n}_top20 {results[n]['offline']['gold_top@20']:.4f}" for n in TARGETS)
    print(f"\n{top20} served_difference {worst:.5f} {'ok' if reached else 'miss'}")


def questions_of(data: Path, name: str) -> str:
    return str(data / name / "questions.jsonl.gz")


def metrics(result: dict[str, Any]) -> dict[str, float]:
    return {k: round(v, 5) for k, v in result.items() if k.startswith(("gold_top@", "answer_top@", "mrr", "ndcg"))}


def ask_all(config: Config, questions: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Serve the index and score every question set by what the API answers."""
    with serving(config) as address:
        return {name: score_served(address, url) for name, url in questions.items()}


def score_served(address: str, url: str) -> dict[str, Any]:
    asked = read_questions(url)
    hits: list[list[Hit]] = []
    for start in range(0, len(asked), _BATCH):
        body = json.dumps({"queries": [q.text for q in asked[start : start + _BATCH]], "k": max(KS)}).encode()
        request = urllib.request.Request(f"{address}/search", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            hits += [[to_hit(h) for h in found] for found in json.load(response)["results"]]
    return score_retrieval(asked, hits, ks=KS)


def to_hit(hit: dict[str, Any]) -> Hit:
    return Hit(hit["row"], hit["score"], Passage(hit["id"], hit["title"], hit["text"]))


if __name__ == "__main__":
    main()
