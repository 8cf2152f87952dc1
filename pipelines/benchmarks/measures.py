"""The measures that published figures use and `evaluate` does not: small, exact, over ids and arrays."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError


def spearman(left_N: npt.NDArray[Any], right_N: npt.NDArray[Any]) -> float:
    """Return Spearman's rank correlation: Pearson's of the ranks, equal values sharing their average rank.

    Raises InputError for fewer than two pairs, or when all values of one side are equal: then it is undefined.
    """
    ranks = [average_ranks(np.asarray(values, np.float64)) for values in (left_N, right_N)]
    if len(ranks[0]) < 2 or any(float(np.ptp(rank)) == 0 for rank in ranks):
        raise InputError("the rank correlation is undefined", expected="two pairs or more, with different values")
    left, right = (rank - rank.mean() for rank in ranks)
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def average_ranks(values_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return (N,) ranks from 1, ascending; equal values share the mean of the ranks they take up."""
    _, group_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: npt.NDArray[np.float64] = last - (counts - 1) / 2
    return means[group_N.reshape(-1)]


def mean_reciprocal_rank(
    ranked: Mapping[str, Sequence[str]], judged: Mapping[str, Mapping[str, int]], depth: int
) -> float:
    """Return the mean over all queries of 1 / rank of the first relevant passage, 0 when none is within `depth`.

    ranked: passage ids by query id, best first. judged: relevant passage ids by query id.
    """
    reciprocal = [
        next((1 / rank for rank, passage in enumerate(found[:depth], start=1) if passage in judged.get(query, {})), 0.0)
        for query, found in ranked.items()
    ]
    return float(np.mean(reciprocal))


def ndcg(ranked: Mapping[str, Sequence[str]], judged: Mapping[str, Mapping[str, int]], depth: int) -> float:
    """Return trec_eval's nDCG at `depth`, a mean over the queries of `ranked`; gains are the grades as they are."""
    import ir_measures
    from ir_measures import nDCG

    # Scores made of ranks: the order is decided already.
    run = {query: {passage: -float(rank) for rank, passage in enumerate(found)} for query, found in ranked.items()}
    judgements = {query: dict(judged[query]) for query in ranked}
    measure = nDCG @ depth
    return float(ir_measures.pytrec_eval.calc_aggregate([measure], judgements, run)[measure])


def first_match_rates(matches_per_question: Iterable[Iterable[bool]], ks: Sequence[int]) -> list[float]:
    """Return, for each k, the share of questions with a match among their first k passages."""
    first = [
        next((rank for rank, match in enumerate(matches, start=1) if match), np.inf) for matches in matches_per_question
    ]
    return [float(np.mean([rank <= k for rank in first])) for k in ks]


def pattern_matches(texts: Sequence[str], patterns: Sequence[str]) -> Iterable[bool]:
    """Say of each text whether any of the regular expressions is found in it (DPR's match for CuratedTREC).

    Text and pattern are in Unicode NFD; case does not matter; an invalid pattern is found nowhere.
    """
    compiled = [pattern for pattern in map(_compile, patterns) if pattern is not None]
    for text in texts:
        normal = unicodedata.normalize("NFD", text)
        yield any(pattern.search(normal) for pattern in compiled)


@lru_cache(maxsize=1 << 12)
def _compile(pattern: str) -> Any:
    import warnings

    import regex

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `regex` warns of sets that will mean something else one day
            flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
            return regex.compile(unicodedata.normalize("NFD", pattern), flags)
    except regex.error:
        return None
