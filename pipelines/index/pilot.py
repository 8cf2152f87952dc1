"""Try a candidate on a sample of the corpus: what recall it keeps, and what its parts cost.

A sample alone would flatter: codes confuse a row with those that lie nearly as near, and most of these are not in it.
So the rows that lie nearest to the queries in the whole corpus are added where recall is measured, and left out where
time is, since queries would find more rows near them than the corpus has. What a graph loses is another thing: its walk
goes astray, the oftener the larger the graph is, and two sizes of it show how much.

A sample also fits into a processor's caches, where the shard to come does not: searches are timed over copies of the
index that are together as large.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.index.build import add, clone_empty, train, train_front
from pipelines.index.candidates import Candidate, Search
from pipelines.index.exact import exact_topk
from pipelines.index.kmeans import coarse_of, in_front, preset
from pipelines.index.reach import probes_needed
from pipelines.index.search import search
from pipelines.index.spec import IndexSpec, Metric, new_index, parse_spec
from pipelines.index.structure import layers
from pipelines.index.tiers import TwoTier, codes_of
from pipelines.index.tune import HeldOut, Knob, Measure, Params, Trial, Tuned, knobs, refinement_knob, tune

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

NEAR = 100
"""How many of the rows nearest to a query join the sample: ten for each of the ten that recall counts."""
_FEW = 16  # the first fill is a 16th of the sample
_SINGLE = 100  # searches that are timed one by one
_BEYOND_CACHES = 256 << 20  # bytes that no processor keeps at hand
_MOST_COPIES = 64
# Queries that a copy is asked before another one is: more of them would find it in the cache, which the shard outgrows.
# They look at all of it, or walk through parts of it; of lists each looks at a few of its own.
_AT_ONCE: dict[Search, int | None] = {"scan": 1, "graph": 8, "lists": None}


@dataclass(frozen=True)
class Pilot:
    """What every candidate is tried on.

    sample_SD, row_S: a uniform random sample of the corpus and its rows. near_ND, row_N: the rows nearest to the
    queries in the whole corpus that are not in the sample. asked: queries, with the rows that exact search finds in the
    whole corpus. target: the recall wanted. num_rows: of the smallest shard to come, which bounds a graph's walk.
    """

    sample_SD: Array
    row_S: Rows
    near_ND: Array
    row_N: Rows
    asked: HeldOut
    target: float
    num_rows: int
    seed: int


@dataclass(frozen=True)
class Lists:
    """The centroids (C, D) of so many lists, found once for all candidates that have them; seconds: what it took."""

    centroid_CD: Array
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What a pilot measured of one candidate.

    list_seconds, code_seconds: training the lists and the rest, on train_rows rows; add_seconds: one core's for a row.
    fills: (rows in the index, milliseconds a search) twice, few and many. p95_ms: of single searches, on the second.
    """

    factory: str
    search: str
    params: Params
    recall: float
    half_width: float
    reached: bool
    num_lists: int
    train_rows: int
    list_seconds: float
    code_seconds: float
    add_seconds: float
    fills: tuple[tuple[int, float], tuple[int, float]]
    p95_ms: float

    @property
    def ms(self) -> float:
        return self.fills[-1][1]


def num_lists(spec: IndexSpec) -> int:
    """Return how many lists an index of `spec` has; 0 for one without."""
    found = coarse_of(new_index(spec))
    return found.num_lists if found else 0


def find_lists(sample_SD: Array, num: int, metric: Metric, seed: int, num_threads: int) -> Lists:
    """Cluster the sample (S, D) into `num` lists as FAISS's inverted file does."""
    import faiss

    start = time.perf_counter()
    index = train(parse_spec(f"IVF{num},Flat", sample_SD.shape[1], metric), sample_SD, seed, num_threads)
    centroids = faiss.downcast_index(layers(index)[-1].quantizer).reconstruct_n(0, num)
    return Lists(centroids, time.perf_counter() - start)


def measure(candidate: Candidate, spec: IndexSpec, pilot: Pilot, lists: Lists | None, num_threads: int) -> Measured:
    """Build `candidate` from the sample, tune it to the target, and time its parts.

    lists: those of `find_lists` for its number of lists, None where it has none. Searches are timed on one thread;
    training and the building of a graph take num_threads.
    """
    start = time.perf_counter()
    trained = _trained(spec, pilot, lists, num_threads)
    code_seconds = time.perf_counter() - start if spec.needs_training else 0.0
    if candidate.search == "graph":
        tuned, add_seconds, fills, p95_ms = _on_graph(trained, pilot, num_threads)
    else:
        tuned, add_seconds, fills, p95_ms = _on_codes(trained, pilot, candidate)
    return Measured(
        factory=candidate.factory,
        search=candidate.search,
        params=tuned.best.params,
        recall=tuned.best.recall,
        half_width=tuned.best.half_width,
        reached=tuned.reached,
        num_lists=len(lists.centroid_CD) if lists else 0,
        train_rows=len(pilot.row_S),
        list_seconds=lists.seconds * _narrower(spec) if lists else 0.0,
        code_seconds=code_seconds,
        add_seconds=add_seconds,
        fills=fills,
        p95_ms=p95_ms,
    )


