"""What each verb of the command does, as a function from a config to a result (a JSON-able dict)."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.progress import Progress
from cluster.session import result_stream, session
from pipelines import publish
from pipelines.config import Config
from pipelines.encode import EncoderSpec, resolve
from pipelines.errors import ArtifactError, ConfigError, InputError
from pipelines.manifest import MANIFEST, has_manifest, read_manifest
from pipelines.retrieve import Retriever, check_encoder, check_k
from pipelines.storage import Store


def ingest(config: Config, progress: Progress) -> dict[str, Any]:
    """Make the snapshot of the config's corpus."""
    with session(config.cluster):
        return _result(_ingest(config, progress), progress)


def encode(config: Config, progress: Progress) -> dict[str, Any]:
    """Make the snapshot if need be, and its embeddings."""
    spec = _encoder(config)
    with session(config.cluster):
        return _result(_encode(config, spec, _ingest(config, progress), progress), progress)


def index(config: Config, progress: Progress) -> dict[str, Any]:
    """Make whatever is missing up to a published version; set the alias if it is new."""
    spec = _encoder(config)
    with session(config.cluster):
        manifest = _index(config, spec, progress)
    if config.index.name not in publish.list_aliases(config.root):
        publish.promote(config.root, config.index.name, manifest["version"])
    elif (now := publish.current(config.root, config.index.name)) != manifest["version"]:
        command = f"pinakes promote {config.index.name} {manifest['version']} --root {config.root}"
        progress.say(f"alias {config.index.name} still points to {now}; to switch: {command}")
    return _result(manifest, progress)


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """Do the whole job, and point the alias to the version it made."""
    spec = _encoder(config)
    with session(config.cluster):
        manifest = _index(config, spec, progress)
        evaluation = None
        if config.evaluate.questions:
            from cluster.evaluate import evaluate as evaluate_version

            evaluation = evaluate_version(config.root, manifest, config.evaluate, progress)
    alias = publish.promote(config.root, config.index.name, manifest["version"])
    result = {"version": manifest, "evaluation": evaluation, "alias": {"name": config.index.name, **alias}}
    return _result(result, progress)


def evaluate(config: Config, version: str | None, progress: Progress) -> dict[str, Any]:
    """Score the alias's version (or `version`) on the config's questions."""
    from cluster.evaluate import evaluate as evaluate_version

    manifest = publish.read_version(config.root, config.index.name, version)
    check_encoder(manifest, _encoder(config))
    with session(config.cluster):
        return _result(evaluate_version(config.root, manifest, config.evaluate, progress), progress)


def search(root: str, name: str | None, version: str | None, query: str, k: int) -> dict[str, Any]:
    """Search one version in this process."""
    if not query.strip():
        raise InputError("the query is blank", expected="some text")
    manifest = publish.read_version(root, name or _only_alias(root), version)
    check_k(k, manifest)
    retriever = Retriever(root, manifest)
    hits, took = retriever.search_timed([query], k)
    found = [{"row": h.row, "score": h.score, **h.passage.as_dict()} for h in hits[0]]
    return {"query": query, "name": manifest["name"], "version": manifest["version"], "took_ms": took, "hits": found}


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

    from pipelines.models import describe
    from pipelines.models.fetch import fetch

    directory = fetch(target)
    return {"checkpoint": target, "directory": directory, **asdict(describe(directory))}


def serve_until_interrupted(config: Config, progress: Progress) -> None:
    """Serve the config's alias until Ctrl-C or SIGTERM."""
    with serving(config) as address:
        progress.say(_how_to_use(address, config))
        _wait_for_signal()


def demo(config: Config, once: bool, progress: Progress) -> None:
    """Run the whole job, print its evaluation, serve it; with `once` ask one question over HTTP and stop."""
    from rich.console import Console

    from cluster.summaries import evaluation_summary, search_summary

    with session(config.cluster):
        result = run(config, progress)
        if result["evaluation"]:
            Console(file=result_stream()).print(evaluation_summary(result["evaluation"]))
        if once:
            config = config.model_copy(update={"serve": config.serve.model_copy(update={"port": free_port()})})
        with serving(config) as address:
            if once:
                question = "How do I read a Parquet file into a table?"
                Console(file=result_stream(), highlight=False).print(
                    search_summary(_ask(address, question)), markup=False
                )
                return
            progress.say(_how_to_use(address, config))
            _wait_for_signal()


@contextmanager
def serving(config: Config) -> Iterator[str]:
    publish.read_alias(config.root, config.index.name)
    with session(config.cluster):
        from cluster import serve

        address = serve.start(config.root, [config.index.name], config.serve)
        try:
            yield address
        finally:
            serve.stop()


def _ask(address: str, question: str) -> dict[str, Any]:
    body = json.dumps({"query": question, "k": 3}).encode()
    request = urllib.request.Request(f"{address}/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return {"query": question, **json.load(response)}


def _how_to_use(address: str, config: Config) -> str:
    body = json.dumps({"query": "how do I read a Parquet file", "k": 3})
    return (
        f"\nserving {config.index.name!r}; stop with Ctrl-C\n  search page  {address}/\n  API          {address}/docs\n"
        f"  example      curl -s {address}/search -H 'Content-Type: application/json' -d '{body}'"
    )


def _wait_for_signal() -> None:
    """Return on SIGTERM; Ctrl-C raises KeyboardInterrupt as everywhere."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        while not stopped.wait(0.5):
            pass
    except KeyboardInterrupt:
        print("\nstopping", file=sys.stderr)


def _encoder(config: Config) -> EncoderSpec:
    return resolve(config.encoder, on_gpu=config.cluster.gpus_per_worker > 0)


def _ingest(config: Config, progress: Progress) -> dict[str, Any]:
    from cluster.ingest import ingest as make_snapshot

    return make_snapshot(config.root, config.corpus, progress)


def _encode(config: Config, spec: EncoderSpec, snapshot: dict[str, Any], progress: Progress) -> dict[str, Any]:
    from cluster.encode import encode as embed

    return embed(config.root, snapshot, spec, config.cluster, progress)


def _index(config: Config, spec: EncoderSpec, progress: Progress) -> dict[str, Any]:
    from cluster.index import build_version
    from pipelines.index.search import check_params
    from pipelines.index.spec import new_index, parse_spec

    metric = "ip" if config.index.metric == "auto" else config.index.metric
    # An impossible factory or search parameter is refused before hours of encoding.
    check_params(new_index(parse_spec(config.index.factory, spec.dim, metric)), config.index.search_params)
    snapshot = _ingest(config, progress)
    embedded = _encode(config, spec, snapshot, progress)
    return build_version(config.root, config.index, snapshot, embedded, progress, config.evaluate.questions)


def _result(content: dict[str, Any], progress: Progress) -> dict[str, Any]:
    return {**content, "stages": progress.stages}


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


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
