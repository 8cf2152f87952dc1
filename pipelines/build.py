"""The steps between embeddings and a published version; each is one function that can run anywhere.

    train (its own file) -> add_group (many) -> merge_shard (one a shard) -> write_passages (one a shard)

A step looks first whether its file is already in place and whole, so running it again costs a checksum. A shard covers
a contiguous range of rows; types that can be merged are built in groups of rows and merged, the others (HNSW and so on)
are built a shard at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import corpus, embeddings
from pipelines.config import ONLY_AUTO, IndexConfig
from pipelines.errors import ArtifactError
from pipelines.index.build import add, add_whole, finish, read, write
from pipelines.index.merge import merge_files
from pipelines.index.spec import IndexSpec, Metric, new_index, parse_spec
from pipelines.index.tiers import check_refine
from pipelines.index.tune import Knob, knobs, refinement_knob
from pipelines.manifest import Receipt, ensure, find_done, fingerprint, put_done
from pipelines.schema import FORMAT_VERSION
from pipelines.storage import Store

Array = npt.NDArray[Any]
TRAINED = "trained.faiss"
RECALL_K = 10
_PASSAGES_IN_BATCH = 4096


@dataclass(frozen=True)
class Rows:
    """The rows `start:stop` of the snapshot."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its number, its rows, and the groups of rows it is built from."""

    number: int
    rows: Rows
    groups: tuple[Rows, ...]

    @property
    def name(self) -> str:
        return f"shard-{self.number:03d}.faiss"


def version_name(identity: list[Any], settings: dict[str, Any], *, tuned: bool) -> str:
    """Return the name of a version. tuned: whether its search parameters were found for the recall target.

    identity: format version, passage and query encoder's fingerprint, snapshot, metric, number of shards, and the order
    of rows where it matters. settings: its index config. A target that only admits or refuses leaves the version what
    it is; one that is tuned to decides it.
    """
    aside = {"name", *ONLY_AUTO} | (set() if tuned else {"min_recall", "recall_queries"})
    # Keys that versions made before them had no value for but this one.
    aside |= {key for key, usual in (("refine", "none"), ("train", "auto")) if settings.get(key) == usual}
    return fingerprint([*identity, {key: value for key, value in settings.items() if key not in aside}])


@dataclass(frozen=True)
class BuildPlan:
    """Everything a step needs: where things are, what is built, and the version it becomes."""

    root: str
    config: IndexConfig
    embeddings: dict[str, Any]
    snapshot: dict[str, Any]
    metric: Metric
    shards: tuple[ShardPlan, ...]
    num_threads: int
    tunable: tuple[Knob, ...] = ()
    """Search parameters to be found for the recall target; none where they are given, or nothing is to be found."""
    forecast: dict[str, Any] | None = None
    """What a pilot expects of the version."""
    gpus: float = 0
    """GPUs, or the share of one, of a process of k-means or exact search, where they are free. 0: on CPUs."""

    @property
    def version(self) -> str:
        """Return the version's name: a fingerprint of all that determines its files and its search parameters."""
        encoder = self.embeddings["encoder"]
        identity = [encoder["fingerprint"], encoder["query_fingerprint"], self.embeddings["snapshot"]]
        shape = [self.metric, len(self.shards), *filter(None, [self.order])]
        return version_name([FORMAT_VERSION, *identity, *shape], self.config.model_dump(), tuned=bool(self.tunable))

    @property
    def build(self) -> str:
        """Return a fingerprint of all that determines the trained index and the shards, however they are searched.

        Versions that differ in their recall target or search parameters alone share these files.
        """
        made_from = [self.embeddings["encoder"]["fingerprint"], self.embeddings["snapshot"], self.metric]
        cut = [(shard.rows.start, shard.rows.stop, len(shard.groups)) for shard in self.shards]
        settings = [getattr(self.config, key) for key in ("factory", "train", "train_rows", "seed")]
        settings += filter(None, [self.order])
        return fingerprint([FORMAT_VERSION, "build", *made_from, cut, *settings])

    @property
    def order(self) -> str:
        """Return "mixed" where rows are linked in an order drawn by chance, as the manifest then says; else nothing."""
        return "mixed" if self.spec.grows else ""

    @property
    def unfit_rows(self) -> list[int]:
        """Return the rows that could not be encoded: they lie in an index as zero vectors, and are never found."""
        return [guilty["row"] for guilty in self.embeddings.get("quarantined", [])]

    @property
    def dim(self) -> int:
        return int(self.embeddings["dim"])

    @property
    def num_rows(self) -> int:
        return int(self.embeddings["num_rows"])

    @property
    def spec(self) -> IndexSpec:
        return parse_spec(self.config.factory, self.dim, self.metric)

    @property
    def store(self) -> Store:
        return Store(self.root).child("indexes", self.config.name, self.version)

    @property
    def work(self) -> Store:
        """Return the folder of intermediate files, removed once the version is published."""
        return self.store.child("work")

    @property
    def vectors(self) -> Store:
        return Store(self.root).child(
            "embeddings", self.embeddings["snapshot"], self.embeddings["encoder"]["fingerprint"]
        )

    @property
    def passages(self) -> Store:
        return corpus.corpus_store(self.root, self.snapshot["corpus"]).child(self.snapshot["snapshot"])


