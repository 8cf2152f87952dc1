"""The verbs that run in this process, without a cluster: look at a root or a checkpoint, search, rerank, answer."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.progress import Progress
from pipelines import publish
from pipelines.answer import answer, load_reader
from pipelines.config import AnswerConfig, RerankConfig
from pipelines.errors import ArtifactError, ConfigError, InputError
from pipelines.manifest import MANIFEST, has_manifest, read_manifest
from pipelines.rerank import load_reranker, rerank
from pipelines.retrieve import Retriever, check_k
from pipelines.storage import Store

_SECONDS_BETWEEN_LINES = 5.0


def search(
    root: str,
    name: str | None,
    version: str | None,
    query: str,
    k: int,
    reranking: RerankConfig | None = None,
    answering: AnswerConfig | None = None,
    where: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Search one version in this process; rerank its hits and answer from them where asked.

    where: a filter on metadata, see `pipelines.filters`.
    """
    if not query.strip():
        raise InputError("the query is blank", expected="some text")
    manifest = publish.read_version(root, name or _only_alias(root), version)
    check_k(k, manifest)
    retriever = Retriever(root, manifest)
    depth = max(k, *(stage.depth for stage in (reranking, answering) if stage), 1)
    (hits,), took = retriever.search_timed([query], min(depth, manifest["num_rows"]), retriever.filter(where))
    given: dict[str, Any] = {}
    if reranking:
        with _timed(took, "rerank"):
            hits = rerank(load_reranker(reranking), query, hits, reranking.depth)
    if answering:
        with _timed(took, "answer"):
            reader = load_reader(answering.reader, answering.compute, "cpu", tokeniser=answering.tokeniser)
            found = answer(reader, query, hits, answering.depth)
        given["answers"] = [
            {"text": a.text, "score": a.score, "passage": hits[a.passage].passage.id if a.passage >= 0 else None}
            for a in found
        ]
    shown = [{"row": h.row, "score": h.score, "rerank_score": h.rerank_score, **h.passage.as_dict()} for h in hits[:k]]
    identity = {"query": query, "name": manifest["name"], "version": manifest["version"]}
    return {**identity, "took_ms": took, "hits": shown, **given}


def read_filter(text: str) -> dict[str, Any]:
    """Return the filter that the command was given. Raises ConfigError when it is no JSON object."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        what, hint = f"the filter is no JSON object: {text[:60]}", "quote all of it for the shell"
        raise ConfigError(what, where="--filter", expected='for example {"lang": "en"}', hint=hint)
    return content


def stages(
    reranker: str | None, reader: str | None, tokeniser: str | None
) -> tuple[RerankConfig | None, AnswerConfig | None]:
    """Return what `search` is asked to do behind retrieval, from its options."""
    if tokeniser and not reader:
        raise ConfigError("--tokeniser goes with --answer", expected="a reader that needs it")
    reranking = RerankConfig(checkpoint=reranker) if reranker else None
    return reranking, AnswerConfig(reader=reader, tokeniser=tokeniser) if reader else None


@contextmanager
def _timed(took: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    took[name] = (time.perf_counter() - started) * 1000


def models(released: bool, published: bool) -> dict[str, Any]:
    """Describe the model families; list released checkpoints and published figures where asked."""
    from dataclasses import asdict

    from pipelines.models import FAMILIES

    result: dict[str, Any] = {"families": {name: asdict(family) for name, family in FAMILIES.items()}}
    if released:
        from pipelines.models.released import rows

        result["released"] = [asdict(row) for row in rows()]
    if published:
        from pipelines import published as figures

        result["published"] = [row.name for row in figures.rows()]
    return result


def reproduce(name: str, inputs: list[str], limit: int | None, device: str, progress: Progress) -> dict[str, Any]:
    """Rerun a published figure on the user's own weights and data. inputs: KEY=PATH each."""
    from pipelines.published import find
    from pipelines.reproduce import reproduce as rerun

    row = find(name)
    given = dict(item.split("=", 1) for item in inputs if "=" in item)
    if wrong := [item for item in inputs if "=" not in item]:
        raise ConfigError(f"cannot read the input {wrong[0]!r}", expected="KEY=PATH, e.g. checkpoint=models/mine")
    if len(given) != len(inputs):
        raise ConfigError("an input is given twice", expected="each KEY once")
    return rerun(row, given, limit=limit, device=device, progress=_told(progress))


