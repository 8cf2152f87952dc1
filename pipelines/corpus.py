"""Sources -> validated snapshot, in three steps that each run in a plain loop or spread over a cluster.

    stage    one split of the input -> chunks of valid rows + rejected rows         (parallel, a task a split)
    resolve  drop duplicate ids, fingerprint what remains, plan the parts           (one task, digests only)
    cut      the plan's rows -> part-00000.parquet ...                              (parallel, a task a part)

The snapshot's name is a digest of its rows in order, so the same rows give the same snapshot whether they came as TSV,
gzip or Parquet, in one file or many, and however many workers read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import MetadataConfig
from pipelines.errors import InputError
from pipelines.manifest import Receipt, find_done, find_finished, put_done, write_manifest
from pipelines.schema import FORMAT_VERSION, PASSAGE, QUARANTINE, passage_schema
from pipelines.staging import (
    IngestPlan,
    Staged,
    corpus_store,
    metadata_fields,
    plan_ingest,
    stage_split,
    staging_store,
    table_bytes,
)
from pipelines.storage import Store, temporary_file

__all__ = [
    "IngestPlan", "Piece", "Resolved", "Staged", "corpus_store", "cut_part", "find_snapshot", "plan_ingest",
    "publish_snapshot", "read_part", "resolve", "schema_of", "stage_split", "staging_store", "write_quarantine",
]  # fmt: skip

Array = npt.NDArray[Any]

_ROWS_AT_ONCE = 1 << 23  # ids compared at once while looking for duplicates: bounds memory at about 400 MB


@dataclass(frozen=True)
class Piece:
    """Rows `start:stop` of a chunk, counted after dropping the chunk's `dropped` rows."""

    chunk: str
    start: int
    stop: int


@dataclass(frozen=True)
class Resolved:
    """The snapshot to cut: its fingerprint, the pieces of every part, and the duplicate rows of each chunk."""

    snapshot: str
    num_rows: int
    parts: list[list[Piece]]
    dropped: dict[str, Array]
    schema: pa.Schema = PASSAGE

    @property
    def has_images(self) -> bool:
        return "image" in self.schema.names


# Resolve


def resolve(store: Store, plan: IngestPlan, staged: Sequence[Staged]) -> Resolved:
    """Find duplicate ids (the first occurrence stays), name the snapshot and plan its parts.

    Reads 32 bytes a row and holds at most a fixed number of rows' digests at once. Raises InputError when the corpus
    is empty or a larger share of it than allowed is refused.
    """
    chunks = [chunk for s in staged for chunk in s.chunks]
    dropped = _find_duplicates(store, chunks)
    num_staged = sum(n for _, n in chunks)
    num_duplicates = sum(len(d) for d in dropped.values())
    num_rejected = sum(s.num_rejected for s in staged) + num_duplicates
    _check_share(plan, staged, num_staged - num_duplicates, num_rejected, num_duplicates)
    digest = hashlib.sha256(f"{FORMAT_VERSION} {plan.part_size}".encode())
    if plan.config.metadata:  # the rows' digests hold the values, but not the types of absent ones
        digest.update(str(plan.schema).encode())
    for name, _ in chunks:
        rows = _read_column(store, name, "row_digest")
        digest.update(np.delete(rows, dropped[name], axis=0).tobytes() if name in dropped else rows.tobytes())
    counts = [(name, n - len(dropped.get(name, ()))) for name, n in chunks]
    parts = list(_plan_parts(counts, plan.part_size))
    return Resolved(digest.hexdigest()[:16], num_staged - num_duplicates, parts, dropped, plan.schema)


