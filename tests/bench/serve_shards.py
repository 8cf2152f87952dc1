"""Section shards: any number of shards, in the gateway or spread, and reranking: what is served is what is computed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pipelines.config import RerankConfig
from pipelines.rerank import load_reranker, rerank
from pipelines.retrieve import Retriever
from pipelines.schema import Hit
from tests.bench.encode_models import write_cross_encoder
from tests.bench.serve_data import MINILM, model_directory
from tests.bench.serve_load import K, Result, Work
from tests.bench.serve_server import Server, ours

SHARDS, QUESTIONS = (1, 2, 4, 8), 1000
_ALIAS = "shards"
_BATCH = 100
_DEPTH = 20
_RERANKED = 10  # one question in so many
_CLOSE = 1e-6
_RERANK_CLOSE = 1e-4

Rows = list[list[tuple[int, float]]]
"""(row, score) of each hit of each question."""


def shards(work: Work, questions: int = QUESTIONS) -> Result:
    """Ask every version, placed both ways, the same questions; then rerank some over HTTP and here."""
    corpus = work.corpus
    names = {f"shards{number}": number for number in sorted(SHARDS, reverse=True)}  # the alias gets the unsharded one
    corpus.build(_ALIAS, dict.fromkeys(names, MINILM), **names)
    texts = json.loads(corpus.questions.read_text())[:questions]
    whole = Retriever.open(corpus.root, _ALIAS, corpus.versions["shards1"]["version"])
    found = whole.search(texts, max(K, _DEPTH))
    expected = [[(hit.row, hit.score) for hit in few[:K]] for few in found]
    versions = {number: corpus.versions[f"shards{number}"]["version"] for number in SHARDS}
    model = RerankConfig(checkpoint=write_cross_encoder(work.folder, model_directory()), depth=_DEPTH)
    results: Result = {"questions": len(texts)}
    for placement in ("together", "spread"):
        settings = {"placement": placement, "versions": list(versions.values()), "rerank": model.model_dump()}
        with ours(corpus, work.folder, "shards1", **settings) as server:
            for number, version in versions.items():
                answered = _answers(server, texts, version)
                results[f"{placement}_{number}"] = _differences(work, f"{placement}_{number}", answered, expected)
            if placement == "together":
                results["rerank"] = _reranked(work, server, texts[::_RERANKED], found[::_RERANKED], model)
    return results


def _answers(server: Server, texts: list[str], version: str) -> Rows:
    rows: Rows = []
    for start in range(0, len(texts), _BATCH):
        answer = server.call("/search", {"queries": texts[start : start + _BATCH], "k": K, "version": version})
        assert (answer["version"], answer["complete"]) == (version, True), "another version answered, or part of it"
        rows += [[(hit["row"], hit["score"]) for hit in hits] for hits in answer["results"]]
    return rows


def _differences(work: Work, name: str, answered: Rows, expected: Rows) -> dict[str, Any]:
    """Compare rank by rank. A tie turned around is no difference: other rows whose scores are equal up to rounding."""
    different, ties, largest = 0, 0, 0.0
    for ours_K, theirs_K in zip(answered, expected, strict=True):
        off = max(abs(a[1] - b[1]) for a, b in zip(ours_K, theirs_K, strict=True))
        same = [a[0] for a in ours_K] == [b[0] for b in theirs_K]
        largest = max(largest, off)
        different += off > _CLOSE
        ties += off <= _CLOSE and not same
    print(f"  {name}: {different} of {len(expected)} questions answered differently, {ties} ties turned around, scores "
          f"at most {largest:.1e} apart", flush=True)  # fmt: skip
    work.judge(f"shards_{name}_different", different, 0, at_most=True)
    return {"different": different, "ties": ties, "largest": largest}


def _reranked(work: Work, server: Server, texts: list[str], found: list[list[Hit]], config: RerankConfig) -> Result:
    """Rerank over HTTP and here, and compare ids and scores."""
    model = load_reranker(config)
    different, largest = 0, 0.0
    for text, hits in zip(texts, found, strict=True):
        expected = rerank(model, text, hits[:_DEPTH])[:K]
        answer = server.call("/search", {"query": text, "k": K, "rerank": True})
        assert answer["complete"], "the reranker was left out"
        scores = np.array([[hit["rerank_score"] for hit in answer["hits"]], [hit.rerank_score for hit in expected]])
        off = float(np.abs(scores[0] - scores[1]).max())
        largest = max(largest, off)
        different += off > _RERANK_CLOSE or [hit["row"] for hit in answer["hits"]] != [hit.row for hit in expected]
    print(f"  rerank: {different} of {len(texts)} differ, scores at most {largest:.1e} apart", flush=True)
    work.judge("rerank_different", different, 0, at_most=True)
    return {"different": different, "largest": largest, "questions": len(texts)}
