"""The Ray Serve application: a gateway (FastAPI, query encoder, merge); shards, reranker and reader as deployments.

    POST /search            one query or a batch
    GET  /passages/{id}     one passage
    GET  /health, /ready    alive; loaded, with the aliases served
    GET  /                  the search page; /docs and /openapi.json describe the API

placement "together" maps all shards in every gateway and searches them on threads: no extra hop. "spread" gives every
shard a deployment of its own, searched in parallel; both merge with the same function.
"""

# Serve copies the Gateway class when it is decorated: what it uses stands above it, and types are real objects (no
# `from __future__ import annotations` here).

import asyncio
import logging
import time
import urllib.request
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.responses import HTMLResponse
from ray import serve

from cluster.api import AnswerModel, HitModel, PassageModel, SearchRequest, SearchResponse, api
from cluster.search_page import search_page
from pipelines import publish
from pipelines.answer import answers_within, load_reader
from pipelines.config import AnswerConfig, Config, RerankConfig, ServeConfig
from pipelines.errors import ArtifactError, ConfigError, PinakesError
from pipelines.index.search import merge_topk
from pipelines.models.base import Answer
from pipelines.rerank import load_reranker, rerank_within
from pipelines.retrieve import LocalShard, Retriever, check_k
from pipelines.schema import Hit

APPLICATION = "pinakes"
_SHARD_CPUS = 0.2
_GATEWAY_CPUS = 0.5
_BATCH_WAIT_SECONDS = 0.002
_HEALTH_SECONDS = 30.0
_MAX_ANSWERS = 5


class _Elsewhere:
    """Stands where a local shard would be; the gateway searches the shard deployments instead."""

    def search(self, queries_BD: Any, k: int) -> Any:
        raise PinakesError("the shards of this version are deployments of their own")


async def _within(deadline: float, ask: Any) -> Any:
    """Return what `ask(seconds left)` answers before the deadline, else None; what is still under way is cancelled."""
    left = deadline - time.perf_counter()
    if left <= 0:
        return None
    reply = ask(left)
    try:
        return await asyncio.wait_for(_awaited(reply), left)
    except TimeoutError:
        reply.cancel()
        return None


async def _awaited(reply: Awaitable[Any]) -> Any:
    return await reply


def _content(request: SearchRequest, found: list[list[Hit]], given: list[list[Answer]] | None) -> dict[str, Any]:
    """Return the response's hits and answers, in the form that was asked for."""
    hits = [[HitModel.of(hit) for hit in few[: request.k]] for few in found]
    one = request.query is not None
    content: dict[str, Any] = {"hits": hits[0]} if one else {"results": hits}
    if given is not None:
        read = [[AnswerModel.of(a, few) for a in some] for some, few in zip(given, found, strict=True)]
        content |= {"answers": read[0]} if one else {"results_answers": read}
    return content


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": _SHARD_CPUS})
class Shard:
    """One shard of a version, for placement "spread"."""

    def __init__(self, root: str, manifest: dict[str, Any], number: int) -> None:
        self.shard = LocalShard(root, manifest, number)

    async def search(self, queries_BD: Any, k: int) -> Any:
        return await asyncio.to_thread(self.shard.search, queries_BD, k)


class _Stage:
    """A model that works for one request after the other, on a thread of its own; waiting counts against the time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")

    async def _run(self, seconds: float, work: Callable[[float], Any]) -> Any:
        """Return `work(seconds left)`, run when its turn comes, or None when that is too late."""
        deadline = time.monotonic() + seconds

        def in_turn() -> Any:
            left = deadline - time.monotonic()
            return work(left) if left > 0 else None

        return await asyncio.get_running_loop().run_in_executor(self._thread, in_turn)


@serve.deployment(max_ongoing_requests=16)
class Reranker(_Stage):
    """The cross-encoder or PAQ reranker."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        super().__init__()
        self.config = RerankConfig(**config)
        self.model = load_reranker(self.config, device)

    async def rerank(self, queries: list[str], hits: list[list[Hit]], seconds: float) -> list[list[Hit]] | None:
        """Return the hits reordered, or None when that takes longer than `seconds`."""
        depth = self.config.depth
        return await self._run(seconds, lambda left: rerank_within(self.model, queries, hits, depth, left))


