"""From what a pilot measured on a sample to what the whole corpus will take; and which index to choose.

The model, with N rows of the corpus, S of the sample, s shards, p cores that add:

    recall   as measured: the pilot's rows include those that lie nearest to the queries in the whole corpus, and lists
             are as many as the corpus will have, so neither grows easier with the sample. A graph's falls with the
             logarithm of the rows, by what two sizes of it show (see pipelines/index/pilot.py)
    search   scan, lists: straight in the rows, through two fills of the sample index. What does not depend on the rows
             (finding the lists, tables) is paid in each of s shards; lists grow as N over their number
             graph: s · log(N/s) / log(S), a walk's length being logarithmic in the rows
    train    lists: k-means takes iterations · rows · lists · width, and only the rows differ (at most 256 a list);
             codes and transforms: as measured, times the rows they look at (FAISS takes no more than 65,536)
             and reading the parts, which a sample of the whole corpus needs, on several cores
    add      N rows at the seconds of one core each (a graph's by the same logarithm), and reading them, over p cores
    bytes    see pipelines/index/candidates.py: what FAISS writes, counted
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.errors import QualityError
from pipelines.index.candidates import Candidate, named
from pipelines.index.pilot import Measured
from pipelines.sizes import human_bytes

_CODE_ROWS = 65_536  # that FAISS looks at to train codes: 256 for each of the 256 centroids of a piece
_ROWS_PER_LIST = 256  # that FAISS's k-means takes at most
FIGURES = ("recall", "ms", "memory_bytes", "index_bytes", "train_seconds", "add_seconds")
"""What is forecast of a version, and known once it is built. recall: of 1; ms: of one search, on one core."""


@dataclass(frozen=True)
class Scale:
    """What is to be built of the pilot's finding, and where.

    num_cores: how many work at adding; train_rows: what training is given; read_seconds: one core's, for reading all
    embedding parts; num_readers: how many cores read them for training.
    """

    num_rows: int
    num_shards: int
    num_cores: int
    train_rows: int
    read_seconds: float
    num_readers: int = 1


@dataclass(frozen=True)
class Forecast:
    """What one candidate is expected to take and give. reached: whether it keeps the target; params: at which setting.

    p95_ms: within which 95 of 100 single searches end, on one core.
    """

    factory: str
    search: str
    params: dict[str, int]
    reached: bool
    recall: float
    half_width: float
    ms: float
    p95_ms: float
    memory_bytes: int
    index_bytes: int
    train_seconds: float
    add_seconds: float
    refine: str = "none"

    @property
    def name(self) -> str:
        return named(self.factory, self.refine)

    @property
    def cost(self) -> float:
        """What a search occupies, in byte-milliseconds: the memory it needs for as long as it takes."""
        return self.memory_bytes * self.p95_ms

    def keeps(self, limits: Limits) -> bool:
        return self.memory_bytes <= limits.memory_bytes and self.p95_ms <= limits.ms

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """What a replica may take: bytes in memory, and the milliseconds within which 95 of 100 searches end."""

    memory_bytes: float = math.inf
    ms: float = math.inf

    def __str__(self) -> str:
        memory = [f"{human_bytes(self.memory_bytes)} in memory"] if self.memory_bytes < math.inf else []
        ms = [f"{self.ms:.3g} ms a search (95th percentile)"] if self.ms < math.inf else []
        return " and ".join(memory + ms)


def extrapolate(found: Measured, candidate: Candidate, scale: Scale) -> Forecast:
    """Return what `candidate` will take at `scale`, by the model above, from what the pilot measured of it."""
    ms = _ms(found, scale)
    lists = _share(scale.train_rows, found.train_rows, _ROWS_PER_LIST * found.num_lists) * found.list_seconds
    codes = _share(scale.train_rows, found.train_rows, _CODE_ROWS) * found.code_seconds
    trains = found.list_seconds + found.code_seconds > 0
    per_row = found.add_seconds * (_growth(found, scale) if found.search == "graph" else 1)
    return Forecast(
        factory=found.factory,
        search=found.search,
        params=found.params,
        reached=found.reached,
        recall=round(found.recall, 5),
        half_width=round(found.half_width, 5),
        ms=round(ms, 4),
        p95_ms=round(found.p95_ms * ms / found.ms, 4),
        memory_bytes=candidate.memory_bytes,
        index_bytes=candidate.file_bytes,
        train_seconds=round(lists + codes + (scale.read_seconds / scale.num_readers if trains else 0), 3),
        add_seconds=round((scale.num_rows * per_row + scale.read_seconds) / scale.num_cores, 3),
        refine=candidate.refine,
    )


def choose(found: Sequence[Forecast], target: float, limits: Limits) -> Forecast:
    """Return the index that keeps the target within the limits and occupies least (see `Forecast.cost`).

    Raises QualityError when there is none, naming the nearest that can be had: one that keeps the target and passes
    the limits by least, and the best of those that fit.
    """
    keep = [f for f in found if f.reached]
    fit = [f for f in found if f.keeps(limits)]
    both = [f for f in keep if f in fit]
    if both:
        return min(both, key=lambda f: (f.cost, f.name))
    within = f" within {limits}" if str(limits) else ""
    offers = []
    if keep:
        near = min(keep, key=lambda f: max(f.memory_bytes / limits.memory_bytes, f.p95_ms / limits.ms))
        offers.append(f"{near.name!r} keeps it with {human_bytes(near.memory_bytes)} and {near.p95_ms:.3g} ms")
    if fit:
        best = max(fit, key=lambda f: (f.recall, -f.cost))
        offers.append(f"{best.name!r} fits and reaches {best.recall:.3f}")
    raise QualityError(
        f"no index keeps recall@10 {target}{within}",
        where=f"{len(found)} candidates tried on a sample",
        expected=f"at least {target} (index.min_recall)",
        hint="; ".join(offers) + ": raise the limit, or lower the target",
    )


def compare(forecast: Mapping[str, Any], version: Mapping[str, Any], stages: Mapping[str, Any]) -> dict[str, Any]:
    """Return the forecast with what happened beside it: under `figures`, each as {forecast, actual, ratio}.

    version: the manifest of the finished build; stages: its stages' seconds, where `made` and `reused` tell whether
    this run did the work, which alone can be compared.
    """
    files = version["files"].items()
    on_disk = sum(file["num_bytes"] for name, file in files if name.startswith(("shard-", "vectors-")))
    seconds = {name: s["seconds"] for name, s in stages.items() if s.get("made") and not s.get("reused")}
    actual = {
        "recall": version["recall"]["value"],
        "ms": version["recall"].get("ms"),
        "index_bytes": on_disk,
        "memory_bytes": on_disk + forecast["memory_bytes"] - forecast["index_bytes"],
        "train_seconds": seconds.get("train") if forecast["train_seconds"] else None,
        "add_seconds": seconds.get("add"),
    }
    figures = {key: _compared(forecast[key], actual[key]) for key in FIGURES}
    return {**forecast, "figures": {key: told for key, told in figures.items() if told}}


def _compared(forecast: float, actual: float | None) -> dict[str, float] | None:
    if actual is None or not forecast:
        return None
    return {"forecast": forecast, "actual": actual, "ratio": round(actual / forecast, 4)}


def _ms(found: Measured, scale: Scale) -> float:
    (few, ms_few), (many, ms_many) = found.fills
    if found.search == "graph":
        return scale.num_shards * ms_many * _growth(found, scale)
    if many == scale.num_rows and scale.num_shards == 1:
        return ms_many
    slope = max(0.0, ms_many - ms_few) / (many - few)
    return scale.num_shards * max(0.0, ms_few - slope * few) + slope * scale.num_rows


def _growth(found: Measured, scale: Scale) -> float:
    """Return how many times as long a walk is in a shard as in the pilot's graph."""
    return math.log(max(2, scale.num_rows / scale.num_shards)) / math.log(max(2, found.fills[-1][0]))


def _share(rows: int, tried: int, most: int) -> float:
    return min(rows, most) / max(1, min(tried, most))
