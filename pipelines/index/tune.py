"""Find the cheapest search parameters that keep a recall target, on one half of the queries; the other half verifies.

A search of more lists, a wider walk or a longer list of candidates never finds less, so few searches are enough, and
fewer still where it is known what a value can find at most (pipelines/index/edge.py, pipelines/index/reach.py). This
file sees what a search found, not what it searched: an index here, or shards on a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.evaluate import Z95, recall_at, recall_half_width
from pipelines.index.edge import enough, smallest
from pipelines.index.structure import layers
from pipelines.index.tiers import FACTOR

Rows = npt.NDArray[np.int64]
Params = dict[str, int]

_WIDEST_WALK = 4096  # a graph that misses its target there is better built anew with more links
_MOST_CANDIDATES = 256  # a refinement's, for each hit asked for
_FIRST_WALK = 16
_LINKS = 32  # of a graph's node, each the vector of another to look at
_RANDOM_READ = 4  # a candidate of a refinement is read from anywhere, which costs about as much as 4 read in order
# Two halves that differ by chance alone, by √2 standard errors, agree on the target 19 times in 20.
_MARGIN = NormalDist().inv_cdf(0.95) * math.sqrt(2) / Z95


@dataclass(frozen=True)
class Knob:
    """A search parameter of whole values `least` to `most`; unit_work: bytes that each unit makes a search touch."""

    name: str
    least: int
    most: int
    unit_work: float


@dataclass(frozen=True)
class Trial:
    """One setting and what it gave. recall, half_width (of 95 %): shares of 1; ms: milliseconds a query, one core."""

    params: Params
    recall: float
    half_width: float
    ms: float

    @property
    def cautious_recall(self) -> float:
        """The recall less the margin that makes other queries reach it as well, 19 times in 20."""
        return self.recall - _MARGIN * self.half_width


Measure = Callable[[Params], Trial]
Good = Callable[[Trial], bool]


@dataclass(frozen=True)
class Tuned:
    """The setting chosen. reached: whether it has the target; curve: all settings tried, the least work first."""

    best: Trial
    reached: bool
    curve: tuple[Trial, ...]

    def facts(self, num_queries: int) -> dict[str, Any]:
        """Return what a version's manifest says of its tuning, beside the recall that was then verified."""
        tried = [{"params": t.params, "recall": round(t.recall, 5), "ms": round(t.ms, 4)} for t in self.curve]
        tuning = {"value": round(self.best.recall, 5), "num_queries": num_queries, "reached": self.reached}
        return {"tuning": tuning, "curve": tried}


@dataclass(frozen=True)
class HeldOut:
    """Queries (Q, D) that are no stored vectors, and the rows (Q, k) that exact search finds for them, best first."""

    queries_QD: Any
    exact_QK: Rows

    def __len__(self) -> int:
        return len(self.queries_QD)

    @property
    def k(self) -> int:
        return int(self.exact_QK.shape[1])

    def halves(self, seed: int) -> tuple[HeldOut, HeldOut]:
        """Return (to tune on, to verify on), cut by chance. Raises InputError for fewer than two queries."""
        if len(self) < 2:
            raise InputError(f"cannot tune on {len(self)} queries", where="index.min_recall", expected="2 or more",
                             hint="give more questions, or set index.search_params")  # fmt: skip
        shuffled = np.random.default_rng([seed, 2]).permutation(len(self))
        one, other = (np.sort(half) for half in np.array_split(shuffled, 2))
        return HeldOut(self.queries_QD[one], self.exact_QK[one]), HeldOut(self.queries_QD[other], self.exact_QK[other])

    def trial(self, params: Mapping[str, int], found_QK: Rows, seconds: float) -> Trial:
        """Score what one setting found: rows (Q, >= k), best first, -1 for none; seconds: for all queries."""
        recall, width = recall_at(found_QK, self.exact_QK, self.k), recall_half_width(found_QK, self.exact_QK, self.k)
        return Trial(dict(params), recall, width, seconds * 1000 / len(self))

    def bound(self, needed_QK: Rows) -> Measure:
        """Return what tells the most that an nprobe finds. needed_QK: the one from which on each exact row is seen."""

        def at_most(params: Params) -> Trial:
            return self.trial(params, np.where(needed_QK <= params["nprobe"], self.exact_QK, -1), 0.0)

        return at_most


