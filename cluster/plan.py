"""`plan --pilot` and `index.factory: auto`: try candidates on a sample of the corpus, forecast, choose, remember.

What a pilot found lies beside the embeddings under a name made of all that it depends on: timings never come out twice
the same, and a run that goes on must not choose another index than the one it began to build.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from cluster.encode import embedding_store
from cluster.index import held_out
from cluster.jobs import encoder_of
from cluster.pools import cluster_cpus, largest_node_cpus, run_task, run_tasks
from cluster.progress import Progress
from cluster.session import session
from pipelines import build, corpus, embeddings
from pipelines.build import BuildPlan
from pipelines.config import Config, IndexConfig
from pipelines.errors import ConfigError
from pipelines.evaluate import read_questions
from pipelines.index.candidates import Candidate, candidates, default_lists, shortlist
from pipelines.index.forecast import Forecast, Limits, Scale, choose, extrapolate
from pipelines.index.pilot import NEAR, Lists, Measured, Pilot, find_lists, measure, num_lists
from pipelines.index.spec import IndexSpec, parse_spec
from pipelines.index.tune import HeldOut
from pipelines.manifest import fingerprint, has_manifest, read_manifest
from pipelines.schema import FORMAT_VERSION
from pipelines.storage import Store

_ROWS_PER_LIST, _MOST_ROWS = 39, 131_072  # a sample grows so that lists get the rows they need, up to there
_DEFAULT_TARGET = 0.95

Untried = dict[str, list[str]]
"""The names of candidates that were not tried, by the reason."""


class PilotPlan(BuildPlan):
    """The plan that reads a corpus and finds its exact neighbours: of a Flat index that will never be built."""

    @property
    def store(self) -> Store:
        return self.vectors.child("plans")


def settle(
    config: Config, snapshot: dict[str, Any], embedded: dict[str, Any], progress: Progress
) -> tuple[IndexConfig, dict[str, Any] | None]:
    """Return the index config with `factory: auto` settled, and the forecast of what was chosen; else as it is.

    Raises QualityError when no index keeps the target within the limits.
    """
    index = config.index
    if index.factory != "auto":
        return index, None
    assert index.min_recall is not None
    limits = _limits(index.max_memory_gb, index.max_ms)
    found, untried = forecasts(config, snapshot, embedded, progress, index.min_recall, limits)
    best = choose(found, index.min_recall, limits)
    asked = {"min_recall": index.min_recall, "max_memory_gb": index.max_memory_gb, "max_ms": index.max_ms}
    progress.say(f"index.factory auto: {best.name}, of {len(found)} candidates tried on a sample")
    for why, names in untried.items():
        progress.say(f"not tried: {', '.join(names)}: {why}")
    settled = {"factory": best.factory, "refine": best.refine, "max_memory_gb": None, "max_ms": None}
    return index.model_copy(update=settled), {**best.as_dict(), "asked": asked, "untried": untried}


def plan_with_pilot(
    config: Config, min_recall: float | None, memory_bytes: int | None, max_ms: float | None, progress: Progress
) -> dict[str, Any]:
    """Return the forecasts of all candidates for a corpus that is encoded, and which one to choose.

    What is not given comes from the config, and a target of 0.95 without one. `chosen` is None and `refusal` an error
    when nothing keeps the target within the limits; `untried` names those left out, by the reason. Raises ConfigError
    when the corpus is not encoded yet.
    """
    from pipelines.errors import QualityError

    index = config.index
    target = min_recall or index.min_recall or _DEFAULT_TARGET
    limits = _limits(index.max_memory_gb, max_ms or index.max_ms)
    limits = replace(limits, memory_bytes=memory_bytes) if memory_bytes else limits
    with session(config.cluster):
        snapshot, embedded = _encoded(config)
        found, untried = forecasts(config, snapshot, embedded, progress, target, limits)
    told = {"num_rows": embedded["num_rows"], "dim": embedded["dim"], "target": target, "limits": str(limits)}
    listed = [{**f.as_dict(), "fits": f.keeps(limits)} for f in sorted(found, key=lambda f: (not f.reached, f.cost))]
    try:
        best, refusal = choose(found, target, limits), None
    except QualityError as error:
        best, refusal = None, error
    chosen = {"chosen": best and best.factory, "refine": best and best.refine}
    return {**told, "candidates": listed, **chosen, "untried": untried, "refusal": refusal}


def forecasts(
    config: Config,
    snapshot: dict[str, Any],
    embedded: dict[str, Any],
    progress: Progress,
    target: float,
    limits: Limits,
) -> tuple[list[Forecast], Untried]:
    """Return the forecasts of the candidates, and why which others were not tried.

    They are those of an earlier pilot on the very same, or of one made now. Of the limits, only the memory has a part
    in what is tried.
    """
    questions = config.evaluate.questions
    plan = _pilot_plan(config, snapshot, embedded)
    every = candidates(plan.num_rows, plan.dim, plan.metric, len(plan.shards))
    tried, why = shortlist(every, plan.num_rows, plan.dim, limits.memory_bytes, config.index.refine)
    name = f"plan-{_key(plan, questions, target, tried if tried != every else [])}.json"
    if not plan.store.exists(name):
        found, untried = _measured(plan, config.index, questions, target, progress, tried)
        untried = {why: [c.name for c in every if c not in tried], **untried}
        told = {"forecasts": [f.as_dict() for f in found], "untried": {why: n for why, n in untried.items() if n}}
        # Of two pilots at once, the first is what both go by.
        plan.store.create(name, (json.dumps(told, indent=1) + "\n").encode())
        plan.work.remove_all()
    stored = json.loads(plan.store.read(name))
    return [Forecast(**entry) for entry in stored["forecasts"]], stored.get("untried", {})


def _key(plan: BuildPlan, questions: str | None, target: float, tried: Sequence[Candidate]) -> str:
    """tried: the candidates, where they are not those that any corpus of this size and width has."""
    encoder, settings = plan.embeddings["encoder"], plan.config
    identity = [encoder["fingerprint"], encoder["query_fingerprint"], plan.embeddings["snapshot"]]
    shape = [plan.metric, len(plan.shards), settings.group_rows, settings.train_rows, settings.pilot_rows]
    asked = [q.text for q in read_questions(questions)] if questions else None
    wanted = [settings.seed, settings.recall_queries, asked, target, *([[c.name for c in tried]] if tried else [])]
    return fingerprint([FORMAT_VERSION, *identity, *shape, *wanted])


def _measured(
    plan: BuildPlan,
    config: IndexConfig,
    questions: str | None,
    target: float,
    progress: Progress,
    tried: Sequence[Candidate],
) -> tuple[list[Forecast], Untried]:
    """Try candidates on a sample; return their forecasts, and which were left out when it came to it."""
    with progress.stage("pilot", len(tried)) as stage:
        pilot, read_seconds = _make_pilot(plan, questions, target)
        able = [(c, s) for c in tried if (s := parse_spec(c.factory, plan.dim, plan.metric)).min_train_rows
                <= len(pilot.row_S)]  # fmt: skip
        threads = plan.num_threads
        wanted = sorted({num_lists(spec) for _, spec in able} - {0})
        lists = {n: run_task(find_lists, pilot.sample_SD, n, plan.metric, pilot.seed, threads, num_cpus=threads)
                 for n in wanted}  # fmt: skip
        stage.advance(len(tried) - len(able))
        told: dict[str, Forecast] = {}
        for some in (_plain(able), _rotated(able)):
            some = [(c, spec) for c, spec in some if not _is_needless(c, told)]
            # A node tries one candidate at a time: what it measures are seconds.
            for position, one in run_tasks(_measure_task, some, pilot, lists, threads, num_cpus=threads):
                candidate = some[position][0]
                told[candidate.name] = _forecast(one, candidate, plan, config, read_seconds)
                stage.advance()
    untried = {
        f"a sample of {len(pilot.row_S):,} rows is too small to train them": [
            c.name for c in tried if c not in [one for one, _ in able]
        ],
        "the same codes keep the target without a rotation": [c.name for c, _ in able if c.name not in told],
    }
    return [told[c.name] for c, _ in able if c.name in told], untried


Able = list[tuple[Candidate, IndexSpec]]
_ROTATION = "OPQ"


def _plain(able: Able) -> Able:
    return [(c, spec) for c, spec in able if not c.factory.startswith(_ROTATION)]


def _rotated(able: Able) -> Able:
    return [(c, spec) for c, spec in able if c.factory.startswith(_ROTATION)]


def _is_needless(candidate: Candidate, told: dict[str, Forecast]) -> bool:
    """Tell whether the same codes keep the target as they are: finding a rotation takes longer than all the rest."""
    front, _, plain = candidate.factory.partition(",")
    return front.startswith(_ROTATION) and plain in told and told[plain].reached


def _make_pilot(plan: BuildPlan, questions: str | None, target: float) -> tuple[Pilot, float]:
    """Return what candidates are tried on, and the seconds that reading the embeddings took one core.

    The queries are the half that a build tunes on: those that will verify the version have no part in choosing it.
    """
    asked, _ = held_out(plan, questions, NEAR).halves(plan.config.seed)
    near = np.unique(asked.exact_QK[asked.exact_QK >= 0])
    wanted = max(plan.config.pilot_rows, min(_MOST_ROWS, _ROWS_PER_LIST * default_lists(plan.num_rows)))
    sample, rows, near_ND, near, seconds = run_task(_gather_task, plan, near, min(wanted, plan.num_rows))
    few = HeldOut(asked.queries_QD, asked.exact_QK[:, : build.RECALL_K])
    fewest = min(len(shard.rows) for shard in plan.shards)
    return Pilot(sample, rows, near_ND, near, few, target, fewest, plan.config.seed), seconds


def _gather_task(plan: BuildPlan, near: Any, num_rows: int) -> tuple[Any, ...]:
    start = time.perf_counter()
    rng = np.random.default_rng([plan.config.seed, 3])
    unfit = plan.unfit_rows  # nothing is to be found there
    fit = np.setdiff1d(np.arange(plan.num_rows), unfit) if unfit else plan.num_rows
    rows = np.sort(rng.choice(fit, size=min(num_rows, plan.num_rows - len(unfit)), replace=False))
    near = np.setdiff1d(near, rows)
    every = np.union1d(rows, near)
    vectors = embeddings.take(plan.vectors, plan.embeddings["parts"], plan.dim, every)
    is_near = np.isin(every, near)
    shuffled = rng.permutation(len(rows))  # the first few are a sample, too
    return vectors[~is_near][shuffled], rows[shuffled], vectors[is_near], near, time.perf_counter() - start


def _measure_task(
    item: tuple[Candidate, IndexSpec], pilot: Pilot, lists: dict[int, Lists], num_threads: int
) -> Measured:
    candidate, spec = item
    return measure(candidate, spec, pilot, lists.get(num_lists(spec)), num_threads)


def _forecast(
    found: Measured, candidate: Candidate, plan: BuildPlan, config: IndexConfig, read_seconds: float
) -> Forecast:
    chosen = plan.config.model_copy(update={"factory": candidate.factory, "refine": candidate.refine})
    built = build.plan_build(plan.root, chosen, plan.snapshot, plan.embeddings, plan.num_threads)
    groups = [group for shard in built.shards for group in shard.groups]
    # A graph takes its rows in order, but on several cores.
    at_once = len(groups) if candidate.mergeable else max(len(groups), plan.num_threads)
    scale = Scale(
        num_rows=plan.num_rows,
        num_shards=len(built.shards),
        num_cores=max(1, min(int(cluster_cpus()), at_once)),
        train_rows=min(config.train_rows or built.spec.default_train_rows(plan.num_rows), plan.num_rows),
        read_seconds=read_seconds,
        num_readers=min(plan.num_threads, embeddings.MOST_READERS, len(plan.embeddings["parts"])),
    )
    return extrapolate(found, candidate, scale)


def _pilot_plan(config: Config, snapshot: dict[str, Any], embedded: dict[str, Any]) -> PilotPlan:
    flat = config.index.model_copy(update={"factory": "Flat", "refine": "none"})
    plan = build.plan_build(config.root, flat, snapshot, embedded, largest_node_cpus())
    plan = replace(plan, gpus=config.cluster.gpus_per_worker)
    return PilotPlan(**{field.name: getattr(plan, field.name) for field in fields(plan)})


def _limits(memory_gb: float | None, ms: float | None) -> Limits:
    return Limits(memory_gb * 1e9 if memory_gb else np.inf, ms or np.inf)


def _encoded(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifests of the snapshot and its embeddings. Raises ConfigError for one that is not there."""
    snapshot = corpus.find_snapshot(config.root, corpus.plan_ingest(config.corpus))
    store = embedding_store(config.root, snapshot["snapshot"], encoder_of(config)) if snapshot else None
    if snapshot is None or store is None or not has_manifest(store):
        raise ConfigError(
            f"a pilot tries indexes on embeddings, and the corpus {config.corpus.name!r} has none by this encoder",
            where=config.root,
            expected="a corpus that is encoded",
            hint="run `pinakes encode CONFIG` first, or plan without --pilot",
        )
    return snapshot, read_manifest(store, "embeddings")
