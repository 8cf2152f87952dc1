"""`evaluate` on a cluster: search the questions in parallel batches, rerank and read if asked, score in one place."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from cluster.pools import run_on_actors, run_tasks
from cluster.progress import Progress
from pipelines import publish
from pipelines.answer import answers, load_reader
from pipelines.config import AnswerConfig, Config, RerankConfig
from pipelines.errors import ConfigError
from pipelines.evaluate import document_id, percentiles, read_questions, score_answers, score_retrieval
from pipelines.manifest import fingerprint
from pipelines.rerank import load_reranker, rerank_all
from pipelines.retrieve import Passages, Retriever
from pipelines.schema import Hit, Question

_BATCH = 512
_READ_BATCH = 16  # questions of one rerank-and-read task
_LATENCY_QUERIES = 100

Found = list[tuple[Any, Any]]  # (score_BK, row_BK) of each batch of questions


def evaluate(root: str, manifest: dict[str, Any], config: Config, progress: Progress) -> dict[str, Any]:
    """Score a version on `config.evaluate.questions`, put the result beside it and return it.

    With `config.rerank` and `config.answer` the hits are reranked, then read, and every stage gets rows of its own.
    """
    settings = config.evaluate
    if not settings.questions:
        raise ConfigError(
            "there are no questions to evaluate on",
            expected="evaluate.questions: a JSONL or DPR qas file",
            hint="add it to the config, or pass --questions FILE",
        )
    questions = read_questions(settings.questions)
    ks = sorted({min(k, manifest["num_rows"]) for k in settings.k})
    depths = [stage.depth for stage in (config.rerank, config.answer) if stage]
    found = _search(root, manifest, questions, min(max(*ks, 10, *depths), manifest["num_rows"]), progress)
    retriever = Retriever(root, manifest)
    id_of = document_id if settings.positive_prefix else None
    # Hits are fetched a batch at a time: 100 passages for each of many questions would fill the memory.
    hits = (h for scores, rows in found for h in retriever.passages.hits(scores, rows))
    result = score_retrieval(questions, hits, ks=ks, id_of=id_of)
    result["recall"] = manifest["recall"]
    result["latency"] = latency(retriever, [q.text for q in questions])
    result["version"], result["questions"] = manifest["version"], settings.questions
    result["settings"] = settings_key(config, questions)
    if config.rerank or config.answer:
        read = _second_stage(root, manifest, questions, found, config, progress)
        if config.rerank:
            reranked = _in_order(retriever.passages, found, read.orders)
            scores = score_retrieval(questions, reranked, ks=ks, id_of=id_of)
            result["rerank"] = {**config.rerank.model_dump(), "seconds": read.seconds["rerank"], **scores}
        if config.answer:
            about = {"checkpoint": config.answer.reader, "depth": config.answer.depth, "seconds": read.seconds["read"]}
            result["reader"] = {**about, **score_answers(questions, read.answers)}
    publish.save_evaluation(root, manifest, result)
    return result


def _search(root: str, manifest: dict[str, Any], questions: list[Question], k: int, progress: Progress) -> Found:
    batches = [[q.text for q in questions[i : i + _BATCH]] for i in range(0, len(questions), _BATCH)]
    found: dict[int, tuple[Any, Any]] = {}
    with progress.stage("evaluate", len(batches)) as stage:
        for position, (scores, rows) in run_tasks(_search_task, batches, root, manifest, k):
            found[position] = scores, rows
            stage.advance(questions=len(rows))
    return [found[i] for i in range(len(batches))]


@dataclass(frozen=True)
class _Read:
    """What the stages behind retrieval gave: each question's rows in their new order, its answer (none, or the best),
    and the workers' seconds by stage."""

    orders: list[list[int]]
    answers: list[list[str]]
    seconds: dict[str, float]