def _told(progress: Progress) -> Callable[[str, int], None]:
    """Return a function that says how far something is, every few seconds."""
    last = time.monotonic()

    def say(what: str, done: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            progress.say(f"{done:,} {what}")

    return say


def status(root: str) -> dict[str, Any]:
    """Describe what the root holds: finished folders from their manifests, unfinished ones as such."""
    store = Store(root)
    result: dict[str, Any] = {"root": root, "snapshots": [], "embeddings": [], "versions": [], "aliases": []}
    for corpus in store.child("corpora").folders():
        for name in store.child("corpora", corpus).folders():
            if name != "inputs":
                result["snapshots"].append(
                    _state(store.child("corpora", corpus, name), "snapshot", corpus=corpus, snapshot=name)
                )
    for snapshot in store.child("embeddings").folders():
        for encoder in store.child("embeddings", snapshot).folders():
            folder = store.child("embeddings", snapshot, encoder)
            result["embeddings"].append(_state(folder, "embeddings", snapshot=snapshot, encoder=encoder))
    for name in publish.list_indexes(root):
        for version in publish.index_store(root, name).folders():
            folder = publish.index_store(root, name).child(version)
            result["versions"].append(_state(folder, "version", name=name, version=version))
    for alias in publish.list_aliases(root):
        result["aliases"].append({"name": alias, **publish.read_alias(root, alias)})
    return result


def inspect(target: str) -> dict[str, Any]:
    """Describe a checkpoint, or a file of the root by what it is."""
    name = os.path.basename(target.rstrip("/"))
    if name.endswith((".faiss", ".parquet", ".arrow", ".json")):
        return _inspect_file(target, name)
    from dataclasses import asdict

    from pipelines.encode import describe_encoder
    from pipelines.models import describe
    from pipelines.models.fetch import fetch

    directory = fetch(target)
    told = describe(directory)
    if told.kind == "encoder":
        told, _ = describe_encoder(target, directory)  # with what is known of a released checkpoint of this name
    return {"checkpoint": target, "directory": directory, **asdict(told)}


def _only_alias(root: str) -> str:
    names = publish.list_aliases(root)
    if len(names) == 1:
        return names[0]
    found = ", ".join(names) or "none"
    hint = "pass --name" if names else "build an index with `pinakes run CONFIG`, or pass --root"
    raise ConfigError(
        "which index to search is not clear", where=root, expected=f"one alias, found: {found}", hint=hint
    )


def _state(store: Store, kind: str, **identity: str) -> dict[str, Any]:
    if not has_manifest(store):
        done = len(store.child("receipts").files()) or len(store.files("split-"))
        return {**identity, "state": "unfinished", "files_done": done}
    manifest = read_manifest(store, kind)
    keys = ("num_rows", "num_quarantined", "dim", "factory", "num_shards", "recall", "created")
    return {**identity, "state": "finished", **{key: manifest[key] for key in keys if key in manifest}}


def _inspect_file(target: str, name: str) -> dict[str, Any]:
    folder, _, _ = target.rpartition("/")
    store = Store(folder or ".")
    if not store.exists(name):
        raise ArtifactError(
            "there is no such file", where=store.path(name), hint="`pinakes status` lists what the root holds"
        )
    facts: dict[str, Any] = {"file": target, "num_bytes": store.size(name), "sha256": store.sha256(name)}
    if has_manifest(store) and name != MANIFEST:
        manifest = json.loads(store.read(MANIFEST))
        files = manifest.get("files") or {part["name"]: part for part in manifest.get("parts", [])}
        if name in files:
            facts["matches_manifest"] = files[name]["sha256"] == facts["sha256"]
    return {**facts, **_content_facts(store, name, facts["sha256"])}


def _content_facts(store: Store, name: str, sha256: str) -> dict[str, Any]:
    if name.endswith(".json"):
        content = json.loads(store.read(name))
        return {
            "keys": sorted(content),
            **{k: content[k] for k in ("kind", "num_rows", "version", "current") if k in content},
        }
    path = store.local(name, sha256)
    if name.endswith(".faiss"):
        from pipelines.index.build import read

        opened = read(path, mmap=True)
        return {
            "type": type(opened).__name__,
            "num_rows": opened.ntotal,
            "dim": opened.d,
            "metric": {0: "ip", 1: "l2"}.get(opened.metric_type, opened.metric_type),
        }
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if name.endswith(".parquet"):
            parquet = pq.ParquetFile(path)
            return {"num_rows": parquet.metadata.num_rows, "schema": str(parquet.schema_arrow)}
        table = pa.ipc.open_file(pa.memory_map(path)).read_all()
        return {"num_rows": len(table), "schema": str(table.schema)}
    except (pa.ArrowException, OSError) as error:
        hint = "it is truncated or not what its name says: delete it and run its step again"
        raise ArtifactError(f"the file does not open: {error}", where=store.path(name), hint=hint) from error