_Found = tuple[Tuned, float, tuple[tuple[int, float], tuple[int, float]], float]


def _on_codes(trained: Any, pilot: Pilot, candidate: Candidate) -> _Found:
    """Tune on the sample with the near rows, then time two fills of the sample alone.

    Vectors that refine are in memory here, as those asked for often are when serving.
    """
    refines, at_once = candidate.refine == "exact", _AT_ONCE[candidate.search]
    pilot = _by_place(pilot) if refines else pilot
    with np.errstate(over="ignore"):  # such vectors find nothing, and no build takes them
        behind = np.concatenate([pilot.sample_SD, pilot.near_ND]).astype(np.float16) if refines else None

    def searched(index: Any) -> Any:
        return index if behind is None else TwoTier(index, behind[: index.ntotal], 0)

    dense = clone_empty(trained)
    add(dense, pilot.sample_SD, pilot.row_S)
    add(dense, pilot.near_ND, pilot.row_N)
    tuned = _tuned(searched(dense), pilot)
    del dense
    index, few = clone_empty(trained), max(1, len(pilot.row_S) // _FEW)
    add(index, pilot.sample_SD[:few], pilot.row_S[:few], num_threads=1)
    first = _ms(_copies(index, pilot, searched), pilot, tuned.best.params, at_once)
    start = time.perf_counter()
    add(index, pilot.sample_SD[few:], pilot.row_S[few:], num_threads=1)
    add_seconds = (time.perf_counter() - start) / max(1, len(pilot.row_S) - few)
    whole = _copies(index, pilot, searched)
    fills = (few, first), (len(pilot.row_S), _ms(whole, pilot, tuned.best.params, at_once))
    return tuned, add_seconds, fills, _p95_ms(whole, pilot, tuned.best.params)


def _narrower(spec: IndexSpec) -> float:
    """Return the share of the vectors' width that is left where they reach the lists: k-means takes as much time."""
    coarse = coarse_of(new_index(spec))
    return coarse.dim / spec.dim if coarse else 1.0


def _copies(index: Any, pilot: Pilot, searched: Callable[[Any], Any]) -> list[Any]:
    """Return what is searched of the index and of copies of it, together as large as the shard, or as any cache."""
    import faiss

    content = faiss.serialize_index(index)
    wanted = min(content.nbytes * pilot.num_rows / index.ntotal, _BEYOND_CACHES)
    num = min(math.ceil(wanted / content.nbytes), _MOST_COPIES)
    return [searched(index), *(searched(faiss.deserialize_index(content)) for _ in range(num - 1))]


def _by_place(pilot: Pilot) -> Pilot:
    """Return the pilot with places in (sample, near rows) for rows: a shard's vectors lie in the order of its rows."""
    every = np.concatenate([pilot.row_S, pilot.row_N])
    ascending = np.argsort(every)
    exact_QK = ascending[np.searchsorted(every, pilot.asked.exact_QK, sorter=ascending)]
    place = np.arange(len(every), dtype=np.int64)
    num = len(pilot.row_S)
    return replace(pilot, row_S=place[:num], row_N=place[num:], asked=HeldOut(pilot.asked.queries_QD, exact_QK))


def _on_graph(trained: Any, pilot: Pilot, num_threads: int) -> _Found:
    """Build graphs of the sample and of its quarter, each asked for its own nearest rows, and tune the larger.

    What a walk misses lies anywhere in the corpus, not near the query: the near rows would only shorten it. A row that
    is added walks as a query does: caches help both alike.
    """
    begin = time.perf_counter()
    index = _filled(trained, pilot, len(pilot.row_S), num_threads)
    add_seconds = (time.perf_counter() - begin) * num_threads / index.ntotal
    small = _filled(trained, pilot, max(1, len(pilot.row_S) // 4), num_threads)
    tuned = _tuned(index, _alone(pilot, index), (small, _alone(pilot, small)))
    copies = _copies(index, pilot, lambda one: one)
    ms = _ms(copies, pilot, tuned.best.params, _AT_ONCE["graph"])
    add_seconds *= max(1.0, ms / _ms(copies[:1], pilot, tuned.best.params))
    return tuned, add_seconds, ((small.ntotal, ms), (index.ntotal, ms)), _p95_ms(copies, pilot, tuned.best.params)


def _filled(trained: Any, pilot: Pilot, num_rows: int, num_threads: int) -> Any:
    index = clone_empty(trained)
    add(index, pilot.sample_SD[:num_rows], pilot.row_S[:num_rows], num_threads)
    return index


def _alone(pilot: Pilot, index: Any) -> Pilot:
    """Return the pilot as if the rows of `index`, the first of the sample, were the whole corpus."""
    import faiss

    metric: Metric = "ip" if faiss.is_similarity_metric(index.metric_type) else "l2"
    rows = [(pilot.sample_SD[: index.ntotal], pilot.row_S[: index.ntotal])]
    exact_QK = exact_topk(pilot.asked.queries_QD, rows, pilot.asked.k, metric)[1]
    return replace(pilot, asked=HeldOut(pilot.asked.queries_QD, exact_QK))


def _trained(spec: IndexSpec, pilot: Pilot, lists: Lists | None, num_threads: int) -> Any:
    """Train all but the lists, which are those found before, seen through the candidate's own transforms."""
    import faiss

    if lists is None:
        return train(spec, pilot.sample_SD, pilot.seed, num_threads)
    index = train_front(spec, pilot.sample_SD, pilot.seed, num_threads)
    centroids = in_front(index, lists.centroid_CD)
    coarse = coarse_of(index)
    if coarse and coarse.spherical:
        faiss.normalize_L2(centroids)  # a projection has shortened them
    preset(index, centroids)
    return train(spec, pilot.sample_SD, pilot.seed, num_threads, started=index)


def _tuned(index: Any, pilot: Pilot, smaller: tuple[Any, Pilot] | None = None) -> Tuned:
    """Tune to the target; with a smaller graph beside it, to the recall that is left when the graph has grown.

    The same walk loses recall with the logarithm of the rows: as much as from the smaller one, for each such step.
    """

    def tried(params: Params) -> Trial:
        trial = _trial(index, pilot, params)
        if smaller is None or not smaller[0].ntotal < index.ntotal < pilot.num_rows:
            return trial
        steps = math.log(pilot.num_rows / index.ntotal) / math.log(index.ntotal / smaller[0].ntotal)
        lost = max(0.0, _trial(*smaller, params).recall - trial.recall) * steps
        return replace(trial, recall=max(0.0, trial.recall - lost))

    tunable = knobs(codes_of(index), pilot.num_rows, pilot.asked.k)
    if isinstance(index, TwoTier):
        tunable = [refinement_knob(index.d, pilot.num_rows, pilot.asked.k), *tunable]
    if tunable := [knob for knob in tunable if knob.most > knob.least]:
        return tune(tunable, tried, pilot.target, _bound(index, pilot, tunable))
    only = tried({})
    return Tuned(only, only.recall >= pilot.target, (only,))


def _bound(index: Any, pilot: Pilot, tunable: Sequence[Knob]) -> Measure | None:
    """Return what tells the most that so many lists can find; None where they are not what is tuned last."""
    if tunable[-1].name != "nprobe":
        return None
    needed_QK = probes_needed(index, pilot.asked.queries_QD, pilot.asked.exact_QK)
    return None if needed_QK is None else pilot.asked.bound(needed_QK)


def _trial(index: Any, pilot: Pilot, params: Params) -> Trial:
    start = time.perf_counter()
    _, found_QK = search(index, pilot.asked.queries_QD, pilot.asked.k, params, num_threads=1)
    return pilot.asked.trial(params, found_QK, time.perf_counter() - start)


def _ms(copies: Sequence[Any], pilot: Pilot, params: Params, at_once: int | None = None) -> float:
    """Return the milliseconds a search takes, `at_once` queries (None: all, as verification asks) of a copy after
    another: the faster of two runs over all copies and queries.
    """
    queries_QD = pilot.asked.queries_QD
    batches = np.array_split(queries_QD, math.ceil(len(queries_QD) / (at_once or len(queries_QD))))
    num = max(len(copies), len(batches))
    turns = [(copies[turn % len(copies)], batches[turn % len(batches)]) for turn in range(num)]
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for index, batch_BD in turns:
            search(index, batch_BD, pilot.asked.k, params, num_threads=1)
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1000 / sum(len(batch_BD) for _, batch_BD in turns)


def _p95_ms(copies: Sequence[Any], pilot: Pilot, params: Params) -> float:
    taken = []
    for turn, query_D in enumerate(pilot.asked.queries_QD[:_SINGLE]):
        start = time.perf_counter()
        search(copies[turn % len(copies)], query_D[None], pilot.asked.k, params, num_threads=1)
        taken.append(time.perf_counter() - start)
    return float(np.percentile(taken, 95)) * 1000
