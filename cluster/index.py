"""`index` on a cluster: train once, add groups in parallel, merge shards, write passages, tune, verify, publish."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from typing import Any

import numpy as np

from cluster.pools import largest_node_cpus, run_task, run_tasks
from cluster.progress import Progress
from pipelines import build, publish
from pipelines.build import BuildPlan, Rows, ShardPlan
from pipelines.config import IndexConfig
from pipelines.encode import Encoder
from pipelines.errors import ArtifactError
from pipelines.evaluate import read_questions
from pipelines.index.search import merge_topk, search
from pipelines.index.tune import HeldOut, Params, Trial, tune
from pipelines.manifest import Receipt, find_finished
from pipelines.retrieve import LocalShard, bound_encoder


def build_version(
    root: str,
    config: IndexConfig,
    snapshot: dict[str, Any],
    embedded: dict[str, Any],
    progress: Progress,
    questions: str | None = None,
) -> dict[str, Any]:
    """Build and publish the index of `embedded`; a version that exists already is returned at once.

    questions: URL of the questions that recall is measured on; without it, sentences sampled from the passages.
    Raises QualityError when its recall, measured now or when it was published, misses the target.
    """
    plan = build.plan_build(root, config, snapshot, embedded, largest_node_cpus())
    if published := find_finished(plan.store, "version", plan.work):
        publish.check_recall(plan, published)
        with progress.stage("index", len(plan.shards)) as stage:
            stage.advance(len(plan.shards), reused=True, rows=plan.num_rows)
        return published
    try:
        return _build(plan, progress, questions)
    except ArtifactError:
        # Another driver may have published this very version, and cleared its work folder, under our hands.
        if published := find_finished(plan.store, "version", plan.work):
            publish.check_recall(plan, published)
            return published
        raise


def _build(plan: BuildPlan, progress: Progress, questions: str | None) -> dict[str, Any]:
    with progress.stage("train", 1) as stage:
        trained = run_task(build.train_quantizer, plan, num_cpus=plan.num_threads)
        stage.advance(reused=trained.reused)
    shards = _build_shards(plan, trained, progress)
    passages: list[Receipt] = []
    with progress.stage("passages", len(plan.shards)) as stage:
        for _, receipts in sorted(run_tasks(_passages_task, plan.shards, plan)):
            passages += receipts
            stage.advance(reused=all(r.reused for r in receipts), rows=receipts[0].facts["num_rows"])
    files = [trained, *shards, *passages]
    content = publish.version_content(plan, files, None, {n: s["seconds"] for n, s in progress.stages.items()})
    _measure_recall(plan, content, progress, questions)
    with progress.stage("publish", 1) as stage:
        manifest = publish.publish(plan, content)
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


def _measure_recall(plan: BuildPlan, content: dict[str, Any], progress: Progress, questions: str | None) -> None:
    """Tune the search parameters, where there are any to tune, and measure recall@k; both go into `content`."""
    held_out, facts = None, {}
    if plan.tunable:
        with progress.stage("tune") as stage:
            tune_on, held_out = _held_out(plan, questions).halves(plan.config.seed)

            def measure(params: Params) -> Trial:
                stage.advance()
                return _try(plan, content, tune_on, params)

            tuned = tune(plan.tunable, measure, plan.config.min_recall or 0.0)
            content["search_params"], facts = tuned.best.params, tuned.facts(len(tune_on))
    with progress.stage("verify", 1) as stage:
        held_out = held_out or _held_out(plan, questions)
        found = _try(plan, content, held_out, content["search_params"])
        stage.advance()
    content["recall"] = {
        "k": held_out.k,
        "value": round(found.recall, 5),
        "ci95": round(found.half_width, 5),
        "num_queries": len(held_out),
        "target": plan.config.min_recall,
        "queries": "questions" if questions else "sampled sentences",
        **facts,
    }


def _held_out(plan: BuildPlan, questions: str | None) -> HeldOut:
    """Return queries that are not stored vectors, with what exact search finds for them."""
    queries_QD, k = run_task(_queries_task, plan, questions), min(build.RECALL_K, plan.num_rows)
    groups = [group for shard in plan.shards for group in shard.groups]
    exact = [found for _, found in run_tasks(_exact_task, groups, plan, queries_QD, k)]
    return HeldOut(queries_QD, merge_topk(exact, k)[1])


def _try(plan: BuildPlan, content: dict[str, Any], asked: HeldOut, params: Params) -> Trial:
    """Search all shards with one setting, as serving would."""
    manifest = json.dumps({**{key: content[key] for key in ("name", "version", "dim", "files")}, "search_params": {}})
    numbers = range(len(plan.shards))
    answers = [a for _, a in run_tasks(_search_task, numbers, plan.root, manifest, asked.queries_QD, asked.k, params)]
    _, found_QK = merge_topk([hits for hits, _ in answers], asked.k)
    return asked.trial(params, found_QK, sum(seconds for _, seconds in answers))


def _queries_task(plan: BuildPlan, questions: str | None) -> Any:
    if questions:
        texts = [q.text for q in read_questions(questions)]
        picked = np.random.default_rng(plan.config.seed).permutation(len(texts))[: plan.config.recall_queries]
        texts = [texts[i] for i in np.sort(picked)]
    else:
        texts = build.sample_sentences(plan, plan.config.recall_queries)
    return Encoder(bound_encoder({"encoder": plan.embeddings["encoder"]}), "query").encode_queries(texts)


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


def _exact_task(rows: Rows, plan: BuildPlan, queries_BD: Any, k: int) -> Any:
    return build.exact_in(plan, rows, queries_BD, k)


def _search_task(number: int, root: str, manifest: str, queries_BD: Any, k: int, params: Params) -> Any:
    shard = _open_shard(root, manifest, number)
    start = time.perf_counter()
    hits = search(shard.index, queries_BD, k, params, num_threads=1)
    return hits, time.perf_counter() - start


@lru_cache(maxsize=64)
def _open_shard(root: str, manifest: str, number: int) -> LocalShard:
    """Open a shard once a process: its file is read whole to check it, which each setting tried would pay again."""
    return LocalShard(root, json.loads(manifest), number)
