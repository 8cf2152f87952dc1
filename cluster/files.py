"""The verbs from file to file, in this process: rerank, answer; PAQ's rank, extract, generate, filter, group.

Each reads lines, streams them through one model and puts the result in place whole. Spread over a cluster they will be
the same functions on parts; today one process runs them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cluster.progress import Progress
from pipelines import publish
from pipelines.answer import answers, load_reader
from pipelines.config import RerankConfig
from pipelines.errors import ConfigError
from pipelines.evaluate import AnswerTally, Tally
from pipelines.models.base import Reader
from pipelines.questions import batches, check_passage, checked, read_lines, write_lines
from pipelines.rerank import load_reranker, rerank_all
from pipelines.retrieved import Form, read_retrieved, write_retrieved
from pipelines.schema import Hit, Passage, Question

_BATCH = 16  # questions reranked or read together
_KS = (1, 5, 10, 20, 50, 100)

Retrieved = tuple[Question, list[Hit]]


def rerank(source: str, config: RerankConfig, out: str, form: Form, device: str, progress: Progress) -> dict[str, Any]:
    """Rerank a file of retrieved QA pairs or passages. Scores it where the questions carry answers."""
    reranker, depth = load_reranker(config, device), config.depth
    tally = Tally(_KS)

    def reordered() -> Iterator[Retrieved]:
        with progress.stage("rerank") as stage:
            for batch in batches(read_retrieved(source), _BATCH):
                found = rerank_all(reranker, [q.text for q, _ in batch], [hits for _, hits in batch], depth)
                for (question, _), hits in zip(batch, found, strict=True):
                    tally.add(question, hits[: max(_KS)])
                    yield question, hits
                stage.advance(len(batch), pairs=sum(min(depth, len(hits)) for hits in found))

    write_retrieved(out, reordered(), form=form)
    return {"out": out, **tally.results()}


def answer(
    source: str, reader: str, tokeniser: str | None, out: str, depth: int, device: str, progress: Progress
) -> dict[str, Any]:
    """Answer the questions of a file of retrieved QA pairs or passages; exact match where they carry answers."""
    model = load_reader(reader, "fp32", device, tokeniser=tokeniser)
    tally = AnswerTally()

    def read() -> Iterator[dict[str, Any]]:
        with progress.stage("answer") as stage:
            for batch in batches(read_retrieved(source), _BATCH):
                found = answers(model, [q.text for q, _ in batch], [hits for _, hits in batch], depth)
                for (question, hits), own in zip(batch, found, strict=True):
                    tally.add(question, [a.text for a in own[:1]])
                    yield _answered(question, hits, own)
                stage.advance(len(batch))

    count = write_lines(out, read())
    return {"out": out, "num_questions": count, **tally.results()}


def _answered(question: Question, hits: list[Hit], own: list[Any]) -> dict[str, Any]:
    told = [
        {"text": a.text, "score": a.score, "passage_id": hits[a.passage].passage.id if a.passage >= 0 else None}
        for a in own[:5]
    ]
    best = told[0]["text"] if told else None
    return {"id": question.id, "question": question.text, "answer": question.answers, "prediction": best, "read": told}


def rank(source: str, model: str, out: str, device: str, progress: Progress) -> dict[str, Any]:
    """Score passages by a ranker: a checkpoint, a TSV of id and score, or `dummy`."""
    from pipelines.models.cross_encoder import load_passage_ranker
    from pipelines.models.fetch import fetch
    from pipelines.questions.rank import DummyRanker, LookupRanker
    from pipelines.questions.rank import rank as ranked

    ranker: Any = DummyRanker() if model == "dummy" else None
    if ranker is None:
        is_table = model.endswith((".tsv", ".tsv.gz"))
        ranker = LookupRanker.read(model) if is_table else load_passage_ranker(fetch(model), "fp32", device)
    return _write("rank", out, ranked(read_lines(source), ranker), progress)


def extract(source: str, model: str, out: str, device: str, progress: Progress) -> dict[str, Any]:
    """Find answer spans by PAQ's extractor or a spaCy pipeline (a directory, or the name of an installed package)."""
    from pipelines.models import find_model, spacy_ner
    from pipelines.models.fetch import fetch
    from pipelines.questions.extract import extract as extracted

    extractor: Any
    if model.isidentifier() and not os.path.exists(model):
        extractor = spacy_ner.load(model)
    else:
        directory = fetch(model)
        extractor = find_model(directory, "answer-extractor").load(directory, "fp32", device)
    return _write("extract", out, extracted(read_lines(source), extractor), progress)


