"""Plan an ingest and stage its splits: the input -> chunks of valid rows, and the refused ones, of each split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import CorpusConfig, MetadataConfig
from pipelines.manifest import fingerprint
from pipelines.readers import ReadOptions, Reject, Row, Split, SplitReader, file_version, plan_splits
from pipelines.schema import FORMAT_VERSION, QUARANTINE, MetadataField, passage_schema
from pipelines.storage import Store

_CHUNK_BYTES = 32 << 20
_CHUNK_ROWS = 16_384
_IMAGES_IN_PART = 1024  # at most: a part is held in memory, and an image is a hundred times a passage
_WITHIN = [("position", pa.int64()), ("id_digest", pa.binary(16)), ("row_digest", pa.binary(16))]


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

    @property
    def schema(self) -> pa.Schema:
        """Return the schema of the snapshot's parts."""
        return passage_schema(metadata_fields(self.config.metadata), images=self.has_images)


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
    aside = {"name", "sources", "max_quarantined_share", *(() if config.metadata else ("metadata",))}
    settings = config.model_dump(exclude=aside)
    return IngestPlan(config, splits, fingerprint([FORMAT_VERSION, versions, settings]))


def read_options(config: CorpusConfig) -> ReadOptions:
    columns = {str(key): value for key, value in config.columns.items()}
    return ReadOptions(
        format=config.format,
        columns=columns,
        max_row_bytes=config.max_row_bytes,
        split_bytes=config.split_bytes,
        metadata=metadata_fields(config.metadata),
    )


def metadata_fields(metadata: Iterable[MetadataConfig]) -> tuple[MetadataField, ...]:
    return tuple(MetadataField(field.name, field.type, field.column or field.name) for field in metadata)


def corpus_store(root: str, name: str) -> Store:
    return Store(root).child("corpora", name)


def staging_store(root: str, plan: IngestPlan) -> Store:
    return corpus_store(root, plan.config.name).child(f".staging-{plan.inputs}")


def stage_split(store: Store, plan: IngestPlan, split: Split, start_at: int | None = None) -> Staged:
    """Read one split into chunk files of the staging `store`; return at once when that was already done and is whole.

    start_at: the byte where the split's first record is known to begin, once a guess turned out wrong.
    """
    record = f"split-{split.index:06d}.json"
    made_from = fingerprint([plan.inputs, asdict(split), start_at])
    if done := _staged_before(store, record, made_from):
        return done
    writer = _ChunkWriter(store, split, plan.schema)
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

    def __init__(self, store: Store, split: Split, schema: pa.Schema) -> None:
        """schema: of the snapshot's parts, whose columns bear the names of a Row's."""
        self.store, self.split, self.columns = store, split.index, schema.names
        self.schema = pa.schema([*schema, *_WITHIN])
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
        columns: list[list[Any]] = [[getattr(row, name) for row in rows] for name in (*self.columns, "position")]
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
    if row.metadata is not None:
        pieces += ["\0metadata", json.dumps(row.metadata, sort_keys=True)]
    return _digest(*pieces)


def _digest(*pieces: str | bytes) -> bytes:
    """Return 16 bytes of BLAKE2b over the length-prefixed pieces."""
    encoded = [p if isinstance(p, bytes) else p.encode() for p in pieces]
    return hashlib.blake2b(b"".join(len(e).to_bytes(8, "big") + e for e in encoded), digest_size=16).digest()


def _put_table(store: Store, name: str, table: pa.Table) -> int:
    data = table_bytes(table)
    store.put(name, data)
    return len(data)


def table_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file: the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    # A dictionary of images would be built for nothing: they are all different.
    dictionary = [name for name in table.column_names if name != "image"] if "image" in table.column_names else True
    pq.write_table(table, sink, compression="zstd", use_dictionary=dictionary, write_page_checksum=True)
    return bytes(sink.getvalue())
