"""`index` on a cluster: train once, add groups in parallel, merge shards, write passages, verify, publish."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.pools import largest_node_cpus, run_task, run_tasks
from cluster.progress import Progress
from pipelines import build, publish
from pipelines.build import BuildPlan, Rows, ShardPlan
from pipelines.config import IndexConfig
from pipelines.encode import Encoder
from pipelines.errors import ArtifactError
from pipelines.evaluate import read_questions, recall_at, recall_half_width
from pipelines.index.search import merge_topk
from pipelines.manifest import Receipt, find_finished
from pipelines.retrieve import LocalShard, bound_encoder

_RECALL_K = 10


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
    """
    plan = build.plan_build(root, config, snapshot, embedded, largest_node_cpus())
    if published := find_finished(plan.store, "version", plan.work):
        with progress.stage("index", len(plan.shards)) as stage:
            stage.advance(len(plan.shards), reused=True, rows=plan.num_rows)
        return published
    try:
        return _build(plan, progress, questions)
    except ArtifactError:
        # Another driver may have published this very version, and cleared its work folder, under our hands.
        if published := find_finished(plan.store, "version", plan.work):
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
    with progress.stage("verify", 1) as stage:
        content["recall"] = _measure_recall(plan, content, questions)
        stage.advance()
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
    with progress.stage("add", sum(len(s.groups) for s in plan.shards)) as stage:
        for number in done:
            stage.advance(len(plan.shards[number].groups), reused=True, rows=len(plan.shards[number].rows))
        for position, receipt in run_tasks(_add_task, items, plan, trained):
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


def _measure_recall(plan: BuildPlan, content: dict[str, Any], questions: str | None) -> dict[str, Any]:
    """Return recall@k of the built shards against exact search, on queries that are not stored vectors."""
    k = min(_RECALL_K, plan.num_rows)
    queries_BD = run_task(_queries_task, plan, questions)
    exact = [
        found for _, found in run_tasks(_exact_task, [g for s in plan.shards for g in s.groups], plan, queries_BD, k)
    ]
    numbers = range(len(plan.shards))
    approximate = [found for _, found in run_tasks(_search_task, numbers, plan.root, content, queries_BD, k)]
    (_, exact_QK), (_, found_QK) = merge_topk(exact, k), merge_topk(approximate, k)
    return {
        "k": k,
        "value": round(recall_at(found_QK, exact_QK, k), 5),
        "ci95": round(recall_half_width(found_QK, exact_QK, k), 5),
        "num_queries": len(queries_BD),
        "target": plan.config.min_recall,
        "queries": "questions" if questions else "sampled sentences",
    }


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


def _add_task(item: tuple[ShardPlan, int], plan: BuildPlan, trained: Receipt) -> Receipt:
    return build.add_group(plan, trained, *item)


def _merge_task(item: tuple[ShardPlan, list[Receipt]], plan: BuildPlan, trained: Receipt) -> Receipt:
    shard, groups = item
    receipt = build.merge_shard(plan, trained, shard, groups)
    build.drop_groups(plan, shard, groups)
    return receipt


def _passages_task(shard: ShardPlan, plan: BuildPlan) -> list[Receipt]:
    return build.write_passages(plan, shard)


def _exact_task(rows: Rows, plan: BuildPlan, queries_BD: Any, k: int) -> Any:
    return build.exact_in(plan, rows, queries_BD, k)


def _search_task(number: int, root: str, content: dict[str, Any], queries_BD: Any, k: int) -> Any:
    return LocalShard(root, content, number).search(queries_BD, k)
