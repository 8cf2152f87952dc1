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
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import CorpusConfig
from pipelines.errors import InputError
from pipelines.manifest import Receipt, find_done, find_finished, fingerprint, put_done, write_manifest
from pipelines.readers import ReadOptions, Reject, Row, Split, SplitReader, file_version, plan_splits
from pipelines.schema import FORMAT_VERSION, IMAGE_PASSAGE, PASSAGE, QUARANTINE
from pipelines.storage import Store, temporary_file

Array = npt.NDArray[Any]

_CHUNK_BYTES = 32 << 20
_CHUNK_ROWS = 16_384
_ROWS_AT_ONCE = 1 << 23  # ids compared at once while looking for duplicates: bounds memory at about 400 MB
_IMAGES_IN_PART = 1024  # at most: a part is held in memory, and an image is a hundred times a passage
_WITHIN = [("position", pa.int64()), ("id_digest", pa.binary(16)), ("row_digest", pa.binary(16))]
_STAGED, _STAGED_IMAGES = pa.schema([*PASSAGE, *_WITHIN]), pa.schema([*IMAGE_PASSAGE, *_WITHIN])


@dataclass(frozen=True)
class IngestPlan:
    """What one ingest reads: its splits, and the fingerprint of its inputs (files, their versions and options)."""

    config: CorpusConfig
    splits: list[Split]
    inputs: str

    @property
    def has_images(self) -> bool:
        return any(split.format == "images" for split in self.splits)

    @property
    def part_size(self) -> int:
        """Rows of a part: as the config says, but of images no more than fit in memory."""
        return min(self.config.part_size, _IMAGES_IN_PART) if self.has_images else self.config.part_size


@dataclass(frozen=True)
class Staged:
    """The outcome of staging one split: its chunks (name, rows) in order, and what was refused."""

    split: int
    first: int
    end: int
    chunks: list[tuple[str, int]]
    rejected: list[tuple[str, int]]
    num_rows: int
    num_rejected: int
    reasons: dict[str, int]
    reused: bool = False


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
    has_images: bool = False


def plan_ingest(config: CorpusConfig) -> IngestPlan:
    """List and check the inputs and cut them into splits. Raises InputError for missing files and wrong columns."""
    options = read_options(config)
    if config.format == "pydocs":
        from pipelines.pydocs import installed_packages

        packages = installed_packages(config.sources)
        splits = [Split(i, package.name, "pydocs", 0, -1) for i, package in enumerate(packages)]
        versions = [[package.name, package.version] for package in packages]
    else:
        splits = plan_splits(config.sources, options)
        listed = [pair for split in splits for pair in split.versions()]
        versions = listed or [[url, file_version(url)] for url in dict.fromkeys(split.url for split in splits)]
    settings = config.model_dump(exclude={"name", "sources", "max_quarantined_share"})
    return IngestPlan(config, splits, fingerprint([FORMAT_VERSION, versions, settings]))


def read_options(config: CorpusConfig) -> ReadOptions:
    columns = {str(key): value for key, value in config.columns.items()}
    return ReadOptions(
        format=config.format, columns=columns, max_row_bytes=config.max_row_bytes, split_bytes=config.split_bytes
    )


def corpus_store(root: str, name: str) -> Store:
    return Store(root).child("corpora", name)


def staging_store(root: str, plan: IngestPlan) -> Store:
    return corpus_store(root, plan.config.name).child(f".staging-{plan.inputs}")


# Stage


def stage_split(store: Store, plan: IngestPlan, split: Split, start_at: int | None = None) -> Staged:
    """Read one split into chunk files of the staging `store`; return at once when that was already done and is whole.

    start_at: the byte where the split's first record is known to begin, once a guess turned out wrong.
    """
    record = f"split-{split.index:06d}.json"
    made_from = fingerprint([plan.inputs, asdict(split), start_at])
    if done := _staged_before(store, record, made_from):
        return done
    writer = _ChunkWriter(store, split)
    first, end = split.start, split.start
    if split.format == "pydocs":
        _read_package_docs(split.url, writer)
    else:
        reader = SplitReader(split, read_options(plan.config), start_at)
        for item in reader:
            writer.add(split.url, item)
        first, end = reader.first, reader.end
    writer.close()
    staged = Staged(
        split.index, first, end, writer.chunks, writer.rejected, writer.num_rows, writer.num_rejected, writer.reasons
    )
    content = {"made_from": made_from, "sizes": writer.sizes, "staged": asdict(staged)}
    store.put(record, json.dumps(content).encode())
    return staged


def _staged_before(store: Store, record: str, made_from: str) -> Staged | None:
    if not store.exists(record):
        return None
    try:
        content = json.loads(store.read(record))
        staged = content["staged"]
        same = content["made_from"] == made_from
        whole = all(store.exists(name) and store.size(name) == size for name, size in content["sizes"].items())
    except (ValueError, KeyError, TypeError):
        return None
    if not (same and whole):
        return None
    chunks, rejected = ([(name, rows) for name, rows in staged[key]] for key in ("chunks", "rejected"))
    return Staged(**{**staged, "chunks": chunks, "rejected": rejected, "reused": True})


