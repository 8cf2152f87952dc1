"""Do a shard's index, passages and ids belong together? What `verify` looks at inside the files of one shard."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines import corpus
from pipelines.build import TRAINED, id_digests
from pipelines.errors import ArtifactError
from pipelines.index.build import read
from pipelines.index.identity import describe, is_mergeable, quantizer_digest
from pipelines.index.search import check_params
from pipelines.index.structure import ivf_of
from pipelines.index.tiers import vectors_name, with_vectors
from pipelines.publish import index_store
from pipelines.schema import METADATA, PASSAGE
from pipelines.storage import Store
from pipelines.verify import FAULTS, REBUILD, Finding

Array = npt.NDArray[Any]
Fault = tuple[str, object, object]  # what, expected, found


def check_shard(number: int, root: str, manifest: dict[str, Any], bad: frozenset[str]) -> list[Finding]:
    """Check a shard's FAISS file: rows, width, metric, search parameters, its row ids, and the version's quantizer.

    bad: names of the files whose checksum does not hold; they are not opened.
    """
    name = f"shard-{number:03d}.faiss"
    if unread := bad & {name, vectors_name(number), TRAINED}:
        return [_not_opened("shards", name, unread)]
    where = _store(root, manifest).path(name)
    try:
        index = read(local_path(root, manifest, name), mmap=True)
        trained = read(local_path(root, manifest, TRAINED), mmap=True)
        searched = with_vectors(index, number, manifest["files"], partial(local_path, root, manifest))
        check_params(searched, manifest["search_params"])
        wrong = [fault for fault in _shard_faults(index, trained, manifest, name) if fault[1] != fault[2]]
    except FAULTS as error:
        return [Finding.of("shards", error)]
    told = f"{index.ntotal:,} rows of width {index.d}, {describe(index)}"
    return _findings("shards", name, where, wrong, told)


def _shard_faults(index: Any, trained: Any, manifest: dict[str, Any], name: str) -> Iterator[Fault]:
    import faiss

    entry = manifest["files"][name]
    metric = {faiss.METRIC_INNER_PRODUCT: "ip", faiss.METRIC_L2: "l2"}.get(index.metric_type, str(index.metric_type))
    yield "number of rows", entry["num_rows"], index.ntotal
    yield "width", manifest["dim"], index.d
    yield "metric", manifest["metric"], metric
    yield "type", describe(trained), describe(index)
    yield "recorded quantizer", manifest["files"][TRAINED].get("quantizer"), entry.get("quantizer")
    if is_mergeable(index) and is_mergeable(trained):  # a graph's training is not apart from its rows
        yield "quantizer", quantizer_digest(trained), quantizer_digest(index)
    rows_N = stored_rows(index)
    wanted_N = np.arange(entry["first_row"], entry["first_row"] + entry["num_rows"])
    if not np.array_equal(np.sort(rows_N), wanted_N):
        strange = np.setdiff1d(rows_N, wanted_N)
        told = f"{len(strange)} others, such as {strange[:3].tolist()}" if len(strange) else "some twice, or too few"
        yield "row ids", f"{entry['first_row']} to {entry['first_row'] + entry['num_rows'] - 1}, each once", told


def stored_rows(index: Any) -> npt.NDArray[np.int64]:
    """Return (N,) int64: the row of every vector that `index` holds, in its own order.

    Raises ArtifactError when it keeps no rows, as an index without an id map would.
    """
    import faiss

    ivf = ivf_of(index)
    if ivf is None and not isinstance(index, faiss.IndexIDMap):
        raise ArtifactError("the index keeps no row ids", where=describe(index), expected="an id map", hint=REBUILD)
    if ivf is None:
        size = index.id_map.size()
        return np.array(faiss.rev_swig_ptr(index.id_map.data(), size), np.int64) if size else np.zeros(0, np.int64)
    lists = ivf.invlists
    sizes = [(n, lists.list_size(n)) for n in range(lists.nlist)]
    pieces = [np.array(faiss.rev_swig_ptr(lists.get_ids(n), size), np.int64) for n, size in sizes if size]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def check_passages(
    number: int, root: str, manifest: dict[str, Any], bad: frozenset[str], snapshot: dict[str, Any] | None
) -> list[Finding]:
    """Check a shard's passages and the lookup of their ids, against each other and against the snapshot if there."""
    names = f"passages-{number:03d}.arrow", f"ids-{number:03d}.arrow"
    if unread := bad & set(names):
        return [_not_opened("passages", names[0], unread)]
    where = _store(root, manifest).path(names[0])
    try:
        passages, lookup = (open_table(root, manifest, name) for name in names)
        schema = _passage_schema(passages, snapshot)
        faults = _passage_faults(passages, lookup, schema, manifest["files"][names[0]])
        wrong = [fault for fault in faults if fault[1] != fault[2]]
        findings = _findings(
            "passages", names[0], where, wrong, f"{len(passages):,} passages, each id leads to its row"
        )
        if snapshot is None or wrong:
            return findings
        store = corpus.corpus_store(root, manifest["corpus"]).child(manifest["snapshot"])
        first_row = manifest["files"][names[0]]["first_row"]
        differ = list(_unlike_snapshot(passages, first_row, store, snapshot["parts"]))
        return findings + _findings("snapshot", names[0], where, differ, "passages as in the snapshot")
    except FAULTS as error:
        return [Finding.of("passages", error)]


