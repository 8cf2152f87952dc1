"""`ingest` on a cluster: stage splits in parallel, resolve once, cut parts in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.pools import run_task, run_tasks
from cluster.progress import Progress, Stage
from pipelines import corpus
from pipelines.config import CorpusConfig
from pipelines.corpus import IngestPlan, Resolved, Staged
from pipelines.errors import ArtifactError, InputError
from pipelines.manifest import drop_receipts, has_manifest
from pipelines.readers import Split, settle
from pipelines.storage import Store


def ingest(root: str, config: CorpusConfig, progress: Progress) -> dict[str, Any]:
    """Turn the sources of `config` into a snapshot and return its manifest; unchanged sources return at once."""
    plan = corpus.plan_ingest(config)
    if known := corpus.find_snapshot(root, plan):
        with progress.stage("ingest", 1) as stage:
            stage.advance(reused=True, rows=known["num_rows"], quarantined=known["num_quarantined"])
        return known
    try:
        return _ingest(root, plan, progress)
    except ArtifactError:
        # Another driver with the same inputs may have finished, and cleared its staging folder, under our hands.
        if known := corpus.find_snapshot(root, plan):
            return known
        raise


def _ingest(root: str, plan: IngestPlan, progress: Progress) -> dict[str, Any]:
    store = corpus.corpus_store(root, plan.config.name)
    staging = corpus.staging_store(root, plan)
    with progress.stage("ingest", len(plan.splits)) as stage:
        staged = _stage(staging, plan, stage)
    try:
        resolved = run_task(corpus.resolve, staging, plan, staged)
    except InputError:
        corpus.write_quarantine(staging, store, staged, {}, plan)
        raise
    return _cut(root, staging, plan, staged, resolved, progress)


def _stage(staging: Store, plan: IngestPlan, stage: Stage) -> list[Staged]:
    """Stage every split, then again those whose guess of a record boundary turned out wrong, until all agree."""
    staged: dict[int, Staged] = {}

    def read(start_at: Mapping[int, int | None]) -> dict[int, tuple[int, int]]:
        items = [(plan.splits[index], start) for index, start in start_at.items()]
        for position, result in run_tasks(_stage_task, items, staging, plan):
            if (index := items[position][0].index) not in staged:
                stage.advance(reused=result.reused, rows=result.num_rows, quarantined=result.num_rejected)
            staged[index] = result
        return {index: (staged[index].first, staged[index].end) for index in start_at}

    settle(plan.splits, read)
    return [staged[split.index] for split in plan.splits]


def _stage_task(item: tuple[Split, int | None], staging: Store, plan: IngestPlan) -> Staged:
    split, start_at = item
    return corpus.stage_split(staging, plan, split, start_at)


def _cut(
    root: str, staging: Store, plan: IngestPlan, staged: list[Staged], resolved: Resolved, progress: Progress
) -> dict[str, Any]:
    snapshot = corpus.corpus_store(root, plan.config.name).child(resolved.snapshot)
    if not has_manifest(snapshot):
        quarantined = corpus.write_quarantine(staging, snapshot, staged, resolved.dropped, plan)
        parts = {}
        with progress.stage("cut", len(resolved.parts)) as stage:
            for part, receipt in run_tasks(_cut_task, range(len(resolved.parts)), staging, snapshot, resolved):
                parts[part] = receipt
                stage.advance(reused=receipt.reused, rows=receipt.facts["num_rows"])
    else:  # the same rows, ingested before from other files
        quarantined, parts = 0, {}
    reasons: dict[str, int] = {}
    for s in staged:
        for reason, count in s.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    if duplicates := sum(len(rows) for rows in resolved.dropped.values()):
        reasons["duplicate_id"] = duplicates
    receipts = [parts[i] for i in sorted(parts)]
    manifest = corpus.publish_snapshot(root, plan, resolved, receipts, quarantined, reasons)
    drop_receipts(snapshot)
    staging.remove_all()
    return manifest


def _cut_task(part: int, staging: Store, snapshot: Store, resolved: Resolved) -> Any:
    return corpus.cut_part(staging, snapshot, resolved, part)