def _find_duplicates(store: Store, chunks: Sequence[tuple[str, int]]) -> dict[str, Array]:
    """Return, for each chunk that has any, the ascending indexes of its rows whose id occurred before."""
    first_rows = np.cumsum([0] + [n for _, n in chunks])
    num_rounds = max(1, -(-int(first_rows[-1]) // _ROWS_AT_ONCE))
    found = [_duplicates_in_round(store, chunks, first_rows, i, num_rounds) for i in range(num_rounds)]
    rows = np.sort(np.concatenate(found))
    bounds = np.searchsorted(rows, first_rows)
    return {
        name: rows[low:high] - first
        for (name, _), first, low, high in zip(chunks, first_rows, bounds, bounds[1:], strict=False)
        if low < high
    }


def _duplicates_in_round(
    store: Store, chunks: Sequence[tuple[str, int]], first_rows: Array, this_round: int, num_rounds: int
) -> Array:
    """Return the global rows of later occurrences among the ids whose digest falls to `this_round`."""
    digests, rows = [], []
    for (name, num), first in zip(chunks, first_rows, strict=False):
        pair = _read_column(store, name, "id_digest").view(np.uint64)  # (n, 2)
        mine = np.arange(num) if num_rounds == 1 else np.flatnonzero(pair[:, 0] % np.uint64(num_rounds) == this_round)
        digests.append(pair[mine])
        rows.append(mine + first)
    if not digests:
        return np.zeros(0, np.int64)
    pair, row = np.concatenate(digests), np.concatenate(rows)
    order = np.lexsort((row, pair[:, 1], pair[:, 0]))
    same = (pair[order[1:]] == pair[order[:-1]]).all(axis=1)
    return row[order[1:][same]]


def _read_column(store: Store, name: str, column: str) -> Array:
    """Return the (n, 16) uint8 digests of a chunk's column."""
    with store.open(name) as handle:
        array = pq.read_table(handle, columns=[column]).column(0).cast(pa.binary(16)).combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, 16)[array.offset : array.offset + len(array)]


def _plan_parts(counts: Sequence[tuple[str, int]], part_size: int) -> Iterator[list[Piece]]:
    part: list[Piece] = []
    room = part_size
    for name, count in counts:
        start = 0
        while start < count:
            stop = min(count, start + room)
            part.append(Piece(name, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield part
                part, room = [], part_size
    if part:
        yield part


def _check_share(plan: IngestPlan, staged: Sequence[Staged], kept: int, refused: int, duplicates: int) -> None:
    reasons: dict[str, int] = {"duplicate_id": duplicates} if duplicates else {}
    for s in staged:
        for reason, count in s.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1]))
    allowed = plan.config.max_quarantined_share
    if refused > allowed * (kept + refused):
        raise InputError(
            f"{refused} of {kept + refused} rows were refused: {told}",
            where=", ".join(plan.config.sources)[:500],
            expected=f"at most {allowed:.2%} (corpus.max_quarantined_share)",
            hint="quarantine.parquet beside the snapshots holds them; mend the input or raise the share",
        )
    if kept == 0:
        raise InputError(
            "the corpus has no passages",
            where=", ".join(plan.config.sources)[:500],
            expected="at least one row with an id and a text",
            hint="check corpus.sources and corpus.columns",
        )


# Cut


def cut_part(staging: Store, snapshot: Store, resolved: Resolved, part: int) -> Receipt:
    """Write part-00000.parquet (and so on) of the snapshot: the same plan gives the same bytes."""
    name = f"part-{part:05d}.parquet"
    if done := find_done(snapshot, name, resolved.snapshot):
        return done
    schema = resolved.schema
    tables = []
    for piece in resolved.parts[part]:
        with staging.open(piece.chunk) as handle:
            table = pq.read_table(handle, columns=schema.names)
        if (dropped := resolved.dropped.get(piece.chunk)) is not None:
            table = table.take(np.delete(np.arange(len(table)), dropped))
        tables.append(table.slice(piece.start, piece.stop - piece.start))
    table = pa.concat_tables(tables).combine_chunks().cast(schema)
    facts = {"num_rows": len(table), "first_row": part * sum(p.stop - p.start for p in resolved.parts[0])}
    return put_done(snapshot, name, table_bytes(table), resolved.snapshot, facts)