def plan_build(
    root: str, config: IndexConfig, snapshot: dict[str, Any], embedded: dict[str, Any], num_threads: int
) -> BuildPlan:
    """Settle the metric and cut the rows into shards and groups. Raises ConfigError for an impossible factory."""
    metric: Metric = "ip" if config.metric == "auto" else config.metric
    num_rows = int(embedded["num_rows"])
    num_shards = config.num_shards or -(-num_rows // config.max_shard_rows)
    mergeable = parse_spec(config.factory, int(embedded["dim"]), metric).mergeable
    shards = []
    for number, rows in enumerate(_cut(Rows(0, num_rows), min(num_shards, num_rows))):
        num_groups = -(-len(rows) // config.group_rows) if mergeable else 1
        shards.append(ShardPlan(number, rows, tuple(_cut(rows, num_groups))))
    plan = BuildPlan(root, config, embedded, snapshot, metric, tuple(shards), num_threads)
    if config.refine == "exact":
        check_refine(new_index(plan.spec))
    if config.min_recall is None or config.search_params:
        return plan
    fewest, k = min(len(shard.rows) for shard in shards), min(RECALL_K, num_rows)
    found = knobs(new_index(plan.spec), fewest, k)
    refining = [refinement_knob(plan.dim, fewest, k)] if config.refine == "exact" else []
    return replace(plan, tunable=tuple(knob for knob in [*refining, *found] if knob.most > knob.least))


def row_groups(plan: BuildPlan) -> list[Rows]:
    """Cut all rows as the groups of a mergeable index are: for what needs no index, so that a graph's take part too."""
    return [group for shard in plan.shards for group in _cut(shard.rows, -(-len(shard.rows) // plan.config.group_rows))]


def _cut(rows: Rows, pieces: int) -> Iterator[Rows]:
    bounds = [rows.start + len(rows) * i // pieces for i in range(pieces + 1)]
    return (Rows(a, b) for a, b in pairwise(bounds))


def add_group(plan: BuildPlan, trained: Receipt, shard: ShardPlan, group: int, num_threads: int = 1) -> Receipt:
    """Add one group's rows to a copy of the trained index: the whole shard when it has one group only."""
    alone = len(shard.groups) == 1
    store = plan.store if alone else plan.work
    name = shard.name if alone else f"group-{shard.number:03d}-{group:04d}.faiss"
    made_from = shard_key(plan, trained, name)

    def make() -> Receipt:
        index = read(plan.store.local(TRAINED, trained.sha256))
        _add_rows(plan, index, shard.groups[group], num_threads)
        return put_index(plan, store, name, index, made_from, _shard_facts(shard.groups[group], trained))

    return ensure(store, name, made_from, make)


def _add_rows(plan: BuildPlan, index: Any, rows: Rows, num_threads: int) -> None:
    if plan.order:
        with plan.work.temporary() as temp:
            add_whole(index, iter_rows(plan, rows), temp, num_threads)
        return
    for vectors_ND, rows_N in iter_rows(plan, rows):
        add(index, vectors_ND, rows_N, num_threads)


def merge_shard(plan: BuildPlan, trained: Receipt, shard: ShardPlan, groups: list[Receipt]) -> Receipt:
    """Merge a shard's groups in row order, from file to file."""
    if len(shard.groups) == 1:
        return groups[0]
    made_from = shard_key(plan, trained, shard.name)

    def make() -> Receipt:
        empty = read(plan.store.local(TRAINED, trained.sha256))
        pieces = [plan.work.local(receipt.name, receipt.sha256) for receipt in groups]
        with plan.work.temporary() as temp:
            num_rows = merge_files(empty, pieces, temp)
            facts = _shard_facts(shard.rows, trained)
            _check_rows(plan.store, shard.name, num_rows, facts)
            return put_done(plan.store, shard.name, temp, made_from, facts)

    return ensure(plan.store, shard.name, made_from, make)


def shard_key(plan: BuildPlan, trained: Receipt, name: str) -> str:
    """Return the fingerprint of all that a shard, or a group of it, is made from."""
    return fingerprint([plan.build, trained.sha256, name])


def passages_names(shard: ShardPlan) -> tuple[str, str]:
    """Return the names of a shard's passages and of the lookup of their ids."""
    return f"passages-{shard.number:03d}.arrow", f"ids-{shard.number:03d}.arrow"


def passages_key(plan: BuildPlan, shard: ShardPlan) -> str:
    """Return the fingerprint of all that a shard's passages and ids are made from: no index has a part in them."""
    return fingerprint([FORMAT_VERSION, plan.snapshot["snapshot"], shard.rows.start, shard.rows.stop])


def find_shard(plan: BuildPlan, trained: Receipt, shard: ShardPlan) -> Receipt | None:
    """Return the receipt of a shard that is in place and whole (its groups may be gone by then)."""
    return find_done(plan.store, shard.name, shard_key(plan, trained, shard.name))


def drop_groups(plan: BuildPlan, shard: ShardPlan, groups: list[Receipt]) -> None:
    """Remove a merged shard's groups, so that disk use stays near the size of the index."""
    if len(shard.groups) > 1:
        for receipt in groups:
            plan.work.remove(receipt.name)


def write_passages(plan: BuildPlan, shard: ShardPlan) -> list[Receipt]:
    """Write the shard's passages in row order (memory-mappable Arrow) and its sorted id digests."""
    passages, ids = passages_names(shard)
    made_from = passages_key(plan, shard)
    facts = {"num_rows": len(shard.rows), "first_row": shard.rows.start}
    digests: list[Array] = []

    def make_passages() -> Receipt:
        with plan.work.temporary() as temp:
            with pa.OSFile(temp, "wb") as sink, pa.ipc.new_file(sink, corpus.schema_of(plan.snapshot)) as writer:
                for table in _passage_tables(plan, shard.rows):
                    digests.append(id_digests(table["id"].to_pylist()))
                    writer.write_table(table, max_chunksize=_PASSAGES_IN_BATCH)
            return put_done(plan.store, passages, temp, made_from, facts)

    def make_ids() -> Receipt:
        found = digests or [id_digests(t["id"].to_pylist()) for t in _passage_tables(plan, shard.rows)]
        digest = np.concatenate(found)
        order = np.argsort(digest, kind="stable")
        table = pa.table({"id_digest": digest[order], "row": order + shard.rows.start})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return put_done(plan.store, ids, bytes(sink.getvalue()), made_from, facts)

    return [ensure(plan.store, passages, made_from, make_passages), ensure(plan.store, ids, made_from, make_ids)]


def id_digests(ids: list[str]) -> Array:
    """Return (N,) uint64: 8 bytes of BLAKE2b of each id, the key of the id lookup."""
    joined = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(joined, np.uint64)


def iter_rows(plan: BuildPlan, rows: Rows) -> Iterator[tuple[Array, Array]]:
    """Yield (vectors (N, D) in their storage type, rows (N,) int64) of `rows`, part by part."""
    for entry in plan.embeddings["parts"]:
        first, last = entry["first_row"], entry["first_row"] + entry["num_rows"]
        if first < rows.stop and rows.start < last:
            for vectors_ND, rows_N in embeddings.iter_blocks(plan.vectors, [entry], plan.dim):
                inside = slice(max(0, rows.start - first), min(last, rows.stop) - first)
                yield vectors_ND[inside], rows_N[inside]


def _passage_tables(plan: BuildPlan, rows: Rows) -> Iterator[pa.Table]:
    schema = corpus.schema_of(plan.snapshot)
    for entry in plan.snapshot["parts"]:
        first, last = entry["first_row"], entry["first_row"] + entry["num_rows"]
        if first < rows.stop and rows.start < last:
            table = corpus.read_part(plan.passages, entry)
            start = max(0, rows.start - first)
            yield table.slice(start, min(last, rows.stop) - first - start).cast(schema)


def _shard_facts(rows: Rows, trained: Receipt) -> dict[str, Any]:
    return {"num_rows": len(rows), "first_row": rows.start, "quantizer": trained.facts["quantizer"]}


def put_index(plan: BuildPlan, store: Store, name: str, index: Any, made_from: str, facts: dict[str, Any]) -> Receipt:
    """Write an index and put it in place. Raises ArtifactError unless it holds the rows that `facts` tell of."""
    finish(index)
    _check_rows(store, name, index.ntotal, facts)
    with plan.work.temporary() as temp:  # there, so that what a killed writer leaves goes with the work folder
        write(index, temp)
        return put_done(store, name, temp, made_from, facts)


def _check_rows(store: Store, name: str, num_rows: int, facts: dict[str, Any]) -> None:
    if facts.get("num_rows", num_rows) != num_rows:
        raise ArtifactError(
            f"{name} holds {num_rows} vectors",
            where=store.path(name),
            expected=str(facts["num_rows"]),
            hint="an embedding part and its manifest disagree: run `pinakes encode` again",
        )
