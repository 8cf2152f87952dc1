"""Reorder hits by a model that reads query and passage together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipelines.models.base import CrossEncoder, ModelFamily
from pipelines.schema import Hit

if TYPE_CHECKING:
    from pipelines.config import RerankConfig

_PAIRS_AT_ONCE = 64  # between two looks at the clock


def load_reranker(config: RerankConfig, device: str = "cpu") -> CrossEncoder:
    """Fetch and load the cross-encoder or PAQ reranker of `config`. Raises CheckpointError, ConfigError."""
    from pipelines.encode import settle_compute

    family, directory, options = _find(config)
    model: CrossEncoder = family.load(directory, settle_compute(config.compute, device), device, **options)
    return model


def check_reranker(config: RerankConfig) -> None:
    """Raise what `load_reranker` would raise before it comes to the weights."""
    _find(config)


def _find(config: RerankConfig) -> tuple[ModelFamily, str, dict[str, Any]]:
    from pipelines.models import find_model, tokeniser_options
    from pipelines.models.fetch import fetch

    directory = fetch(config.checkpoint)
    family = find_model(directory, "cross-encoder")
    return family, directory, tokeniser_options(family, directory, config.tokeniser, "rerank.tokeniser")


def rerank(model: CrossEncoder, query: str, hits: Sequence[Hit], depth: int | None = None) -> list[Hit]:
    """Return the hits, the first `depth` of them with a `rerank_score` and reordered by it, best first.

    Equal scores keep the order of retrieval, and so do the hits behind `depth`.
    """
    return rerank_all(model, [query], [hits], depth)[0]


def rerank_all(
    model: CrossEncoder, queries: Sequence[str], hits_per_query: Sequence[Sequence[Hit]], depth: int | None = None
) -> list[list[Hit]]:
    """Rerank the hits of several queries; pairs of all queries are scored together."""
    found = rerank_within(model, queries, hits_per_query, depth, float("inf"))
    assert found is not None  # without a limit it always finishes
    return found


def rerank_within(
    model: CrossEncoder,
    queries: Sequence[str],
    hits_per_query: Sequence[Sequence[Hit]],
    depth: int | None,
    seconds: float,
) -> list[list[Hit]] | None:
    """Rerank as `rerank_all`, or return None once `seconds` are over: half-scored hits would be in no order at all."""
    heads = [list(hits[:depth]) for hits in hits_per_query]
    asked = [query for query, head in zip(queries, heads, strict=True) for _ in head]
    passages = [hit.passage for head in heads for hit in head]
    deadline = time.monotonic() + seconds
    scores: list[npt.NDArray[np.float32]] = []
    step = max(1, len(asked)) if seconds == float("inf") else _PAIRS_AT_ONCE
    for start in range(0, len(asked), step):
        if time.monotonic() > deadline:
            return None
        scores.append(model.score(asked[start : start + step], passages[start : start + step]))
    score_of = iter(np.concatenate(scores).tolist() if scores else [])
    return [
        _reordered(head, [next(score_of) for _ in head]) + list(hits[len(head) :])
        for head, hits in zip(heads, hits_per_query, strict=True)
    ]


def _reordered(hits: Sequence[Hit], scores: Sequence[float]) -> list[Hit]:
    order = sorted(range(len(hits)), key=lambda i: -scores[i])
    return [replace(hits[i], rerank_score=scores[i]) for i in order]