def write_quarantine(
    staging: Store, target: Store, staged: Sequence[Staged], dropped: dict[str, Array], plan: IngestPlan
) -> int:
    """Write quarantine.parquet: every refused row of the input, in order of source; return how many there are."""
    url_of = {split.index: split.url for split in plan.splits}
    total = 0
    with temporary_file() as temp:
        with pq.ParquetWriter(temp, QUARANTINE, compression="zstd") as writer:
            for s in staged:
                for name, _ in s.rejected:
                    with staging.open(name) as handle:
                        table = pq.read_table(handle).cast(QUARANTINE)
                    writer.write_table(table)
                    total += len(table)
                for name, _ in s.chunks:
                    if name in dropped:
                        table = _duplicate_rows(staging, name, dropped[name], url_of[s.split])
                        writer.write_table(table)
                        total += len(table)
        target.put_file("quarantine.parquet", temp)
    return total


def _duplicate_rows(staging: Store, chunk: str, dropped: Array, source: str) -> pa.Table:
    with staging.open(chunk) as handle:
        rows = pq.read_table(handle, columns=["id", "text", "position"]).take(dropped).to_pylist()
    reject = {"source": source, "reason": "duplicate_id"}
    return pa.Table.from_pylist(
        [
            {
                **reject,
                "position": r["position"],
                "detail": f"id {r['id']!r} occurred before",
                "snippet": r["text"][:200],
            }
            for r in rows
        ],
        schema=QUARANTINE,
    )


def publish_snapshot(
    root: str,
    plan: IngestPlan,
    resolved: Resolved,
    parts: Sequence[Receipt],
    num_quarantined: int,
    reasons: dict[str, int],
) -> dict[str, Any]:
    """Write the snapshot's manifest, last, then the pointer from these inputs to it; return the manifest."""
    corpus = corpus_store(root, plan.config.name)
    content = {
        "snapshot": resolved.snapshot,
        "corpus": plan.config.name,
        "num_rows": resolved.num_rows,
        "num_quarantined": num_quarantined,
        "quarantine_reasons": reasons,
        "part_size": plan.part_size,
        "parts": [replace(r, reused=False).as_entry() for r in parts],
        "config": plan.config.model_dump(),
        **({"images": True} if resolved.has_images else {}),
    }
    manifest = write_manifest(corpus.child(resolved.snapshot), "snapshot", content)
    corpus.child("inputs").put(f"{plan.inputs}.json", json.dumps({"snapshot": resolved.snapshot}).encode())
    return manifest


def find_snapshot(root: str, plan: IngestPlan) -> dict[str, Any] | None:
    """Return the manifest of the snapshot that these very inputs gave before, if it is complete."""
    corpus = corpus_store(root, plan.config.name)
    pointer = corpus.child("inputs")
    if not pointer.exists(f"{plan.inputs}.json"):
        return None
    snapshot = str(json.loads(pointer.read(f"{plan.inputs}.json"))["snapshot"])
    return find_finished(corpus.child(snapshot), "snapshot", staging_store(root, plan))


def read_part(store: Store, entry: dict[str, Any], *, images: bool = False) -> pa.Table:
    """Return the passages of the part that manifest `entry` names, with their metadata if they carry any.

    The images' bytes come only when `images` asks for them.
    Raises ArtifactError when it is damaged.
    """
    from pipelines.storage import damaged

    data = store.read(entry["name"])
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise damaged(store.path(entry["name"]), found, entry["sha256"])
    file = pq.ParquetFile(pa.BufferReader(data))
    return file.read([name for name in file.schema_arrow.names if images or name != "image"])


def schema_of(snapshot: dict[str, Any]) -> pa.Schema:
    """Return the schema of the passages of a version over this snapshot, by its manifest: metadata, but no images."""
    metadata = snapshot.get("config", {}).get("metadata", [])
    return passage_schema(metadata_fields(MetadataConfig(**field) for field in metadata))