def knobs(index: Any, num_rows: int, k: int) -> list[Knob]:
    """Return what can be tuned on an index of this type (it may be empty), outermost layer first; often one, or none.

    num_rows: rows of the smallest shard; k: hits asked for. An inverted file can search all its lists; walks and
    candidates are bounded.
    """
    import faiss

    found = []
    for layer in layers(index):
        if isinstance(layer, faiss.IndexRefine):
            work = _RANDOM_READ * k * _code_bytes(layer.refine_index)
            found.append(Knob("k_factor", 1, max(1, min(_MOST_CANDIDATES, num_rows // k)), work))
        elif isinstance(layer, faiss.IndexIVF):
            found.append(Knob("nprobe", 1, layer.nlist, _code_bytes(layer) * num_rows / layer.nlist))
        elif isinstance(layer, faiss.IndexHNSW | faiss.IndexNSG):
            name = "efSearch" if isinstance(layer, faiss.IndexHNSW) else "search_L"
            most = max(k, min(_WIDEST_WALK, num_rows))
            found.append(Knob(name, min(most, max(k, _FIRST_WALK)), most, _LINKS * _code_bytes(layer.storage)))
    return [knob for knob in found if knob.most > knob.least]


def refinement_knob(dim: int, num_rows: int, k: int) -> Knob:
    """Return the knob of candidates that are scored again by their fp16 vectors (see pipelines/index/tiers.py)."""
    return Knob(FACTOR, 1, max(1, min(_MOST_CANDIDATES, num_rows // k)), _RANDOM_READ * k * 2 * dim)


def tune(tunable: Sequence[Knob], measure: Measure, target: float, bound: Measure | None = None) -> Tuned:
    """Return the cheapest setting tried whose recall keeps `target` with a margin for other queries.

    Where no setting has the margin, the widest shows what can be had at all: if that is the target or more, the
    cheapest that is as good as the widest is chosen; else nothing reaches the target. tunable: one knob, or a
    refinement's and the one below it; measure: searches with a setting, on the queries to tune on; bound: the most that
    the last knob's value lets a setting find, on the same queries, whatever its codes lose. Values that find no more
    than smaller ones are not tried: they would only meet more rows that are none of the exact.
    """
    if bound is not None:
        *outer, last = tunable
        tunable = [*outer, replace(last, most=enough(last, bound))]
    tried: dict[tuple[int, ...], Trial] = {}

    def at(params: Params) -> Trial:
        key = tuple(params[knob.name] for knob in tunable)
        if key not in tried:
            tried[key] = measure(params)
        return tried[key]

    def work(found: Trial) -> float:
        return sum(knob.unit_work * found.params[knob.name] for knob in tunable)

    def cheapest(good: Good) -> Trial | None:
        _explore(tunable, at, good, bound)
        return min((t for t in tried.values() if good(t)), key=work, default=None)

    best = cheapest(lambda t: t.cautious_recall >= target)
    if best is None:
        widest = at({knob.name: knob.most for knob in tunable})
        as_good = cheapest(lambda t: t.recall >= widest.recall) if widest.recall >= target else None
        best = as_good or widest
    return Tuned(best, best.recall >= target, tuple(sorted(tried.values(), key=work)))


def _code_bytes(index: Any) -> int:
    import faiss

    inner = faiss.downcast_index(index)
    return int(getattr(inner, "code_size", 4 * inner.d))


def _explore(tunable: Sequence[Knob], at: Measure, good: Good, bound: Measure | None) -> None:
    """Try settings until the edge between those that are good and those that are not is known."""
    *refinement, knob = tunable
    if bound is not None and not good(bound({knob.name: knob.most})):
        return
    if not refinement:
        smallest(knob, {}, at, good, bound)
        return
    # Fewer candidates to refine need at least as wide a search below: each step goes on where the last one ended.
    for candidates in _descending(refinement[0]):
        value = smallest(knob, {refinement[0].name: candidates}, at, good, bound)
        if value is None:
            return
        knob = replace(knob, least=value)


def _descending(knob: Knob) -> list[int]:
    """Return the largest value, then halves of it down to the least."""
    values = [knob.most]
    while values[-1] > knob.least:
        values.append(max(knob.least, values[-1] // 2))
    return values
