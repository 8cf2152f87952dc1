"""`index` on a cluster: train once, add groups in parallel, merge shards, write passages, tune, verify, publish."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from cluster.pools import largest_node_cpus, products, run_task, run_tasks
from cluster.progress import Progress
from cluster.train import train_on_cluster
from pipelines import build, publish, recall, twins
from pipelines.build import BuildPlan, Rows, ShardPlan
from pipelines.config import IndexConfig
from pipelines.index.balance import balance, list_sizes
from pipelines.index.forecast import compare
from pipelines.index.reach import probes_needed
from pipelines.index.search import merge_topk, search
from pipelines.index.tune import HeldOut, Measure, Params, Trial, tune
from pipelines.manifest import Receipt, find_finished
from pipelines.retrieve import LocalShard, search_without
from pipelines.vectors import write_vectors

# Searches that one setting is tried with, over all shards, and the fewest queries of one. Both are of the data alone:
# how queries are batched may decide the last bits of a score, so no number of workers has a part in it.
_SEARCHES, _FEWEST_QUERIES = 16, 50
_QUICK_WRITE_SECONDS = 5.0  # what is written into a version's own folder, not moved there, is small and soon in place


def build_version(
    root: str,
    config: IndexConfig,
    snapshot: dict[str, Any],
    embedded: dict[str, Any],
    progress: Progress,
    questions: str | None = None,
    forecast: dict[str, Any] | None = None,
    gpus: float = 0,
) -> dict[str, Any]:
    """Build and publish the index of `embedded`; a version that exists already is returned at once.

    questions: URL of the questions that recall is measured on; without it, sentences sampled from the passages.
    forecast: what a pilot expects of it, to be compared with what happens. gpus: see BuildPlan.
    Raises QualityError when its recall, measured now or when it was published, misses the target.
    """
    plan = build.plan_build(root, config, snapshot, embedded, largest_node_cpus())
    plan = replace(plan, forecast=forecast, gpus=gpus)
    if published := find_finished(plan.store, "version", plan.work):
        plan.store.sweep_temporaries(_QUICK_WRITE_SECONDS)
        publish.check_recall(plan, published)
        with progress.stage("index", len(plan.shards)) as stage:
            stage.advance(len(plan.shards), reused=True, rows=plan.num_rows)
        return published
    try:
        return _build(plan, progress, questions)
    except Exception:
        # Another driver may have published this very version, and cleared its work folder, under our hands.
        if published := find_finished(plan.store, "version", plan.work):
            publish.check_recall(plan, published)
            return published
        raise


def _build(plan: BuildPlan, progress: Progress, questions: str | None) -> dict[str, Any]:
    twins.adopt(plan)
    trained = train_on_cluster(plan, progress)
    shards = _build_shards(plan, trained, progress)
    passages: list[Receipt] = []
    with progress.stage("passages", len(plan.shards)) as stage:
        for _, receipts in sorted(run_tasks(_passages_task, plan.shards, plan)):
            passages += receipts
            stage.advance(reused=all(r.reused for r in receipts), rows=receipts[0].facts["num_rows"])
    files = [trained, *shards, *passages, *_write_vectors(plan, progress)]
    content = publish.version_content(plan, files, None, {n: s["seconds"] for n, s in progress.stages.items()})
    content["build"] = plan.build
    if plan.order:
        content["order"] = plan.order
    _measure_recall(plan, content, progress, questions)
    content["lists"] = _measure_balance(plan, content)
    if plan.forecast:
        content["forecast"] = compare(plan.forecast, content, progress.stages)
    with progress.stage("publish", 1) as stage:
        manifest = publish.publish(plan, content)
        plan.store.sweep_temporaries(_QUICK_WRITE_SECONDS)
        stage.advance()
    return manifest


def _build_shards(plan: BuildPlan, trained: Receipt, progress: Progress) -> list[Receipt]:
    found = dict(run_tasks(_find_shard_task, plan.shards, plan, trained))
    done: dict[int, Receipt] = {number: receipt for number, receipt in found.items() if receipt is not None}
    missing = [shard for shard in plan.shards if shard.number not in done]
    groups: dict[int, dict[int, Receipt]] = {shard.number: {} for shard in missing}
    items = [(shard, group) for shard in missing for group in range(len(shard.groups))]
    # A graph takes its rows in order, so its shard is one task: few of them share the cores of a node by threads.
    threads = 1 if plan.spec.mergeable else max(1, plan.num_threads // max(1, len(missing)))
    with progress.stage("add", sum(len(s.groups) for s in plan.shards)) as stage:
        for number in done:
            stage.advance(len(plan.shards[number].groups), reused=True, rows=len(plan.shards[number].rows))
        for position, receipt in run_tasks(_add_task, items, plan, trained, threads, num_cpus=threads):
            shard, group = items[position]
            groups[shard.number][group] = receipt
            stage.advance(reused=receipt.reused, rows=len(shard.groups[group]))
    with progress.stage("merge", len(plan.shards)) as stage:
        stage.advance(len(done), reused=True)
        work = [(shard, [groups[shard.number][g] for g in range(len(shard.groups))]) for shard in missing]
        for position, receipt in run_tasks(_merge_task, work, plan, trained):
            done[work[position][0].number] = receipt
            stage.advance(reused=receipt.reused)
    return [done[shard.number] for shard in plan.shards]


def _write_vectors(plan: BuildPlan, progress: Progress) -> list[Receipt]:
    """Write what candidates are refined with, where the config asks for it."""
    if plan.config.refine == "none":
        return []
    done = {}
    with progress.stage("vectors", len(plan.shards)) as stage:
        for position, receipt in run_tasks(_vectors_task, plan.shards, plan):
            done[position] = receipt
            stage.advance(reused=receipt.reused, rows=receipt.facts["num_rows"])
    return [done[position] for position in sorted(done)]


def _measure_recall(plan: BuildPlan, content: dict[str, Any], progress: Progress, questions: str | None) -> None:
    """Tune the search parameters, where there are any to tune, and measure recall@k; both go into `content`."""
    unseen, facts = None, {}
    if plan.tunable:
        with progress.stage("tune") as stage:
            tune_on, unseen = held_out(plan, questions).halves(plan.config.seed)

            def measure(params: Params) -> Trial:
                stage.advance()
                return _try(plan, content, tune_on, params, _num_pieces(plan, tune_on))

            bound = _bound(plan, content, tune_on)
            tuned = tune(plan.tunable, measure, plan.config.min_recall or 0.0, bound)
            content["search_params"], facts = tuned.best.params, tuned.facts(len(tune_on))
    with progress.stage("verify", 1) as stage:
        unseen = unseen or held_out(plan, questions)
        found = _try(plan, content, unseen, content["search_params"])
        stage.advance()
    content["recall"] = {
        "k": unseen.k,
        "value": round(found.recall, 5),
        "ci95": round(found.half_width, 5),
        "num_queries": len(unseen),
        "ms": round(found.ms, 4),
        "target": plan.config.min_recall,
        "queries": "questions" if questions else "sampled sentences",
        **facts,
    }


def _measure_balance(plan: BuildPlan, content: dict[str, Any]) -> dict[str, Any] | None:
    """Return how evenly the rows are spread over the lists, all shards together; None where there are no lists."""
    numbers, manifest = range(len(plan.shards)), _searchable(content)
    sizes = [found for _, found in run_tasks(_list_sizes_task, numbers, plan.root, manifest)]
    return None if sizes[0] is None else balance(np.sum(sizes, axis=0))


def held_out(plan: BuildPlan, questions: str | None, k: int = build.RECALL_K) -> HeldOut:
    """Return queries that are not stored vectors, with the k rows that exact search finds for them."""
    queries_QD, k = run_task(_queries_task, plan, questions), min(k, plan.num_rows - len(plan.unfit_rows))
    groups = build.row_groups(plan)
    with products(len(groups), plan.gpus) as (run, on_gpu):
        exact = [found for _, found in run(_exact_task, groups, plan, queries_QD, k, on_gpu)]
    return HeldOut(queries_QD, merge_topk(exact, k)[1])


def _bound(plan: BuildPlan, content: dict[str, Any], asked: HeldOut) -> Measure | None:
    """Return what tells the most that so many lists can find, None where the shards' type does not tell it."""
    if plan.tunable[-1].name != "nprobe":
        return None
    numbers, manifest = range(len(plan.shards)), _searchable(content)
    needed = [found for _, found in run_tasks(_probes_task, numbers, plan.root, manifest, asked)]
    return None if needed[0] is None else asked.bound(np.min(needed, axis=0))


