"""`encode` on a cluster: Ray Data streams parts through tokenisers, encoders and writers.

    missing parts -> tokenise (a sliver of a core) -> encode (the actor pool) -> write (a sliver of a core) -> receipts

One Ray Data row is one part, so the unit of work, of retry and of resume is the same. The driver asks the store what is
in place before and after: what counts is the finished file, not what a worker reported.
"""

from __future__ import annotations

import json
import time
from typing import Any

from cluster.encode_workers import (
    EncoderActor,
    ImageEncoderActor,
    ImageReader,
    Tokeniser,
    Writer,
    made_from,
    part_number,
)
from cluster.pools import encode_resources, run_tasks, stream_rows, told_while_waiting
from cluster.progress import Progress, Stage
from pipelines import corpus, embeddings, guard
from pipelines.config import ClusterConfig
from pipelines.encode import EncoderSpec, check_takes_images
from pipelines.errors import PinakesError
from pipelines.manifest import (
    Receipt,
    drop_receipts,
    find_done,
    find_finished,
    package_versions,
    write_manifest,
)
from pipelines.storage import Store
from pipelines.throughput import Work, summarise

_ROUNDS = 3


def embedding_store(root: str, snapshot: str, spec: EncoderSpec) -> Store:
    return Store(root).child("embeddings", snapshot, spec.fingerprint)


def encode(
    root: str,
    snapshot: dict[str, Any],
    spec: EncoderSpec,
    cluster: ClusterConfig,
    progress: Progress,
    max_quarantined_share: float = 0.01,
) -> dict[str, Any]:
    """Encode every part of `snapshot` that is not yet encoded by `spec`; return the embeddings' manifest.

    Raises CheckpointError when the snapshot is one of images and the encoder takes none, InputError when a larger share
    of the passages than allowed cannot be encoded.
    """
    images = bool(snapshot.get("images"))
    if images:
        check_takes_images(spec)
    store = embedding_store(root, snapshot["snapshot"], spec)
    parts = snapshot["parts"]
    if finished := find_finished(store, "embeddings", guard.attempts(store)):
        with progress.stage("encode", len(parts)) as stage:
            stage.advance(len(parts), reused=True, rows=snapshot["num_rows"])
            stage.throughput = finished.get("throughput")
        # The folder is named by the passage side alone: the query encoder is the one asked for now.
        return {**finished, "encoder": spec.as_dict()}
    passages = corpus.corpus_store(root, snapshot["corpus"]).child(snapshot["snapshot"])
    allowed = guard.num_allowed(snapshot["num_rows"], max_quarantined_share)
    began = time.time()
    with progress.stage("encode", len(parts)) as stage, told_while_waiting(cluster, progress.say):
        receipts = _encode_missing(passages, store, parts, spec, cluster, stage, images, allowed)
        works = [Work.parse(r.facts.pop("work")) for r in receipts if "work" in r.facts]
        stage.throughput = summarise(works, began, stage.seconds, spec.compute)
    return _finish(store, snapshot, spec, receipts, allowed, stage)


def _finish(
    store: Store, snapshot: dict[str, Any], spec: EncoderSpec, receipts: list[Receipt], allowed: int, stage: Stage
) -> dict[str, Any]:
    """Write the quarantine and then the manifest, and sweep what the work needed; return the manifest."""
    parts = snapshot["parts"]
    entries = [
        {**receipt.as_entry(), "first_row": part["first_row"]} for receipt, part in zip(receipts, parts, strict=True)
    ]
    quarantined = guard.collect(parts, [entry.pop("quarantined", []) for entry in entries])
    guard.write_quarantine(store, quarantined, allowed)
    content = {
        "snapshot": snapshot["snapshot"],
        "corpus": snapshot["corpus"],
        "encoder": spec.as_dict(),
        "dim": spec.dim,
        "num_rows": snapshot["num_rows"],
        "num_quarantined": len(quarantined),
        "quarantined": quarantined,
        "parts": entries,
        "seconds": round(stage.seconds, 3),
        "throughput": stage.throughput,
        "packages": package_versions(),
    }
    manifest = write_manifest(store, "embeddings", content)
    drop_receipts(store)
    guard.attempts(store).remove_all()
    return manifest


def _encode_missing(
    passages: Store,
    store: Store,
    parts: list[dict[str, Any]],
    spec: EncoderSpec,
    cluster: ClusterConfig,
    stage: Stage,
    images: bool,
    allowed: int,
) -> list[Receipt]:
    """Encode until every part is in place; a part that stays missing after a few rounds is an error."""
    found: dict[int, Receipt] = {}
    for attempt in range(_ROUNDS):
        missing = [part for i, part in enumerate(parts) if i not in found]
        for position, receipt in run_tasks(_find_task, missing, store, spec):
            if receipt is not None:
                part = part_number(missing[position])
                found[part] = receipt
                if attempt == 0:
                    stage.advance(reused=True, rows=receipt.facts["num_rows"], tokens=receipt.facts["num_tokens"])
        missing = [part for i, part in enumerate(parts) if i not in found]
        if not missing:
            return [found[i] for i in range(len(parts))]
        for row in _stream(passages, store, missing, spec, cluster, images, allowed):
            receipt = Receipt(**row["receipt"])
            found[row["part"]] = receipt
            if attempt == 0:
                stage.advance(rows=receipt.facts["num_rows"], tokens=receipt.facts["num_tokens"])
        if len(found) == len(parts):
            return [found[i] for i in range(len(parts))]
    missing_names = ", ".join(p["name"] for i, p in enumerate(parts) if i not in found)
    raise PinakesError(
        f"{len(parts) - len(found)} parts could not be encoded",
        where=missing_names[:500],
        hint="look at the workers' logs, then run the command again: only these are missing",
    )


def _stream(
    passages: Store,
    store: Store,
    missing: list[dict[str, Any]],
    spec: EncoderSpec,
    cluster: ClusterConfig,
    images: bool,
    allowed: int,
) -> Any:
    """Yield {"part", "receipt"} for each missing part as its file lands."""
    import ray

    use = encode_resources(cluster, len(missing))
    items = [{"part": json.dumps(part)} for part in missing]
    one_part = {"batch_size": 1, "batch_format": "pyarrow"}
    reader, encoder = (ImageReader, ImageEncoderActor) if images else (Tokeniser, EncoderActor)
    reader_arguments = (passages,) if images else (passages, spec)
    actor_arguments = (spec, use.device, use.threads, store, allowed)

    def plan() -> Any:
        return (
            ray.data.from_items(items, override_num_blocks=len(items))
            .map_batches(reader, fn_constructor_args=reader_arguments, compute=use.readers, **one_part, **use.reader)
            .map_batches(encoder, fn_constructor_args=actor_arguments, compute=use.encoders, **one_part, **use.encoder)
            .map_batches(Writer, fn_constructor_args=(store, spec), compute=use.writers, **one_part, **use.writer)
        )

    for row in stream_rows(plan):
        yield {"part": row["part"], "receipt": json.loads(row["receipt"])}


def _find_task(part: dict[str, Any], store: Store, spec: EncoderSpec) -> Receipt | None:
    name = embeddings.part_name(part_number(part))
    return find_done(store, name, made_from(name, part["num_rows"], spec))
