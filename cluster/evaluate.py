"""`evaluate` on a cluster: search the questions in parallel batches, score them in one place."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cluster.pools import run_tasks
from cluster.progress import Progress
from pipelines import publish
from pipelines.config import EvaluateConfig
from pipelines.errors import ConfigError
from pipelines.evaluate import document_id, percentiles, read_questions, score_retrieval
from pipelines.retrieve import Retriever

_BATCH = 512
_LATENCY_QUERIES = 100


def evaluate(root: str, manifest: dict[str, Any], config: EvaluateConfig, progress: Progress) -> dict[str, Any]:
    """Score a version on `config.questions`, put the result beside it and return it."""
    if not config.questions:
        raise ConfigError(
            "there are no questions to evaluate on",
            expected="evaluate.questions: a JSONL or DPR qas file",
            hint="add it to the config, or pass --questions FILE",
        )
    questions = read_questions(config.questions)
    ks = sorted({min(k, manifest["num_rows"]) for k in config.k})
    batches = [[q.text for q in questions[i : i + _BATCH]] for i in range(0, len(questions), _BATCH)]
    found: dict[int, tuple[Any, Any]] = {}
    with progress.stage("evaluate", len(batches)) as stage:
        for position, (scores, rows) in run_tasks(_search_task, batches, root, manifest, max(*ks, 10)):
            found[position] = scores, rows
            stage.advance(questions=len(rows))
    retriever = Retriever(root, manifest)
    # Hits are fetched a batch at a time: 100 passages for each of many questions would fill the memory.
    hits = (h for i in range(len(batches)) for h in retriever.fetch(*found[i]))
    result = score_retrieval(questions, hits, ks=ks, id_of=document_id if config.positive_prefix else None)
    result["recall"] = manifest["recall"]
    result["latency"] = _latency(retriever, [q.text for q in questions[:_LATENCY_QUERIES]])
    result["version"], result["questions"] = manifest["version"], config.questions
    publish.save_evaluation(root, manifest, result)
    return result


def _latency(retriever: Retriever, queries: list[str]) -> dict[str, float]:
    """Return percentiles of one-query searches (encode, search, fetch; k = 10), in milliseconds."""
    k = min(10, retriever.manifest["num_rows"])
    retriever.search(queries[:1], k)
    seconds = [sum(retriever.search_timed([query], k)[1].values()) / 1000 for query in queries]
    return percentiles(seconds)


def _search_task(queries: list[str], root: str, manifest: dict[str, Any], k: int) -> tuple[Any, Any]:
    import json

    retriever = _retriever(root, json.dumps(manifest, sort_keys=True))
    return retriever.search_vectors(retriever.encoder.encode_queries(queries), min(k, manifest["num_rows"]))


@lru_cache(maxsize=1)
def _retriever(root: str, manifest: str) -> Retriever:
    import json

    return Retriever(root, json.loads(manifest), num_threads=1)