@serve.deployment(max_ongoing_requests=16)
class Reader(_Stage):
    """What answers from the hits."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        super().__init__()
        self.config = AnswerConfig(**config)
        compute, tokeniser = self.config.compute, self.config.tokeniser
        self.model = load_reader(self.config.reader, compute, device, tokeniser=tokeniser)

    async def answer(self, queries: list[str], hits: list[list[Hit]], seconds: float) -> list[list[Answer]] | None:
        """Return each query's answers, best first, or None when reading takes longer than `seconds`."""
        depth = self.config.depth
        found = await self._run(seconds, lambda left: answers_within(self.model, queries, hits, depth, left))
        return None if found is None else [given[:_MAX_ANSWERS] for given in found]


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": _GATEWAY_CPUS})
@serve.ingress(api)
class Gateway:
    """Answer requests: encode queries in batches, search all shards, merge, fetch, rerank."""

    def __init__(
        self,
        root: str,
        versions: dict[str, dict[str, Any]],
        config: dict[str, Any],
        shards: dict[str, list[Any]],
        reranker: Any,
        reader: Any,
    ) -> None:
        """config: the whole Config, dumped. reranker, reader: handles, or None."""
        self.config = ServeConfig(**config["serve"])
        self.depths = {stage: config[stage]["depth"] for stage in ("rerank", "answer") if config[stage]}
        self.shards, self.reranker, self.reader = shards, reranker, reader
        # In placement "spread" the retriever keeps encoder and passages; the shards are elsewhere.
        self.retrievers = {
            alias: Retriever(root, manifest, shards=[_Elsewhere()] if shards.get(alias) else None)
            for alias, manifest in versions.items()
        }

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> HTMLResponse:
        headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        return HTMLResponse(search_page().html, headers={**headers, "Content-Security-Policy": search_page().policy})

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @api.get("/ready")
    async def ready(self) -> dict[str, Any]:
        """Say what is loaded and served."""
        aliases = {
            alias: {
                "version": m["version"],
                "num_rows": m["num_rows"],
                "dim": m["dim"],
                "factory": m["factory"],
                "encoder": m["encoder"]["checkpoint"],
            }
            for alias, m in ((a, r.manifest) for a, r in self.retrievers.items())
        }
        stages = {"reranker": self.reranker is not None, "reader": self.reader is not None}
        return {"ready": True, **stages, "aliases": aliases}

    @api.post("/search", response_model_exclude_none=True)
    async def search(self, request: SearchRequest) -> SearchResponse:
        """Search one query or a batch; rerank and answer where asked, as far as the time goes."""
        started = time.perf_counter()
        texts = request.texts(self.config)
        alias, retriever = self._retriever(request.alias)
        check_k(request.k, retriever.manifest)
        stages = self._stages(request)
        deadline = started + min(request.budget_ms or self.config.budget_ms, self.config.budget_ms) / 1000
        clock = {"receive": time.perf_counter()}
        emb_BD = await self._encode((alias, texts))
        clock["encode"] = time.perf_counter()
        depth = min(max(request.k, *(self.depths[stage] for stage in stages), 1), len(retriever.passages))
        score_BK, row_BK = await self._search(alias, retriever, emb_BD, depth)
        clock["search"] = time.perf_counter()
        found = retriever.passages.hits(score_BK, row_BK)
        clock["fetch"] = time.perf_counter()
        skipped, given = [], None
        if "rerank" in stages:
            reranked = await _within(deadline, lambda left: self.reranker.rerank.remote(texts, found, left))
            skipped += ["rerank"] if reranked is None else []
            found = found if reranked is None else reranked
            clock["rerank"] = time.perf_counter()
        if "answer" in stages:
            given = await _within(deadline, lambda left: self.reader.answer.remote(texts, found, left))
            skipped += ["answer"] if given is None else []
            clock["answer"] = time.perf_counter()
        took, before = {}, started
        for name, at in clock.items():
            took[name], before = round((at - before) * 1000, 3), at
        took["total"] = round((time.perf_counter() - started) * 1000, 3)
        m = retriever.manifest
        return SearchResponse(
            alias=alias,
            version=m["version"],
            encoder=m["encoder"]["checkpoint"],
            complete=not skipped,
            skipped=skipped or None,
            took_ms=took,
            **_content(request, found, given),
        )

    @api.get("/passages/{passage_id:path}", response_model_exclude_none=True)
    async def passage(self, passage_id: str, alias: str | None = None) -> PassageModel:
        """Return the passage with this id."""
        _, retriever = self._retriever(alias)
        row = retriever.passages.row_of(passage_id)
        if row is None:
            raise ArtifactError(f"there is no passage {passage_id!r}")
        return PassageModel(row=row, **retriever.passages.by_row(row).as_dict())

    def _retriever(self, alias: str | None) -> tuple[str, Retriever]:
        name = alias or next(iter(self.retrievers))
        if name not in self.retrievers:
            raise ArtifactError(f"there is no alias {name!r} here; served: {', '.join(self.retrievers)}")
        return name, self.retrievers[name]

    def _stages(self, request: SearchRequest) -> list[str]:
        """Return the stages asked for behind retrieval. Raises ConfigError for one that is not configured."""
        if request.rerank and self.reranker is None:
            raise ConfigError("no reranker is configured", expected="rerank.checkpoint in the config")
        if request.answer and self.reader is None:
            raise ConfigError("no reader is configured", expected="answer.reader in the config")
        return [stage for stage in ("rerank", "answer") if getattr(request, stage)]

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=_BATCH_WAIT_SECONDS)
    async def _encode(self, requests: list[tuple[str, list[str]]]) -> list[Any]:
        """Encode the queries of several requests together; each gets its own rows back."""
        by_alias: dict[str, list[int]] = {}
        for i, (alias, _) in enumerate(requests):
            by_alias.setdefault(alias, []).append(i)
        answers: list[Any] = [None] * len(requests)
        for alias, members in by_alias.items():
            texts = [text for i in members for text in requests[i][1]]
            emb_BD = await asyncio.to_thread(self.retrievers[alias].encoder.encode_queries, texts)
            start = 0
            for i in members:
                answers[i] = emb_BD[start : start + len(requests[i][1])]
                start += len(requests[i][1])
        return answers

    async def _search(self, alias: str, retriever: Retriever, emb_BD: Any, k: int) -> Any:
        if handles := self.shards.get(alias):
            return merge_topk(list(await asyncio.gather(*(h.search.remote(emb_BD, k) for h in handles))), k)
        return await asyncio.to_thread(retriever.search_vectors, emb_BD, k)


