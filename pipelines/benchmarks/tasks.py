"""Measure each kind of published figure in one plain loop: no cluster, fp32 throughout, exact search.

Memory is bounded by one block of passages and the hits of all questions. Definitions: DPR (Karpukhin et al. 2020) for
passages that hold an answer, PAQ (Lewis et al. 2021) for hits@k and exact match, the sentence-transformers evaluators
for MRR@10 and STS, trec_eval for nDCG@10.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from pipelines.benchmarks import files
from pipelines.benchmarks.measures import first_match_rates, mean_reciprocal_rank, ndcg, pattern_matches, spearman
from pipelines.benchmarks.run import (
    Run,
    load_reranker,
    resolve_encoder,
    retrieve,
    retrieved,
    score_pairs,
    search,
)
from pipelines.errors import InputError
from pipelines.evaluate import exact_match, score_retrieval
from pipelines.published import DATA
from pipelines.questions import batches
from pipelines.schema import Hit, Passage, Question

if TYPE_CHECKING:
    from pipelines.models.base import CrossEncoder

Scores = dict[str, tuple[float, int]]
"""Value (in per cent, unless it is a speed) and how many questions it was taken over, by metric."""

PAIR_DEPTH, PASSAGE_DEPTH, RANK_DEPTH = 50, 100, 10
_PAIRS_AT_ONCE = 1_024


# --- questions and answers ---------------------------------------------------------------------------------------


def _qa_retrieval(run: Run) -> Scores:
    questions = run.questions()
    hits = retrieve(run, questions, PAIR_DEPTH, pairs=True)
    found = score_retrieval(questions, hits, ks=(1, 10, 50))
    scores = {name: (100 * found[name], len(questions)) for name in ("em", "hits@1", "hits@10", "hits@50")}
    if "reranker" in run.inputs:
        model = load_reranker(run)
        right = [_first_is_right(model, *each) for each in zip(questions, hits, strict=True)]
        scores["em_reranked"] = 100 * float(np.mean(right)), len(questions)
    return scores


def _qa_rerank(run: Run) -> Scores:
    model = load_reranker(run)
    before: list[bool] = []
    after: list[bool] = []
    for question, found in retrieved(run, run.inputs["retrieved"], pairs=True):
        hits = found[:PAIR_DEPTH]
        before.append(bool(hits) and _is_right(question, hits[0]))
        after.append(_first_is_right(model, question, hits))
        run.progress("questions reranked", len(after))
    return {
        "em": (100 * float(np.mean(after)), len(after)),
        "em_retrieved": (100 * float(np.mean(before)), len(before)),
    }


def _first_is_right(model: CrossEncoder, question: Question, hits: Sequence[Hit]) -> bool:
    """Say whether the hit with the highest score, the first of equals, has an accepted answer."""
    if not hits:
        return False
    score_K = score_pairs(model, [question.text] * len(hits), [hit.passage for hit in hits])
    return _is_right(question, hits[int(np.argmax(score_K))])


def _is_right(question: Question, hit: Hit) -> bool:
    return bool(hit.passage.answers) and exact_match((hit.passage.answers or [""])[0], question.answers)


def _passage_retrieval(run: Run) -> Scores:
    if "results" in run.inputs:
        both = list(retrieved(run, run.inputs["results"], pairs=False))
        questions, hits = [question for question, _ in both], [found for _, found in both]
    else:
        questions = run.questions()
        hits = retrieve(run, questions, PASSAGE_DEPTH, pairs=False)
    ks = (1, 5, 20, 50, 100)
    if DATA[run.data].regex_answers:
        texts = [[hit.passage.text for hit in found] for found in hits]
        rates = first_match_rates(map(pattern_matches, texts, [question.answers for question in questions]), ks)
    else:
        found = score_retrieval(questions, hits, ks=ks)
        rates = [found.get(f"answer_top@{k}", 0.0) for k in ks]
    return {f"top@{k}": (100 * rate, len(questions)) for k, rate in zip(ks, rates, strict=True)}


# --- similarity and ranking --------------------------------------------------------------------------------------


def _sts(run: Run) -> Scores:
    from pipelines.encode import Encoder

    gold, firsts, seconds = files.read_sts(run.inputs["sts"], "test")
    gold = gold[: run.limit]
    encoder = Encoder(resolve_encoder(run), "query", run.device)
    left, right = (encoder.encode_queries(texts[: run.limit]).astype(np.float64) for texts in (firsts, seconds))
    norm = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    dot = np.einsum("nd,nd->n", left, right)
    cosine = np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0)  # no known word: a zero vector
    return {"spearman": (100 * spearman(np.asarray(gold), cosine), len(gold))}


def _msmarco_retrieval(run: Run) -> Scores:
    judged = files.read_qrels(run.inputs["qrels"])
    queries = _judged_queries(run, judged)
    passages = files.read_collection(run.inputs["collection"])
    hits = search(run, list(queries.values()), passages, RANK_DEPTH)
    ranked = {query: [hit.passage.id for hit in found] for query, found in zip(queries, hits, strict=True)}
    return {"mrr@10": (100 * mean_reciprocal_rank(ranked, judged, RANK_DEPTH), len(queries))}


def _judged_queries(run: Run, judged: files.Judgements) -> dict[str, str]:
    """Return the queries that have a relevant passage, at most `limit`."""
    url = run.inputs["queries"]
    known = files.read_queries(url)
    queries = dict(islice(((query, text) for query, text in known.items() if query in judged), run.limit))
    if not queries:
        expected = "queries and qrels of the same data set"
        raise InputError("no query has a relevant passage in the qrels", where=url, expected=expected)
    return queries


def _msmarco_rerank(run: Run) -> Scores:
    judged = files.read_qrels(run.inputs["qrels"])
    asked = _judged_queries(run, judged) if "queries" in run.inputs else None
    candidates = _texts_of(run, asked) if asked else _inline(run, judged)
    ranked, speed = _rank(run, candidates)
    if run.data == "dl19":  # graded, over the queries that have candidates, as trec_eval averages
        value, count = ndcg(ranked, judged, RANK_DEPTH), len(ranked)
        return {"ndcg@10": (100 * value, count), "docs_per_second": (speed, count)}
    queries = asked or (ranked if run.limit else judged)  # one without candidates scores 0
    value = mean_reciprocal_rank({query: ranked.get(query, []) for query in queries}, judged, RANK_DEPTH)
    return {"mrr@10": (100 * value, len(queries)), "docs_per_second": (speed, len(queries))}


def _rank(run: Run, candidates: Iterable[tuple[str, str, Passage]]) -> tuple[dict[str, list[str]], float]:
    """Return the ids of the ten best candidates by query id, best first, and the documents scored a second.

    candidates: (query id, query, passage) in any order. Equal scores are ordered by passage id, descending, as
    trec_eval orders them; a candidate that comes twice counts once.
    """
    model = load_reranker(run)
    best: dict[str, dict[str, float]] = {}
    seconds, count = 0.0, 0
    for chunk in batches(candidates, _PAIRS_AT_ONCE):
        started = time.perf_counter()
        score_N = score_pairs(model, [text for _, text, _ in chunk], [passage for _, _, passage in chunk])
        seconds += time.perf_counter() - started
        count += len(chunk)
        for (query, _, passage), score in zip(chunk, score_N.tolist(), strict=True):
            _keep(best.setdefault(query, {}), passage.id, score)
        run.progress("pairs scored", count)
    if not best:
        what = "no candidate belongs to a query that has a relevant passage in the qrels"
        raise InputError(what, where=run.inputs["top1000"], expected="candidates and qrels of the same data set")
    ranked = {query: sorted(found, key=lambda p: (found[p], p), reverse=True) for query, found in best.items()}
    return ranked, count / max(seconds, 1e-9)


def _keep(best: dict[str, float], passage: str, score: float) -> None:
    best[passage] = score
    if len(best) > RANK_DEPTH:
        del best[min(best, key=lambda p: (best[p], p))]


def _inline(run: Run, judged: files.Judgements) -> Iterator[tuple[str, str, Passage]]:
    """Yield the candidates of judged queries, the first `limit` of them, with the texts beside the ids."""
    seen: set[str] = set()
    for query, passage, query_text, text in files.read_candidates(run.inputs["top1000"]):
        is_new = query not in seen
        if query in judged and not (is_new and run.limit and len(seen) >= run.limit):
            seen.add(query)
            yield query, query_text, Passage(passage, "", text)


def _texts_of(run: Run, queries: Mapping[str, str]) -> Iterator[tuple[str, str, Passage]]:
    """Yield the candidates of `queries` with their passages from the collection, all in memory."""
    pairs = [pair for pair in files.read_candidate_ids(run.inputs["top1000"]) if pair[0] in queries]
    wanted = {passage for _, passage in pairs}
    passages = {p.id: p for p in files.read_collection(run.inputs["collection"]) if p.id in wanted}
    for query, passage in pairs:
        if passage not in passages:
            raise InputError(f"the candidate {passage!r} is not in the collection", where=run.inputs["collection"])
        yield query, queries[query], passages[passage]


TASKS: dict[str, Callable[[Run], Scores]] = {
    "qa-retrieval": _qa_retrieval,
    "qa-rerank": _qa_rerank,
    "passage-retrieval": _passage_retrieval,
    "sts": _sts,
    "msmarco-retrieval": _msmarco_retrieval,
    "msmarco-rerank": _msmarco_rerank,
}