def _passage_schema(passages: pa.Table, snapshot: dict[str, Any] | None) -> pa.Schema:
    """Return the schema that a version's passages have to have; without the snapshot, any metadata is right."""
    if snapshot is not None:
        return corpus.schema_of(snapshot)
    return pa.schema([*PASSAGE, *(field for field in passages.schema if field.name == METADATA)])


def _passage_faults(passages: pa.Table, lookup: pa.Table, schema: pa.Schema, entry: dict[str, Any]) -> Iterator[Fault]:
    yield "schema", str(schema), str(passages.schema)
    yield "number of rows", entry["num_rows"], len(passages)
    yield "number of ids", entry["num_rows"], len(lookup)
    if passages.schema == schema and len(lookup) == len(passages):
        digest_N = np.concatenate([id_digests(c.to_pylist()) for c in passages.column("id").chunks] or [np.zeros(0)])
        order_N = np.argsort(digest_N, kind="stable")
        right = np.array_equal(lookup.column("id_digest").to_numpy(), digest_N[order_N]) and np.array_equal(
            lookup.column("row").to_numpy(), order_N + entry["first_row"]
        )
        yield (
            "lookup of ids",
            "every id leads to its row",
            "every id leads to its row" if right else "other ids or rows",
        )


def _unlike_snapshot(passages: pa.Table, first_row: int, store: Store, parts: list[dict[str, Any]]) -> Iterator[Fault]:
    """Yield for each part of the snapshot the first passage of the shard that is not the snapshot's, a column each."""
    for part in parts:
        start = max(part["first_row"], first_row)
        stop = min(part["first_row"] + part["num_rows"], first_row + len(passages))
        if start >= stop:
            continue
        wanted = corpus.read_part(store, part).slice(start - part["first_row"], stop - start).cast(passages.schema)
        found = passages.slice(start - first_row, stop - start)
        for column in passages.schema.names:
            if not found.column(column).equals(wanted.column(column)):
                pairs = zip(found.column(column).to_pylist(), wanted.column(column).to_pylist(), strict=True)
                row, mine, theirs = next((start + i, a, b) for i, (a, b) in enumerate(pairs) if a != b)
                yield f"{column} of row {row}", _short(theirs), _short(mine)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


def _findings(check: str, name: str, where: str, wrong: list[Fault], told: str) -> list[Finding]:
    return [
        Finding(check, "failed", f"the {what} of {name} is wrong", where, str(expected), str(found), REBUILD)
        for what, expected, found in wrong
    ] or [Finding(check, "ok", f"{name}: {told}", where)]


def _not_opened(check: str, name: str, unread: frozenset[str] | set[str]) -> Finding:
    why = f"the inside of {name} is skipped, because {', '.join(sorted(unread))} is not the published file"
    return Finding(check, "skipped", why)


# Opening files whose checksum holds


def _store(root: str, manifest: dict[str, Any]) -> Store:
    return index_store(root, manifest["name"]).child(manifest["version"])


def local_path(root: str, manifest: dict[str, Any], name: str) -> str:
    """Return a local path of a file whose checksum has been compared already: hashing it again is left out."""
    store = _store(root, manifest)
    return store.path(name) if store.is_local else store.local(name, manifest["files"][name]["sha256"])


def open_table(root: str, manifest: dict[str, Any], name: str) -> pa.Table:
    """Return the memory-mapped Arrow table of a file of the version. Raises ArtifactError when it does not open."""
    try:
        return pa.ipc.open_file(pa.memory_map(local_path(root, manifest, name))).read_all()
    except (pa.ArrowException, OSError) as error:
        where = _store(root, manifest).path(name)
        raise ArtifactError(f"not an Arrow file: {error}", where=where, hint=REBUILD) from error
