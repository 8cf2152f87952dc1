"""`encode` on a cluster: Ray Data streams parts through tokenisers, encoders and writers.

    missing parts -> tokenise (a sliver of a core) -> encode (the actor pool) -> write (a sliver of a core) -> receipts

One Ray Data row is one part, so the unit of work, of retry and of resume is the same. The driver asks the store what is
in place before and after: what counts is the finished file, not what a worker reported.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.pools import encode_resources, run_tasks
from cluster.progress import Progress, Stage
from pipelines import corpus, embeddings
from pipelines.config import ClusterConfig
from pipelines.encode import Encoder, EncoderSpec, ImageEncoder, check_takes_images, load_tokeniser
from pipelines.errors import PinakesError
from pipelines.manifest import (
    Receipt,
    drop_receipts,
    find_done,
    find_finished,
    fingerprint,
    package_versions,
    put_done,
    write_manifest,
)
from pipelines.models.base import Tokens
from pipelines.storage import Store

_ROUNDS = 3


def embedding_store(root: str, snapshot: str, spec: EncoderSpec) -> Store:
    return Store(root).child("embeddings", snapshot, spec.fingerprint)


def encode(
    root: str, snapshot: dict[str, Any], spec: EncoderSpec, cluster: ClusterConfig, progress: Progress
) -> dict[str, Any]:
    """Encode every part of `snapshot` that is not yet encoded by `spec`; return the embeddings' manifest.

    Raises CheckpointError when the snapshot is one of images and the encoder takes none.
    """
    images = bool(snapshot.get("images"))
    if images:
        check_takes_images(spec)
    store = embedding_store(root, snapshot["snapshot"], spec)
    parts = snapshot["parts"]
    if finished := find_finished(store, "embeddings"):
        with progress.stage("encode", len(parts)) as stage:
            stage.advance(len(parts), reused=True, rows=snapshot["num_rows"])
        return finished
    passages = corpus.corpus_store(root, snapshot["corpus"]).child(snapshot["snapshot"])
    with progress.stage("encode", len(parts)) as stage:
        receipts = _encode_missing(passages, store, parts, spec, cluster, stage, images)
    entries = [
        {**receipt.as_entry(), "first_row": part["first_row"]} for receipt, part in zip(receipts, parts, strict=True)
    ]
    manifest = write_manifest(
        store,
        "embeddings",
        {
            "snapshot": snapshot["snapshot"],
            "corpus": snapshot["corpus"],
            "encoder": spec.as_dict(),
            "dim": spec.dim,
            "num_rows": snapshot["num_rows"],
            "parts": entries,
            "seconds": round(stage.seconds, 3),
            "packages": package_versions(),
        },
    )
    drop_receipts(store)
    return manifest


def _encode_missing(
    passages: Store,
    store: Store,
    parts: list[dict[str, Any]],
    spec: EncoderSpec,
    cluster: ClusterConfig,
    stage: Stage,
    images: bool,
) -> list[Receipt]:
    """Encode until every part is in place; a part that stays missing after a few rounds is an error."""
    found: dict[int, Receipt] = {}
    for attempt in range(_ROUNDS):
        missing = [part for i, part in enumerate(parts) if i not in found]
        for position, receipt in run_tasks(_find_task, missing, store, spec):
            if receipt is not None:
                part = _number(missing[position])
                found[part] = receipt
                if attempt == 0:
                    stage.advance(reused=True, rows=receipt.facts["num_rows"], tokens=receipt.facts["num_tokens"])
        missing = [part for i, part in enumerate(parts) if i not in found]
        if not missing:
            return [found[i] for i in range(len(parts))]
        for row in _stream(passages, store, missing, spec, cluster, images):
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
) -> Any:
    """Yield {"part", "receipt"} for each missing part as its file lands."""
    import ray

    use = encode_resources(cluster, len(missing))
    items = [{"part": json.dumps(part)} for part in missing]
    one_part = {"batch_size": 1, "batch_format": "pyarrow"}
    reader, encoder = (_ImageReader, _ImageEncoderActor) if images else (_Tokeniser, _EncoderActor)
    reader_arguments = (passages,) if images else (passages, spec)
    actor_arguments = (spec, use.device, use.threads)
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(reader, fn_constructor_args=reader_arguments, compute=use.helpers, **one_part, **use.helper)
        .map_batches(encoder, fn_constructor_args=actor_arguments, compute=use.actors, **one_part, **use.actor)
        .map_batches(_Writer, fn_constructor_args=(store, spec), compute=use.helpers, **one_part, **use.helper)
    )
    for row in dataset.iter_rows():
        yield {"part": row["part"], "receipt": json.loads(row["receipt"])}


class _Tokeniser:
    """Read parts and tokenise them."""

    def __init__(self, passages: Store, spec: EncoderSpec) -> None:
        self.passages, self.tokeniser = passages, load_tokeniser(spec, "passage")

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = json.loads(batch["part"][0].as_py())
        table = corpus.read_part(self.passages, part)
        tokens = self.tokeniser.passages(table["title"].to_pylist(), table["text"].to_pylist())
        columns = {
            "part": [_number(part)],
            "id": pa.array([table["id"].to_pylist()], pa.list_(pa.string())),
            "tokens": _one_list(tokens.ids, pa.int32()),
            "offsets": _one_list(tokens.offsets, pa.int64()),
            "types": _one_list(tokens.type_ids, pa.int8()),
        }
        return pa.table(columns)


class _EncoderActor:
    """Hold a tower and turn tokenised parts into the bytes of embedding parts."""

    def __init__(self, spec: EncoderSpec, device: str, num_threads: int) -> None:
        self.spec = spec
        self.encoder = Encoder(spec, "passage", device, num_threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.perf_counter()
        types = batch["types"].combine_chunks()
        tokens = Tokens(
            _only_list(batch["tokens"]),
            _only_list(batch["offsets"]),
            None if types.null_count else _only_list(batch["types"]),
        )
        emb_ND = self.encoder.encode_tokens(tokens)
        return _embedded(batch, emb_ND, self.spec, len(tokens.ids), started)


class _ImageReader:
    """Read parts of images; there is nothing to tokenise."""

    def __init__(self, passages: Store) -> None:
        self.passages = passages

    def __call__(self, batch: pa.Table) -> pa.Table:
        part = json.loads(batch["part"][0].as_py())
        table = corpus.read_part(self.passages, part, images=True)
        images = table["image"].combine_chunks()
        images = pa.concat_arrays(images.chunks) if isinstance(images, pa.ChunkedArray) else images
        columns = {
            "part": [_number(part)],
            "id": pa.array([table["id"].to_pylist()], pa.list_(pa.string())),
            "images": _one_list(images, pa.large_binary()),
        }
        return pa.table(columns)


class _ImageEncoderActor:
    """Hold an image tower and turn parts of images into the bytes of embedding parts."""

    def __init__(self, spec: EncoderSpec, device: str, num_threads: int) -> None:
        self.spec = spec
        self.encoder = ImageEncoder(spec, device, num_threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.perf_counter()
        images = batch["images"].combine_chunks().flatten().to_pylist()
        emb_ND = self.encoder.encode_images(images)
        return _embedded(batch, emb_ND, self.spec, self.encoder.num_tokens(len(images)), started)


def _embedded(batch: pa.Table, emb_ND: Any, spec: EncoderSpec, num_tokens: int, started: float) -> pa.Table:
    """Return the row that the writer takes: an embedding part's bytes and what they cost."""
    ids = batch["id"].combine_chunks().flatten()
    data = embeddings.to_parquet(ids, emb_ND, spec.storage)
    return pa.table(
        {
            "part": batch["part"],
            "data": pa.array([data], pa.large_binary()),
            "num_rows": [len(emb_ND)],
            "num_tokens": [num_tokens],
            "seconds": [time.perf_counter() - started],
        }
    )