class _ChunkWriter:
    """Collect a split's rows into chunk files of bounded size, with the digests that resolving needs."""

    def __init__(self, store: Store, split: Split) -> None:
        self.store, self.split = store, split.index
        self.schema = _STAGED_IMAGES if split.format == "images" else _STAGED
        self.chunks: list[tuple[str, int]] = []
        self.rejected: list[tuple[str, int]] = []
        self.sizes: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        self.num_rows = self.num_rejected = 0
        self._rows: list[Row] = []
        self._bytes = 0
        self._rejects: list[dict[str, Any]] = []

    def add(self, source: str, item: Row | Reject) -> None:
        if isinstance(item, Row):
            self._add_row(item)
        else:
            self._add_reject(source, item)

    def _add_row(self, row: Row) -> None:
        self._rows.append(row)
        self._bytes += len(row.text) + len(row.title) + len(row.image or b"")
        if len(self._rows) >= _CHUNK_ROWS or self._bytes >= _CHUNK_BYTES:
            self._flush_rows()

    def _add_reject(self, source: str, item: Reject) -> None:
        self._rejects.append({**asdict(item), "source": item.source or source})
        self.reasons[item.reason] = self.reasons.get(item.reason, 0) + 1
        if len(self._rejects) >= _CHUNK_ROWS:
            self._flush_rejects()

    def close(self) -> None:
        if self._rows:
            self._flush_rows()
        if self._rejects:
            self._flush_rejects()

    def _flush_rows(self) -> None:
        rows, self._rows, self._bytes = self._rows, [], 0
        fields = ("id", "title", "text", "answers", *(["image"] if "image" in self.schema.names else []), "position")
        columns: list[list[Any]] = [[getattr(row, field) for row in rows] for field in fields]
        columns += [[_digest(row.id) for row in rows], [_row_digest(row) for row in rows]]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)]
        name = f"chunk-{self.split:06d}-{len(self.chunks):05d}.parquet"
        self.sizes[name] = _put_table(self.store, name, pa.table(arrays, schema=self.schema))
        self.chunks.append((name, len(rows)))
        self.num_rows += len(rows)

    def _flush_rejects(self) -> None:
        rejects, self._rejects = self._rejects, []
        name = f"rejected-{self.split:06d}-{len(self.rejected):05d}.parquet"
        self.sizes[name] = _put_table(self.store, name, pa.Table.from_pylist(rejects, schema=QUARANTINE))
        self.rejected.append((name, len(rejects)))
        self.num_rejected += len(rejects)


def _read_package_docs(package: str, writer: _ChunkWriter) -> None:
    from pipelines.pydocs import SkippedFile, installed_packages, read_package

    skipped: list[SkippedFile] = []
    for position, row in enumerate(read_package(installed_packages([package])[0], skipped)):
        writer.add(package, Row(position, row["id"], row["title"], row["text"], None))
    for file in skipped:
        writer.add(file.source, Reject(0, file.reason, file.detail, ""))


def _row_digest(row: Row) -> bytes:
    pieces: list[str | bytes] = [row.id, row.title, row.text]
    if row.answers is not None:
        pieces += ["\0answers", *row.answers]
    if row.image is not None:
        pieces += ["\0image", row.image]
    return _digest(*pieces)


def _digest(*pieces: str | bytes) -> bytes:
    """Return 16 bytes of BLAKE2b over the length-prefixed pieces."""
    encoded = [p if isinstance(p, bytes) else p.encode() for p in pieces]
    return hashlib.blake2b(b"".join(len(e).to_bytes(8, "big") + e for e in encoded), digest_size=16).digest()


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
    for name, _ in chunks:
        rows = _read_column(store, name, "row_digest")
        digest.update(np.delete(rows, dropped[name], axis=0).tobytes() if name in dropped else rows.tobytes())
    counts = [(name, n - len(dropped.get(name, ()))) for name, n in chunks]
    parts = list(_plan_parts(counts, plan.part_size))
    return Resolved(digest.hexdigest()[:16], num_staged - num_duplicates, parts, dropped, plan.has_images)


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
    schema = IMAGE_PASSAGE if resolved.has_images else PASSAGE
    tables = []
    for piece in resolved.parts[part]:
        with staging.open(piece.chunk) as handle:
            table = pq.read_table(handle, columns=schema.names)
        if (dropped := resolved.dropped.get(piece.chunk)) is not None:
            table = table.take(np.delete(np.arange(len(table)), dropped))
        tables.append(table.slice(piece.start, piece.stop - piece.start))
    table = pa.concat_tables(tables).combine_chunks().cast(schema)
    facts = {"num_rows": len(table), "first_row": part * sum(p.stop - p.start for p in resolved.parts[0])}
    return put_done(snapshot, name, _table_bytes(table), resolved.snapshot, facts)


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
    """Return the passages of the part that manifest `entry` names; the images' bytes only when `images` asks for them.

    Raises ArtifactError when it is damaged.
    """
    from pipelines.storage import damaged

    data = store.read(entry["name"])
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise damaged(store.path(entry["name"]), found, entry["sha256"])
    return pq.read_table(pa.BufferReader(data), columns=(IMAGE_PASSAGE if images else PASSAGE).names)


def _put_table(store: Store, name: str, table: pa.Table) -> int:
    data = _table_bytes(table)
    store.put(name, data)
    return len(data)


def _table_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    # A dictionary of images would be built for nothing: they are all different.
    dictionary = [name for name in table.column_names if name != "image"] if "image" in table.column_names else True
    pq.write_table(table, sink, compression="zstd", use_dictionary=dictionary, write_page_checksum=True)
    return bytes(sink.getvalue())