def _num_pieces(plan: BuildPlan, asked: HeldOut) -> int:
    """Return into how many pieces the queries are cut, so that few shards keep all cores at work, too."""
    return max(1, min(_SEARCHES // len(plan.shards), len(asked) // _FEWEST_QUERIES))


def _try(plan: BuildPlan, content: dict[str, Any], asked: HeldOut, params: Params, num_pieces: int = 1) -> Trial:
    """Search all shards with one setting, as serving would."""
    manifest, pieces = _searchable(content), np.array_split(asked.queries_QD, num_pieces)
    items = [(shard.number, piece) for piece in range(num_pieces) for shard in plan.shards]
    answers = dict(run_tasks(_search_task, items, plan, manifest, pieces, asked.k, params))
    found: list[list[Any]] = [[] for _ in pieces]
    for position, (hits, _) in sorted(answers.items(), key=itemgetter(0)):
        found[items[position][1]].append(hits)
    found_QK = np.concatenate([merge_topk(hits, asked.k)[1] for hits in found])
    return asked.trial(params, found_QK, sum(seconds for _, seconds in answers.values()))


def _searchable(content: dict[str, Any]) -> str:
    """Return what opening a shard takes, as a key of the cache that holds it open."""
    kept = ("name", "version", "dim", "files", "quarantined")
    return json.dumps({**{key: content[key] for key in kept}, "search_params": {}})


def _queries_task(plan: BuildPlan, questions: str | None) -> Any:
    return recall.encode_queries(plan, questions)


def _find_shard_task(shard: ShardPlan, plan: BuildPlan, trained: Receipt) -> Receipt | None:
    return build.find_shard(plan, trained, shard)


def _add_task(item: tuple[ShardPlan, int], plan: BuildPlan, trained: Receipt, threads: int) -> Receipt:
    return build.add_group(plan, trained, *item, num_threads=threads)


def _merge_task(item: tuple[ShardPlan, list[Receipt]], plan: BuildPlan, trained: Receipt) -> Receipt:
    shard, groups = item
    receipt = build.merge_shard(plan, trained, shard, groups)
    build.drop_groups(plan, shard, groups)
    return receipt


def _passages_task(shard: ShardPlan, plan: BuildPlan) -> list[Receipt]:
    return build.write_passages(plan, shard)


def _vectors_task(shard: ShardPlan, plan: BuildPlan) -> Receipt:
    return write_vectors(plan, shard)


def _exact_task(rows: Rows, plan: BuildPlan, queries_BD: Any, k: int, on_gpu: bool) -> Any:
    return recall.exact_in(plan, rows, queries_BD, k, on_gpu=on_gpu)


def _search_task(
    item: tuple[int, int], plan: BuildPlan, manifest: str, pieces: list[Any], k: int, params: Params
) -> Any:
    number, queries_BD = item[0], pieces[item[1]]

    def search_shard() -> Any:
        shard = _open_shard(plan.root, manifest, number)

        def find(depth: int) -> Any:
            return search(shard.index, queries_BD, depth, params, num_threads=1)

        start = time.perf_counter()
        hits = search_without(shard.unfit, find, k, shard.index.ntotal) if len(shard.unfit) else find(k)
        return hits, time.perf_counter() - start

    entry = json.loads(manifest)["files"][plan.shards[number].name]
    return recall.found_in(plan, entry, (queries_BD, k, params), search_shard)


def _probes_task(number: int, root: str, manifest: str, asked: HeldOut) -> Any:
    return probes_needed(_open_shard(root, manifest, number).index, asked.queries_QD, asked.exact_QK)


def _list_sizes_task(number: int, root: str, manifest: str) -> Any:
    return list_sizes(_open_shard(root, manifest, number).index)


@lru_cache(maxsize=64)
def _open_shard(root: str, manifest: str, number: int) -> LocalShard:
    """Open a shard once a process: its file is read whole to check it, which each setting tried would pay again."""
    return LocalShard(root, json.loads(manifest), number)