def application(aliases: list[str], config: Config) -> Any:
    """Return the Serve application for these aliases. Raises ArtifactError for one that does not exist."""
    root = config.root
    versions = {alias: publish.read_version(root, alias) for alias in aliases}
    shards: dict[str, list[Any]] = {}
    shard: Any = Shard
    if config.serve.placement == "spread":
        for alias, manifest in versions.items():
            shards[alias] = [
                shard.options(name=f"shard-{alias}-{n}").bind(root, manifest, n) for n in range(manifest["num_shards"])
            ]
    reranker = _bind_stage(Reranker, config.rerank, config.serve) if config.rerank else None
    reader = _bind_stage(Reader, config.answer, config.serve) if config.answer else None
    gateway = Gateway.options(num_replicas=config.serve.replicas)  # type: ignore[attr-defined]
    return gateway.bind(root, versions, config.model_dump(), shards, reranker, reader)


def _bind_stage(deployment: Any, stage: RerankConfig | AnswerConfig, config: ServeConfig) -> Any:
    resources = {"num_cpus": config.cpus_per_stage, "num_gpus": config.gpus_per_stage}
    chosen = deployment.options(num_replicas=config.replicas, ray_actor_options=resources)
    return chosen.bind(stage.model_dump(), "cuda" if config.gpus_per_stage else "cpu")


def start(aliases: list[str], config: Config) -> str:
    """Deploy the application on the connected cluster and return its address once it is ready."""
    import ray
    import ray.serve.context

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    host, port = config.serve.host, config.serve.port
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
    try:
        serve.run(
            application(aliases, config),
            name=APPLICATION,
            route_prefix="/",
            logging_config={"log_level": "WARNING"},
        )
    except (RuntimeError, ray.exceptions.RayError) as error:
        hint = "the deployment's log holds the cause; `pinakes status` checks the versions"
        raise PinakesError(f"the application did not start: {error}", hint=hint) from error
    address = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    _check_answers(address)
    return address


def _check_answers(address: str) -> None:
    """Raise ConfigError when nothing of ours answers at `address`."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=_HEALTH_SECONDS):
            return
    except OSError as error:
        hint = "Ray Serve keeps the port it was first started with: use that one (serve.port), or shut Serve down first"
        raise ConfigError(f"the application is up but does not answer: {error}", where=address, hint=hint) from error


def stop() -> None:
    """Take the application down again."""
    serve.delete(APPLICATION)
