"""What works on the parts under way: readers that tokenise, encoders on their devices, writers.

Each takes and gives one row a part, and adds to its record of work what it did and when.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import corpus, embeddings
from pipelines.encode import Encoder, EncoderSpec, ImageEncoder, load_tokeniser, settle_budget
from pipelines.guard import DeviceLostError, Guilty, attempts
from pipelines.guard_process import encode_guarded
from pipelines.manifest import fingerprint, put_done
from pipelines.models.base import Tokens
from pipelines.storage import Store
from pipelines.throughput import Meter, timed


class Tokeniser:
    """Read parts and tokenise them."""

    def __init__(self, passages: Store, spec: EncoderSpec) -> None:
        self.passages, self.tokeniser = passages, load_tokeniser(spec, "passage")

    def __call__(self, batch: pa.Table) -> pa.Table:
        began, part = time.time(), json.loads(batch["part"][0].as_py())
        table = corpus.read_part(self.passages, part)
        tokens = self.tokeniser.passages(table["title"].to_pylist(), table["text"].to_pylist())
        columns = {
            "part": [part_number(part)],
            "id": pa.array([table["id"].to_pylist()], pa.list_(pa.string())),
            "tokens": _one_list(tokens.ids, pa.int32()),
            "offsets": _one_list(tokens.offsets, pa.int64()),
            "types": _one_list(tokens.type_ids, pa.int8()),
            "read": [json.dumps(timed(began))],
        }
        return pa.table(columns)


class EncoderActor:
    """Hold a tower and turn tokenised parts into the bytes of embedding parts.

    allowed: the most passages of the snapshot that may be quarantined.
    """

    def __init__(self, spec: EncoderSpec, device: str, num_threads: int, store: Store, allowed: int) -> None:
        self.spec, self.device, self.store, self.allowed = spec, device, store, allowed
        self.encoder = self._load(num_threads)
        self.meter = Meter(self.encoder.tower, self.encoder.compute, device)

    def _load(self, num_threads: int) -> Any:
        encoder = Encoder(self.spec, "passage", self.device, num_threads)
        settle_budget(encoder, attempts(self.store))
        return encoder

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.time()
        types = batch["types"].combine_chunks()
        tokens = Tokens(
            _only_list(batch["tokens"]),
            _only_list(batch["offsets"]),
            None if types.null_count else _only_list(batch["types"]),
        )
        self.encoder.engine.computed_tokens = 0  # what stays when another process computes this part
        emb_ND, guilty = _guarded(self, batch, tokens)
        work = self.meter.record(tokens.lengths, self.encoder.computed_tokens, began)
        return _embedded(batch, emb_ND, guilty, self.spec, work)


class ImageReader:
    """Read parts of images; there is nothing to tokenise."""

    def __init__(self, passages: Store) -> None:
        self.passages = passages

    def __call__(self, batch: pa.Table) -> pa.Table:
        began, part = time.time(), json.loads(batch["part"][0].as_py())
        table = corpus.read_part(self.passages, part, images=True)
        images = table["image"].combine_chunks()
        images = pa.concat_arrays(images.chunks) if isinstance(images, pa.ChunkedArray) else images
        columns = {
            "part": [part_number(part)],
            "id": pa.array([table["id"].to_pylist()], pa.list_(pa.string())),
            "images": _one_list(images, pa.large_binary()),
            "read": [json.dumps(timed(began))],
        }
        return pa.table(columns)


class ImageEncoderActor(EncoderActor):
    """Hold an image tower and turn parts of images into the bytes of embedding parts."""

    def _load(self, num_threads: int) -> Any:
        return ImageEncoder(self.spec, self.device, num_threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.time()
        images = batch["images"].combine_chunks().flatten().to_pylist()
        emb_ND, guilty = _guarded(self, batch, images)
        length_N = np.full(len(images), self.encoder.num_tokens(1))
        return _embedded(batch, emb_ND, guilty, self.spec, self.meter.record(length_N, int(length_N.sum()), began))


def _guarded(actor: EncoderActor, batch: pa.Table, content: Any) -> tuple[Any, list[Guilty]]:
    """Return the vectors of a part, and its guilty rows; end this process when its device is lost."""
    name = embeddings.part_name(batch["part"][0].as_py())
    try:
        return encode_guarded(actor.store, name, actor.encoder, content, actor.device, actor.allowed)
    except DeviceLostError as error:
        # Ray starts another process in its place, which gets a device that works if there is one.
        print(f"the device is lost: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _embedded(batch: pa.Table, emb_ND: Any, guilty: list[Guilty], spec: EncoderSpec, work: dict[str, Any]) -> pa.Table:
    """Return the row that the writer takes: an embedding part's bytes, what they cost, and what is not among them.

    work: `Meter.record`'s; making the bytes is part of encoding.
    """
    ids = batch["id"].combine_chunks().flatten()
    data = embeddings.to_parquet(ids, emb_ND, spec.storage)
    work |= {"read": json.loads(batch["read"][0].as_py()), "encode": timed(work.pop("began"))}
    return pa.table(
        {
            "part": batch["part"],
            "data": pa.array([data], pa.large_binary()),
            "num_rows": [work["num_rows"]],
            "num_tokens": [work["num_tokens"]],
            "work": [json.dumps(work)],
            "quarantined": [json.dumps([{**asdict(g), "id": ids[g.row].as_py()} for g in guilty])],
        }
    )


class Writer:
    """Put embedding parts in place, each with its receipt."""

    def __init__(self, store: Store, spec: EncoderSpec) -> None:
        self.store, self.spec = store, spec

    def __call__(self, batch: pa.Table) -> pa.Table:
        began, row = time.time(), batch.to_pylist()[0]
        work = json.loads(row["work"])
        facts = {
            "num_rows": row["num_rows"],
            "num_tokens": row["num_tokens"],
            "encode_seconds": round(work["encode"]["seconds"], 3),
        }
        if quarantined := json.loads(row["quarantined"]):
            facts["quarantined"] = quarantined
        name = embeddings.part_name(row["part"])
        receipt = put_done(self.store, name, row["data"], made_from(name, row["num_rows"], self.spec), facts)
        # The work is told to this run's driver only: of a part that it finds in place another run would say its own.
        receipt.facts["work"] = {**work, "write": timed(began)}
        return pa.table({"part": [row["part"]], "receipt": [json.dumps(asdict(receipt))]})


def made_from(name: str, num_rows: int, spec: EncoderSpec) -> str:
    """Return the fingerprint in an embedding part's receipt."""
    # The folder is named by snapshot and encoder already; this guards against files copied in from elsewhere.
    return fingerprint([name, num_rows, spec.fingerprint])


def part_number(part: dict[str, Any]) -> int:
    """Return the number in a snapshot part's name."""
    return int(part["name"].removeprefix("part-").removesuffix(".parquet"))


def _one_list(values: Any, kind: pa.DataType) -> pa.Array:
    """Return a one-row large list column holding the flat array `values` (null for None)."""
    if values is None:
        return pa.nulls(1, pa.large_list(kind))
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(values, kind))


def _only_list(column: pa.ChunkedArray) -> Any:
    return np.asarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False))