def _second_stage(
    root: str, manifest: dict[str, Any], questions: list[Question], found: Found, config: Config, progress: Progress
) -> _Read:
    gpus = config.cluster.gpus_per_worker
    items = list(_read_batches(questions, found))
    parts: dict[int, _Read] = {}
    arguments = (root, manifest, config.rerank, config.answer, "cuda" if gpus else "cpu")
    with progress.stage("rerank" if config.rerank else "read", len(items)) as stage:
        for position, part in run_on_actors(_Stages, arguments, items, num_gpus=gpus):
            parts[position] = part
            stage.advance(questions=len(part.orders))
    ordered = [parts[i] for i in range(len(items))]
    return _Read(
        [order for part in ordered for order in part.orders],
        [given for part in ordered for given in part.answers],
        {name: round(sum(part.seconds[name] for part in ordered), 3) for name in ("rerank", "read")},
    )


def _read_batches(questions: list[Question], found: Found) -> Iterator[tuple[list[str], Any, Any]]:
    start = 0
    for scores, rows in found:
        for i in range(0, len(rows), _READ_BATCH):
            few = slice(i, i + _READ_BATCH)
            yield [q.text for q in questions[start + i : start + i + len(rows[few])]], scores[few], rows[few]
        start += len(rows)


class _Stages:
    """Hold the reranker and the reader, and run the hits of a few questions through them.

    They are loaded at the first work: what a constructor raises reaches the driver as the death of an actor only.
    """

    def __init__(
        self,
        root: str,
        manifest: dict[str, Any],
        reranking: RerankConfig | None,
        answering: AnswerConfig | None,
        device: str,
    ) -> None:
        self.root, self.manifest, self.device = root, manifest, device
        self.reranking, self.answering = reranking, answering

    @cached_property
    def passages(self) -> Passages:
        return Passages(self.root, self.manifest)

    @cached_property
    def reranker(self) -> Any:
        return load_reranker(self.reranking, self.device) if self.reranking else None

    @cached_property
    def reader(self) -> Any:
        chosen = self.answering
        return load_reader(chosen.reader, chosen.compute, self.device, tokeniser=chosen.tokeniser) if chosen else None

    def work(self, item: tuple[list[str], Any, Any]) -> _Read:
        """Return what came of (queries, score_BK, row_BK)."""
        queries, scores, rows = item
        hits = self.passages.hits(scores, rows)
        clock = [time.perf_counter()]
        if self.reranking:
            hits = rerank_all(self.reranker, queries, hits, self.reranking.depth)
        clock.append(time.perf_counter())
        read = answers(self.reader, queries, hits, self.answering.depth) if self.answering else [[] for _ in queries]
        clock.append(time.perf_counter())
        seconds = {"rerank": clock[1] - clock[0], "read": clock[2] - clock[1]}
        return _Read([[hit.row for hit in few] for few in hits], [[a.text for a in few[:1]] for few in read], seconds)


def _in_order(passages: Passages, found: Found, orders: list[list[int]]) -> Iterator[list[Hit]]:
    """Yield each question's hits in the order of rows given."""
    upcoming = iter(orders)
    for scores, rows in found:
        for hits in passages.hits(scores, rows):
            by_row = {hit.row: hit for hit in hits}
            yield [by_row[row] for row in next(upcoming)]


def settings_key(config: Config, questions: list[Question]) -> str:
    """Return a fingerprint of what an evaluation asks and how it scores: two with the same can be compared."""
    settings = config.evaluate.model_dump(exclude={"questions"})
    stages = [stage.model_dump() if stage else None for stage in (config.rerank, config.answer)]
    return fingerprint([settings, *stages, [asdict(question) for question in questions]])


def latency(retriever: Retriever, queries: list[str]) -> dict[str, float]:
    """Return percentiles of one-query searches (encode, search, fetch; k = 10) of the first 100, in milliseconds."""
    k = min(10, retriever.manifest["num_rows"])
    retriever.search(queries[:1], k)
    seconds = [sum(retriever.search_timed([q], k)[1].values()) / 1000 for q in queries[:_LATENCY_QUERIES]]
    return percentiles(seconds)


def _search_task(queries: list[str], root: str, manifest: dict[str, Any], k: int) -> tuple[Any, Any]:
    retriever = _retriever(root, json.dumps(manifest, sort_keys=True))
    return retriever.search_vectors(retriever.encoder.encode_queries(queries), k)


@lru_cache(maxsize=1)
def _retriever(root: str, manifest: str) -> Retriever:
    return Retriever(root, json.loads(manifest), num_threads=1)
