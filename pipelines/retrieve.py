"""query -> encode -> search -> passages -> hits: the online path as one function.

A query is only ever encoded by the encoder bound to the version it searches.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.build import id_digests
from pipelines.encode import Encoder, EncoderSpec
from pipelines.errors import ArtifactError, ConfigError
from pipelines.filters import Filter, fields_of, mask, parse_filter
from pipelines.index.among import Selection, Selections, search_among, select
from pipelines.index.build import read
from pipelines.index.on_gpu import VectorsOnGpu
from pipelines.index.search import merge_topk, search
from pipelines.index.tiers import with_vectors
from pipelines.publish import index_store, read_version
from pipelines.schema import Hit, Passage
from pipelines.storage import Store

Array = npt.NDArray[Any]

_selections = Selections(256 << 20)  # of all shards in this process: a bit for every row of a shard, for each filter


class ShardSearch(Protocol):
    """One shard, here or on another machine."""

    def search(self, queries_BD: Array, k: int, where: Filter | None = None) -> tuple[Array, Array]:
        """Return (score_BK float32, row_BK int64), best first; row -1 where there are fewer than k.

        where: of the passages that satisfy it alone.
        """
        ...


class LocalShard:
    """A shard memory-mapped in this process.

    num_threads: what one search takes (1: many searches run beside each other). device: where its vectors are kept and
    all searched, exactly (torch's name, such as "cuda"); without it, and for the passages that satisfy a filter, the
    index is searched. Rows that could not be encoded lie in the index as zero vectors, and are never found.
    """

    def __init__(
        self, root: str, manifest: dict[str, Any], number: int, num_threads: int = 1, device: str | None = None
    ) -> None:
        name = f"shard-{number:03d}.faiss"
        store = index_store(root, manifest["name"]).child(manifest["version"])
        entry = _file_entry(manifest, name)
        codes, files = read(store.local(name, entry["sha256"]), mmap=True), manifest["files"]
        self.index = with_vectors(codes, number, files, lambda name: store.local(name, files[name]["sha256"]))
        self.params, self.num_threads = manifest["search_params"], num_threads
        first, stop = entry.get("first_row", 0), entry.get("first_row", 0) + entry["num_rows"]
        self.unfit = np.array([r for r in manifest.get("quarantined", []) if first <= r < stop], np.int64)
        self.first_row, self._key = first, (store.path(name), entry["sha256"])
        self._open_passages = lambda: _open_table(store, manifest, f"passages-{number:03d}.arrow")
        if (self.index.ntotal, self.index.d) != (entry["num_rows"], manifest["dim"]):
            raise ArtifactError(
                f"the shard holds {self.index.ntotal} vectors of width {self.index.d}",
                where=store.path(name),
                expected=f"{entry['num_rows']} of width {manifest['dim']}",
                hint="rebuild the version",
            )
        self._vectors = VectorsOnGpu(self.index, device) if device else None

    def search(self, queries_BD: Array, k: int, where: Filter | None = None) -> tuple[Array, Array]:
        if where is not None:
            return search_among(self.index, self.select(where), queries_BD, k, self.params, self.num_threads)

        def find(depth: int) -> tuple[Array, Array]:
            if self._vectors:
                return self._vectors.search(queries_BD, depth)
            return search(self.index, queries_BD, depth, self.params, self.num_threads)

        return find(k) if not len(self.unfit) else search_without(self.unfit, find, k, self.index.ntotal)

    def select(self, where: Filter) -> Selection:
        """Return which vectors belong to passages that satisfy the filter; kept for the next search by the same one."""

        def make() -> Selection:
            fits_N = mask(where, self._open_passages())
            fits_N[self.unfit - self.first_row] = False
            return select(self.index, fits_N, self.first_row)

        return _selections.get((*self._key, where.digest), make)


def search_without(
    unfit_U: Array, find: Callable[[int], tuple[Array, Array]], k: int, num_rows: int
) -> tuple[Array, Array]:
    """Return what `find(k)` would, were the rows `unfit_U` not in the index: by asking for more until enough are left.

    Works for every type of index, also those that take no selector.
    """
    depth = min(k + min(len(unfit_U), k), num_rows)
    while True:
        score_BK, row_BK = find(depth)
        fit_BK = ~np.isin(row_BK, unfit_U)
        # A query that got a -1 has seen all that this search can reach.
        short_B = ((fit_BK & (row_BK >= 0)).sum(axis=1) < k) & (row_BK >= 0).all(axis=1)
        if depth >= num_rows or not short_B.any():
            return merge_topk([(score_BK, np.where(fit_BK, row_BK, -1))], k)
        depth = min(2 * depth, num_rows)


class Passages:
    """The passages of a version, memory-mapped; rows and ids are looked up without reading the rest."""

    def __init__(self, root: str, manifest: dict[str, Any]) -> None:
        store = index_store(root, manifest["name"]).child(manifest["version"])
        self.tables: list[pa.Table] = []
        self.ids: list[tuple[Array, Array]] = []
        self.first_rows: list[int] = []
        for number in range(manifest["num_shards"]):
            for name in (f"passages-{number:03d}.arrow", f"ids-{number:03d}.arrow"):
                table, entry = _open_table(store, manifest, name), _file_entry(manifest, name)
                if name.startswith("passages"):
                    self.tables.append(table)
                    self.first_rows.append(entry["first_row"])
                else:
                    self.ids.append((_column(table, "id_digest"), _column(table, "row")))
        self._columns = [[(name, table.column(name)) for name in table.column_names] for table in self.tables]

    def __len__(self) -> int:
        return sum(len(t) for t in self.tables)

    @property
    def fields(self) -> dict[str, str]:
        """Return the metadata that the passages carry: the name of each field and its type."""
        return fields_of(self.tables[0].schema)

    def by_row(self, row: int) -> Passage:
        """Return the passage of one row. Raises ConfigError when the row does not exist."""
        shard = bisect_right(self.first_rows, row) - 1
        local = row - self.first_rows[shard] if shard >= 0 else -1
        if not 0 <= local < len(self.tables[shard]):
            raise ConfigError(f"there is no row {row}", expected=f"0 to {len(self) - 1}")
        # A third of the time that a slice of the table takes, and this is done for every hit of every query.
        return Passage(**{name: column[local].as_py() for name, column in self._columns[shard]})

    def hits(self, score_BK: Array, row_BK: Array) -> list[list[Hit]]:
        """Return the hits behind scores and rows; padding (row -1) is left out."""
        passage_of = {row: self.by_row(row) for row in set(row_BK.ravel().tolist()) if row >= 0}
        return [
            [Hit(r, s, passage_of[r]) for s, r in zip(scores, rows, strict=True) if r >= 0]
            for scores, rows in zip(score_BK.tolist(), row_BK.tolist(), strict=True)
        ]

    def row_of(self, passage_id: str) -> int | None:
        """Return the row of the passage with this id, or None."""
        digest = id_digests([passage_id])[0]
        for digests, rows in self.ids:
            at = int(np.searchsorted(digests, digest))
            while at < len(digests) and digests[at] == digest:
                if self.by_row(int(rows[at])).id == passage_id:
                    return int(rows[at])
                at += 1
        return None


class Retriever:
    """Search one version: its bound query encoder, its shards and its passages."""

    def __init__(
        self,
        root: str,
        manifest: dict[str, Any],
        shards: Sequence[ShardSearch] | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.manifest = manifest
        # The files first: a damaged one is found before seconds are spent on loading a model.
        alone = num_threads or 1 if manifest["num_shards"] == 1 else 1
        if shards is None:
            shards = [LocalShard(root, manifest, n, alone) for n in range(manifest["num_shards"])]
        self.shards = shards
        self.passages = Passages(root, manifest)
        self.spec = bound_encoder(manifest)
        self.encoder = Encoder(self.spec, "query", "cpu", num_threads)
        self._threads = ThreadPoolExecutor(max(1, len(self.shards)), thread_name_prefix="shard")

    @classmethod
    def open(cls, root: str, name: str, version: str | None = None) -> Retriever:
        """Open the version that alias `name` points to, or `version` of that index."""
        return cls(root, read_version(root, name, version))

    def search(self, queries: Sequence[str], k: int, where: Filter | None = None) -> list[list[Hit]]:
        """Return up to k hits for each query, best first, of the passages that satisfy `where`."""
        hits, _ = self.search_timed(queries, k, where)
        return hits

    def filter(self, content: Any) -> Filter | None:
        """Check a filter on the version's metadata; see `filters.parse_filter`. Raises ConfigError."""
        return None if content is None else parse_filter(content, self.passages.fields)

    def select(self, where: Filter) -> None:
        """Find out which passages of the shards here satisfy a filter, so that searches by it need not."""
        for shard in self.shards:
            if isinstance(shard, LocalShard):
                shard.select(where)

    def search_timed(
        self, queries: Sequence[str], k: int, where: Filter | None = None
    ) -> tuple[list[list[Hit]], dict[str, float]]:
        """Return the hits and the milliseconds that encode, search and fetch took."""
        clock = [time.perf_counter()]
        emb_BD = self.encoder.encode_queries(queries)
        clock.append(time.perf_counter())
        score_BK, row_BK = self.search_vectors(emb_BD, k, where)
        clock.append(time.perf_counter())
        hits = self.passages.hits(score_BK, row_BK)
        clock.append(time.perf_counter())
        spent = {
            name: (b - a) * 1000 for name, a, b in zip(("encode", "search", "fetch"), clock, clock[1:], strict=False)
        }
        return hits, spent

    def search_vectors(self, emb_BD: Array, k: int, where: Filter | None = None) -> tuple[Array, Array]:
        """Return (score_BK, row_BK) over all shards, searched in parallel and merged best first."""
        check_k(k, self.manifest)
        if len(self.shards) == 1:
            return self.shards[0].search(emb_BD, k, where)
        return merge_topk(list(self._threads.map(lambda shard: shard.search(emb_BD, k, where), self.shards)), k)


def check_k(k: int, manifest: dict[str, Any]) -> None:
    """Raise ConfigError when `k` asks for more hits than the version has passages, or for none."""
    if not 1 <= k <= manifest["num_rows"]:
        where = f"index {manifest['name']!r}, version {manifest['version']}"
        raise ConfigError(
            f"k is {k}, but the index holds {manifest['num_rows']} passages",
            where=where,
            expected=f"1 to {manifest['num_rows']}",
            hint="ask for fewer hits",
        )


def encoder_name(manifest: dict[str, Any]) -> str:
    """Return what callers are told of a version's encoder: its name on the hub, or that of its folder, not the path."""
    checkpoint = str(manifest["encoder"]["checkpoint"])
    is_place = checkpoint.startswith(("/", "~", ".")) or "://" in checkpoint
    return checkpoint.rstrip("/").rpartition("/")[2] if is_place else checkpoint


def bound_encoder(manifest: dict[str, Any]) -> EncoderSpec:
    """Return the encoder bound to a version."""
    names = EncoderSpec.__dataclass_fields__
    return EncoderSpec(**{k: v for k, v in manifest["encoder"].items() if k in names})


def check_encoder(manifest: dict[str, Any], spec: EncoderSpec) -> None:
    """Raise ArtifactError when `spec` is not the encoder bound to the version."""
    bound = manifest["encoder"]
    if (bound["fingerprint"], bound["query_fingerprint"]) != (spec.fingerprint, spec.query_fingerprint):
        raise ArtifactError(
            "the config's encoder is not the one that this version was built with",
            where=f"index {manifest['name']!r}, version {manifest['version']}",
            expected=f"{bound['checkpoint']} ({bound['dim']}-d, {bound['fingerprint']}), "
            f"found {spec.checkpoint} ({spec.dim}-d, {spec.fingerprint})",
            hint="use the config it was built with, or run `pinakes run` to build a version for this encoder",
        )


def _file_entry(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = manifest["files"][name]
    except KeyError:
        raise ArtifactError(
            f"the manifest does not list {name}", where=f"version {manifest['version']}", hint="rebuild the version"
        ) from None
    return entry


def _open_table(store: Store, manifest: dict[str, Any], name: str) -> pa.Table:
    path = store.local(name, _file_entry(manifest, name)["sha256"])
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def _column(table: pa.Table, name: str) -> Array:
    chunks = [c.to_numpy(zero_copy_only=True) for c in table.column(name).chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks) if chunks else np.zeros(0, np.int64)
