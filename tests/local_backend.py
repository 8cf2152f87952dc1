"""A Backend in this process over real tiny versions, and what it takes to ask it: no Ray, no cluster.

`build_root` runs the drivers of `cluster` with plain loops for Ray's tasks. `LocalBackend` keeps the contract of
`cluster.api.Backend` with the pipelines' own retriever, reranker and reader. `served` gives it a real socket.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.api import SearchRequest, found_json
from cluster.index import build_version
from cluster.ingest import ingest
from cluster.progress import Progress
from pipelines import corpus, embeddings, publish
from pipelines.answer import answers_within
from pipelines.config import AnswerConfig, CorpusConfig, EncoderConfig, IndexConfig, RerankConfig, ServeConfig
from pipelines.encode import Encoder, resolve
from pipelines.errors import ArtifactError, BusyError, ConfigError
from pipelines.manifest import find_finished, fingerprint, put_done, write_manifest
from pipelines.rerank import rerank_within
from pipelines.retrieve import Retriever, check_k, encoder_name
from pipelines.staging import corpus_store
from pipelines.storage import Store

TEXTS = [f"the cat number {i} sat on mat {i * 7 % 13}" for i in range(60)]


class LocalBackend:
    """Search the versions of aliases in this process; a reranker and a reader may stand behind."""

    def __init__(
        self, root: str, aliases: Sequence[str], config: ServeConfig, reranker: Any = None, reader: Any = None
    ) -> None:
        self.root, self.config, self.reranker, self.reader = root, config, reranker, reader
        self.depths = {"rerank": RerankConfig(checkpoint="-").depth, "answer": AnswerConfig(reader="-").depth}
        self.opened = {
            (alias, version): Retriever.open(root, alias, version)
            for alias in aliases
            for version in publish.list_versions(root, alias)
        }

    async def search(self, request: SearchRequest, deadline: float) -> dict[str, Any]:
        return await asyncio.to_thread(self._search, request, deadline)

    def _search(self, request: SearchRequest, deadline: float) -> dict[str, Any]:
        began, texts = time.monotonic(), request.texts(self.config)
        retriever = self._find(request.alias, request.version)
        check_k(request.k, retriever.manifest)
        if request.rerank and self.reranker is None:
            raise ConfigError("no reranker is configured", expected="rerank.checkpoint in the config")
        if request.answer and self.reader is None:
            raise ConfigError("no reader is configured", expected="answer.reader in the config")
        if deadline <= began:
            raise BusyError("the time was over before the search began", hint="ask again with more time")
        asked = {stage: depth for stage, depth in self.depths.items() if getattr(request, stage)}
        depth = min(max([request.k, *asked.values()]), len(retriever.passages))
        found, took = retriever.search_timed(texts, depth, retriever.filter(request.filter))
        skipped, given = [], None
        if "rerank" in asked:
            left = deadline - time.monotonic()
            reranked = rerank_within(self.reranker, texts, found, asked["rerank"], left)
            skipped += ["rerank"] if reranked is None else []
            found = found if reranked is None else reranked
        if "answer" in asked:
            given = answers_within(self.reader, texts, found, asked["answer"], deadline - time.monotonic())
            skipped += ["answer"] if given is None else []
        m = retriever.manifest
        return {
            "alias": m["name"],
            "version": m["version"],
            "encoder": encoder_name(m),
            "complete": not skipped,
            **({"skipped": skipped} if skipped else {}),
            "took_ms": {**took, "total": (time.monotonic() - began) * 1000},
            **found_json(request, found, given),
            **({"explain": {"depth": depth, "search_params": m["search_params"]}} if request.explain else {}),
        }

    async def passage(self, passage_id: str, alias: str | None, version: str | None) -> dict[str, Any]:
        passages = self._find(alias, version).passages
        if (row := passages.row_of(passage_id)) is None:
            raise ArtifactError(f"there is no passage {passage_id!r}")
        return {"row": row, **passages.by_row(row).as_dict()}

    async def catalogue(self) -> dict[str, Any]:
        states = {alias: publish.read_alias(self.root, alias) for alias, _ in self.opened}
        aliases = {alias: {key: state[key] for key in ("current", "previous")} for alias, state in states.items()}
        names = ("num_rows", "dim", "factory", "metric", "num_shards", "recall", "search_params", "created")
        versions = [
            {
                "alias": alias,
                "version": version,
                "state": next((name for name, known in aliases[alias].items() if known == version), "pinned"),
                "encoder": encoder_name(retriever.manifest),
                **{name: retriever.manifest[name] for name in names},
            }
            for (alias, version), retriever in self.opened.items()
        ]
        stages = {"reranker": self.reranker is not None, "reader": self.reader is not None}
        return {"default": next(iter(aliases)), "aliases": aliases, "versions": versions, "stages": stages}

    async def report(self, alias: str, version: str) -> bytes:
        retriever = self._find(alias, version)
        store = publish.index_store(self.root, alias).child(retriever.manifest["version"])
        return store.read(publish.REPORT)

    async def promote(self, alias: str, version: str, force: bool) -> dict[str, Any]:
        self._find(alias, version)
        return publish.promote(self.root, alias, version)

    async def rollback(self, alias: str) -> dict[str, Any]:
        self._find(alias, None)
        return publish.rollback(self.root, alias)

    def _find(self, alias: str | None, version: str | None) -> Retriever:
        names = dict.fromkeys(name for name, _ in self.opened)
        name = alias or next(iter(names))
        if name not in names:
            raise ArtifactError(f"there is no alias {name!r} here; served: {', '.join(names)}")
        chosen = version or publish.current(self.root, name)
        if (name, chosen) not in self.opened:
            known = ", ".join(v for n, v in self.opened if n == name)
            raise ArtifactError(f"alias {name!r} has no version {chosen!r} here; served: {known}")
        return self.opened[name, chosen]


def build_root(
    folder: Path, checkpoint: str, rows: Sequence[dict[str, Any]] = (), metadata: Sequence[Any] = (), **index: Any
) -> str:
    """Build, publish and promote a version under the alias `cats`; return its root.

    rows: {"id", "title", "text"} each; by default TEXTS, with the ids p0, p1, …. metadata: as in CorpusConfig. index:
    keys of IndexConfig. Called again, it adds a version to the root.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = rows or [{"id": f"p{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in content))
    root, config = str(folder / "root"), IndexConfig(**{"name": "cats", "recall_queries": 4, **index})
    with _in_this_process():
        snapshot = ingest(
            root, CorpusConfig(name="cats", sources=[str(source)], metadata=list(metadata)), Progress(True)
        )
        embedded = _encode(root, snapshot, EncoderConfig(checkpoint=checkpoint, compute="fp32", storage="fp32"))
        version = build_version(root, config, snapshot, embedded, Progress(True))["version"]
    publish.promote(root, config.name, version)
    return root


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Run what the drivers of `cluster` give to Ray as tasks in plain loops instead."""

    def run_tasks(function: Any, items: Sequence[Any], *common: Any, **resources: float) -> Iterator[tuple[int, Any]]:
        return ((position, function(item, *common)) for position, item in enumerate(items))

    def run_task(function: Any, *arguments: Any, **resources: float) -> Any:
        return function(*arguments)

    seams = {"run_tasks": run_tasks, "run_task": run_task, "largest_node_cpus": lambda: 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("cluster."):
                for seam in seams.keys() & vars(module).keys():
                    patch.setattr(module, seam, seams[seam])
        yield


def _encode(root: str, snapshot: dict[str, Any], config: EncoderConfig) -> dict[str, Any]:
    spec = resolve(config)
    store, entries = Store(root).child("embeddings", snapshot["snapshot"], spec.fingerprint), []
    if finished := find_finished(store, "embeddings"):
        return finished
    encoder = Encoder(spec, "passage")
    passages = corpus_store(root, snapshot["corpus"]).child(snapshot["snapshot"])
    for part in snapshot["parts"]:
        table = corpus.read_part(passages, part)
        emb_ND = encoder.encode_passages(table["title"].to_pylist(), table["text"].to_pylist())
        data = embeddings.to_parquet(table["id"].to_pylist(), emb_ND, spec.storage)
        facts = {"num_rows": len(table), "first_row": part["first_row"]}
        entries.append(put_done(store, part["name"], data, fingerprint([part["name"]]), facts).as_entry())
    content = {
        **{key: snapshot[key] for key in ("snapshot", "corpus", "num_rows")},
        "encoder": spec.as_dict(),
        "dim": spec.dim,
        "num_quarantined": 0,
        "quarantined": [],
        "parts": entries,
    }
    return write_manifest(store, "embeddings", content)


@contextmanager
def served(app: Any, **options: Any) -> Iterator[str]:
    """Run an ASGI application on a socket of this machine; give its address. options: of uvicorn, such as a key."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", **options))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"{'https' if 'ssl_keyfile' in options else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
