"""What every measurement is made with: its inputs, exact search over a corpus, a published index, and a reranker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipelines.benchmarks.files import read_corpus
from pipelines.errors import CheckpointError, InputError
from pipelines.evaluate import read_questions
from pipelines.questions import batches
from pipelines.schema import Hit, Passage, Question

if TYPE_CHECKING:
    from pipelines.encode import EncoderSpec
    from pipelines.models.base import CrossEncoder
    from pipelines.published import Row

Progress = Callable[[str, int], None]
"""Called with what is being done and how much of it has been done."""

BLOCK_ROWS = 4_096
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Run:
    """One measurement: a row, checked inputs, the data set they are, and how many questions to take at most."""

    row: Row
    inputs: Mapping[str, str]
    data: str
    limit: int | None
    device: str
    progress: Progress

    def questions(self) -> list[Question]:
        """Read the questions asked for. Raises InputError when one has no accepted answers."""
        url = self.inputs["questions"]
        questions = read_questions(url)[: self.limit]
        check_answers(questions, url)
        return questions


def check_answers(questions: Sequence[Question], url: str) -> None:
    lacking = next((question for question in questions if not question.answers), None)
    if lacking:
        what = f"the question {lacking.text[:80]!r} has no accepted answers"
        raise InputError(what, where=url, expected="accepted answers for every question")


def retrieve(run: Run, questions: Sequence[Question], k: int, *, pairs: bool) -> list[list[Hit]]:
    """Return the hits of each question, from an index of Pinakes or by exact search over the corpus."""
    texts = [question.text for question in questions]
    if "index" not in run.inputs:
        return search(run, texts, read_corpus(run.inputs["corpus"], pairs=pairs), k)
    from pipelines.retrieve import Retriever

    retriever = Retriever.open(run.inputs["root"], run.inputs["index"])
    _check_similarity(run, retriever.spec)
    hits: list[list[Hit]] = []
    for chunk in batches(texts, _QUERIES_AT_ONCE):
        hits += retriever.search(chunk, min(k, retriever.manifest["num_rows"]))
        run.progress("questions searched", len(hits))
    if pairs and any(hit.passage.answers is None for found in hits for hit in found):
        raise InputError("the index holds passages, not QA pairs", where=run.inputs["index"])
    return hits


def retrieved(run: Run, url: str, *, pairs: bool) -> Iterator[tuple[Question, list[Hit]]]:
    """Yield the questions and hits of a file of retrieval results, PAQ's (`pairs`) or DPR's.

    Raises InputError for questions without accepted answers and for hits of the other kind.
    """
    from pipelines.retrieved import read_retrieved

    for question, hits in islice(read_retrieved(url), run.limit):
        check_answers([question], url)
        if any((hit.passage.answers is not None) != pairs for hit in hits):
            found, expected = ("passages", "QA pairs") if pairs else ("QA pairs", "passages")
            raise InputError(f"{question.text[:80]!r} has {found} for hits", where=url, expected=expected)
        yield question, hits


def search(run: Run, queries: Sequence[str], passages: Iterable[Passage], k: int) -> list[list[Hit]]:
    """Return the k passages with the highest inner product for each query, ties by their order; read once."""
    from pipelines.encode import Encoder
    from pipelines.index.exact import exact_topk
    from pipelines.index.search import merge_topk

    spec = resolve_encoder(run)
    queries_BD = Encoder(spec, "query", run.device).encode_queries(queries)
    encoder = Encoder(spec, "passage", run.device)
    best = (np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64))
    kept: dict[int, Passage] = {}
    first = 0
    for block in batches(passages, BLOCK_ROWS):
        emb_ND = encoder.encode_passages([p.title for p in block], [p.text for p in block])
        rows_N = np.arange(first, first + len(block))
        best = merge_topk([best, exact_topk(queries_BD, [(emb_ND, rows_N)], k, "ip")], k)
        new = dict(zip(rows_N.tolist(), block, strict=True))
        kept = {row: new.get(row) or kept[row] for row in np.unique(best[1][best[1] >= 0]).tolist()}
        first += len(block)
        run.progress("passages encoded", first)
    return [
        [Hit(row, score, kept[row]) for score, row in zip(scores, rows, strict=True) if row >= 0]
        for scores, rows in zip(best[0].tolist(), best[1].tolist(), strict=True)
    ]


def resolve_encoder(run: Run) -> EncoderSpec:
    from pipelines.config import EncoderConfig
    from pipelines.encode import resolve

    config = EncoderConfig(
        checkpoint=run.inputs["checkpoint"],
        query_checkpoint=run.inputs.get("query_checkpoint"),
        compute="fp32",
        similarity=run.row.similarity,
        formatting=run.row.formatting,
    )
    spec = resolve(config, on_gpu=run.device.startswith("cuda"))
    _check_similarity(run, spec)
    return spec


def _check_similarity(run: Run, spec: EncoderSpec) -> None:
    if run.row.similarity not in (None, spec.similarity):
        what = f"the encoder is compared by {spec.similarity}"
        expected = f"{run.row.similarity}, as {run.row.name} was measured"
        raise CheckpointError(what, where=spec.checkpoint, expected=expected)


def load_reranker(run: Run) -> CrossEncoder:
    from pipelines import rerank
    from pipelines.config import RerankConfig

    return rerank.load_reranker(RerankConfig(checkpoint=run.inputs["reranker"], compute="fp32"), run.device)


def score_pairs(model: CrossEncoder, queries: list[str], passages: list[Passage]) -> npt.NDArray[np.float32]:
    score_N = model.score(queries, passages)
    if not np.isfinite(score_N).all():
        raise CheckpointError("the reranker gives scores that are not finite", hint="its weights may be damaged")
    return score_N
