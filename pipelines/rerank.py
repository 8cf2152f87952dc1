"""Reorder hits by a model that reads query and passage together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipelines.models.base import CrossEncoder
from pipelines.schema import Hit


def rerank(model: CrossEncoder, query: str, hits: Sequence[Hit]) -> list[Hit]:
    """Return the hits with their `rerank_score`, best first; equal scores keep the order of retrieval."""
    if not hits:
        return []
    score_N = model.score([query] * len(hits), [hit.passage for hit in hits])
    scored = [replace(hit, rerank_score=float(score)) for hit, score in zip(hits, score_N, strict=True)]
    return sorted(scored, key=lambda hit: -(hit.rerank_score or 0.0))