class _Writer:
    """Put embedding parts in place, each with its receipt."""

    def __init__(self, store: Store, spec: EncoderSpec) -> None:
        self.store, self.spec = store, spec

    def __call__(self, batch: pa.Table) -> pa.Table:
        row = batch.to_pylist()[0]
        facts = {
            "num_rows": row["num_rows"],
            "num_tokens": row["num_tokens"],
            "encode_seconds": round(row["seconds"], 3),
        }
        name = embeddings.part_name(row["part"])
        receipt = put_done(self.store, name, row["data"], _made_from(name, row["num_rows"], self.spec), facts)
        return pa.table({"part": [row["part"]], "receipt": [json.dumps(asdict(receipt))]})


def _find_task(part: dict[str, Any], store: Store, spec: EncoderSpec) -> Receipt | None:
    name = embeddings.part_name(_number(part))
    return find_done(store, name, _made_from(name, part["num_rows"], spec))


def _made_from(name: str, num_rows: int, spec: EncoderSpec) -> str:
    # The folder is named by snapshot and encoder already; this guards against files copied in from elsewhere.
    return fingerprint([name, num_rows, spec.fingerprint])


def _number(part: dict[str, Any]) -> int:
    return int(part["name"].removeprefix("part-").removesuffix(".parquet"))


def _one_list(values: Any, kind: pa.DataType) -> pa.Array:
    """Return a one-row large list column holding the flat array `values` (null for None)."""
    if values is None:
        return pa.nulls(1, pa.large_list(kind))
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values, kind))


def _only_list(column: pa.ChunkedArray) -> Any:
    return np.asarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False))