def generate(source: str, model: str, out: str, per_span: int, device: str, progress: Progress) -> dict[str, Any]:
    """Write questions about extracted spans."""
    from pipelines.models import find_model
    from pipelines.models.fetch import fetch
    from pipelines.questions.generate import generate as generated

    directory = fetch(model)
    family = find_model(directory, "question-generator")
    generator = family.load(directory, "fp32", device, num_questions=per_span)
    return _write("generate", out, generated(read_lines(source), generator), progress)


def filter_questions(
    source: str,
    out: str,
    reader: str | None,
    tokeniser: str | None,
    evidence: tuple[str | None, str | None, str | None],
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Mark generated questions consistent or not. evidence: (root, index name, passages file).

    A passages file alone is local filtering, an index global filtering; no reader marks everything consistent. Memory:
    for local filtering, the passages that the questions are about, and no others of the file.
    """
    from pipelines.questions.filter import filter_questions as filtered
    from pipelines.questions.filter import mark_all

    if reader is None:
        return _write("filter", out, mark_all(read_lines(source)), progress)
    model: Reader = load_reader(reader, "fp32", device, tokeniser=tokeniser)
    return _write("filter", out, filtered(read_lines(source), model, _evidence(source, *evidence)), progress)


def _evidence(source: str, root: str | None, name: str | None, passages: str | None) -> Callable[..., Any]:
    from pipelines.questions.filter import global_evidence, local_evidence
    from pipelines.retrieve import Retriever

    if (name is None) == (passages is None):
        expected = "--name INDEX (global: what retrieval finds) or --passages FILE (local: the question's own passage)"
        raise ConfigError("where the reader finds its evidence is not clear", expected=expected)
    if passages is not None:
        return local_evidence(_passages_of(source, passages).get)
    assert name is not None
    retriever = Retriever(root or "pinakes-data", publish.read_version(root or "pinakes-data", name))
    normalised = retriever.spec.query_family in ("paq", "paq_passages")  # PAQ's own encoders do it

    def search(queries: list[str], k: int) -> list[list[Hit]]:
        return retriever.search(queries, min(k, len(retriever.passages)))

    return global_evidence(search, normalise=not normalised)


def _passages_of(source: str, passages: str) -> dict[str, Passage]:
    """Return, by id, the passages that the generated questions of `source` are about; two passes, one over each."""
    from pipelines.questions.group import check_generated

    wanted = {str(line["passage_id"]) for line in checked(read_lines(source), check_generated)}
    known: dict[str, Passage] = {}
    for line in checked(read_lines(passages), check_passage):
        identity = str(line["passage_id"])
        if identity in wanted:
            known[identity] = Passage(identity, line.get("metadata", {}).get("title", ""), line["passage"])
    return known


def group(source: str, out: str, scores: str | None, progress: Progress) -> dict[str, Any]:
    """Put the pairs of the same question together. scores: the ranked passages, whose ps_score goes along."""
    from pipelines.questions.group import group as grouped
    from pipelines.questions.group import scores_of

    known = scores_of(read_lines(scores)) if scores else None
    return _write("group", out, grouped(read_lines(source), known), progress)


def _write(name: str, out: str, lines: Iterable[dict[str, Any]], progress: Progress) -> dict[str, Any]:
    started = time.monotonic()
    with progress.stage(name) as stage:

        def counted() -> Iterator[dict[str, Any]]:
            for line in lines:
                stage.advance()
                yield line

        count = write_lines(out, counted())
    return {"out": out, "num_lines": count, "seconds": round(time.monotonic() - started, 3)}
