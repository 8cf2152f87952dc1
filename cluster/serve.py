"""The Ray Serve application: one gateway (FastAPI, query encoder, merge), optional shard and reranker deployments.

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
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.exceptions import HTTPException

from pipelines import publish
from pipelines.config import ServeConfig
from pipelines.errors import ArtifactError, ConfigError, InputError, PinakesError
from pipelines.index.search import merge_topk
from pipelines.models.base import CrossEncoder
from pipelines.rerank import rerank
from pipelines.retrieve import LocalShard, Retriever, check_k
from pipelines.schema import Hit

APPLICATION = "pinakes"
_PAGE = Path(__file__).with_name("search_page.html")
_SHARD_CPUS = 0.2
_GATEWAY_CPUS = 0.5
_BATCH_WAIT_SECONDS = 0.002
_HEALTH_SECONDS = 30.0
_log = logging.getLogger("ray.serve")

Text = Annotated[str, Field(min_length=1)]


class SearchRequest(BaseModel):
    """What to search for: `query`, or `queries` for a batch."""

    model_config = ConfigDict(extra="forbid")

    query: Text | None = Field(None, description="One query.", examples=["who invented the telephone"])
    queries: list[Text] | None = Field(None, min_length=1, description="A batch of queries, answered in `results`.")
    k: int = Field(10, ge=1, description="Hits for each query; at most the number of passages.")
    alias: str | None = Field(None, description="Which index to search; the first one served by default.")
    rerank: bool = Field(False, description="Reorder the hits by the cross-encoder, if one is configured.")

    def texts(self, config: ServeConfig) -> list[str]:
        """Return the queries. Raises ConfigError when there are none, both forms, too many or too long ones."""
        if (self.query is None) == (self.queries is None):
            raise ConfigError("give either `query` or `queries`", expected="exactly one of them")
        texts = [self.query] if self.query is not None else list(self.queries or [])
        if len(texts) > config.max_batch:
            raise ConfigError(f"{len(texts)} queries in one request", expected=f"at most {config.max_batch}")
        if (longest := max(len(t) for t in texts)) > config.max_query_chars:
            raise ConfigError(f"a query of {longest} characters", expected=f"at most {config.max_query_chars}")
        if self.k > config.max_k:
            raise ConfigError(f"k is {self.k}", expected=f"at most {config.max_k}")
        if any(not t.strip() for t in texts):
            raise ConfigError("a query is blank", expected="some text")
        return texts


class HitModel(BaseModel):
    row: int
    score: float
    rerank_score: float | None = None
    id: str
    title: str
    text: str
    answers: list[str] | None = None


class SearchResponse(BaseModel):
    """`hits` answers `query`; `results` answers `queries`, in their order. Higher scores are better."""

    alias: str
    version: str
    encoder: str
    complete: bool = True
    took_ms: dict[str, float]
    hits: list[HitModel] | None = None
    results: list[list[HitModel]] | None = None


class PassageModel(BaseModel):
    row: int
    id: str
    title: str
    text: str
    answers: list[str] | None = None


api = FastAPI(title="Pinakes", description="Search a published index.", version="1")


def _problem(status: int, title: str, detail: str) -> JSONResponse:
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(content, status, media_type="application/problem+json")


@api.exception_handler(PinakesError)
async def _refuse(request: Request, error: PinakesError) -> Response:
    if isinstance(error, ConfigError | InputError):
        detail = error.what + (f"; expected {error.expected}" if error.expected else "")
        return _problem(422, "The request can't be answered", detail)
    if isinstance(error, ArtifactError):
        return _problem(404, "Not found", error.what)
    _log.error("request failed: %s", error)
    return _problem(500, "The server failed", "see its log")


@api.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> Response:
    told = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
    return _problem(422, "The request is not valid", told)


@api.exception_handler(HTTPException)
async def _http(request: Request, error: HTTPException) -> Response:
    return _problem(error.status_code, "The request failed", str(error.detail))


class _Elsewhere:
    """Stands where a local shard would be; the gateway searches the shard deployments instead."""

    def search(self, queries_BD: Any, k: int) -> Any:
        raise PinakesError("the shards of this version are deployments of their own")


def _hit_model(hit: Hit) -> HitModel:
    return HitModel(row=hit.row, score=hit.score, rerank_score=hit.rerank_score, **hit.passage.as_dict())


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": _SHARD_CPUS})
class Shard:
    """One shard of a version, for placement "spread"."""

    def __init__(self, root: str, manifest: dict[str, Any], number: int) -> None:
        self.shard = LocalShard(root, manifest, number)

    async def search(self, queries_BD: Any, k: int) -> Any:
        return await asyncio.to_thread(self.shard.search, queries_BD, k)


@serve.deployment(max_ongoing_requests=16, ray_actor_options={"num_cpus": _SHARD_CPUS})
class Reranker:
    """The cross-encoder."""

    def __init__(self, checkpoint: str) -> None:
        from pipelines.models.cross_encoder import load_cross_encoder
        from pipelines.models.fetch import fetch

        self.model: CrossEncoder = load_cross_encoder(fetch(checkpoint), "fp32", "cpu")

    async def rerank(self, query: str, hits: list[Hit]) -> list[Hit]:
        return await asyncio.to_thread(rerank, self.model, query, hits)


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
    ) -> None:
        self.config = ServeConfig(**config)
        self.shards, self.reranker = shards, reranker
        # In placement "spread" the retriever keeps encoder and passages; the shards are elsewhere.
        self.retrievers = {
            alias: Retriever(root, manifest, shards=[_Elsewhere()] if shards.get(alias) else None)
            for alias, manifest in versions.items()
        }

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> HTMLResponse:
        headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)

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
        return {"ready": True, "reranker": self.reranker is not None, "aliases": aliases}

    @api.post("/search", response_model_exclude_none=True)
    async def search(self, request: SearchRequest) -> SearchResponse:
        """Search one query or a batch."""
        started = time.perf_counter()
        texts = request.texts(self.config)
        alias, retriever = self._retriever(request.alias)
        check_k(request.k, retriever.manifest)
        if request.rerank and self.reranker is None:
            raise ConfigError("no reranker is configured", expected="serve.reranker in the config")
        clock = [started, time.perf_counter()]
        emb_BD = await self._encode((alias, texts))
        clock.append(time.perf_counter())
        depth = min(max(request.k, self.config.rerank_depth), len(retriever.passages)) if request.rerank else request.k
        score_BK, row_BK = await self._search(alias, retriever, emb_BD, depth)
        clock.append(time.perf_counter())
        found = retriever.fetch(score_BK, row_BK)
        clock.append(time.perf_counter())
        if request.rerank:
            found = await asyncio.gather(
                *(self.reranker.rerank.remote(t, h) for t, h in zip(texts, found, strict=True))
            )
            found = [hits[: request.k] for hits in found]
            clock.append(time.perf_counter())
        stages = ("receive", "encode", "search", "fetch", "rerank")
        took = {n: round((b - a) * 1000, 3) for n, a, b in zip(stages, clock, clock[1:], strict=False)}
        took["total"] = round((time.perf_counter() - started) * 1000, 3)
        results = [[_hit_model(h) for h in hits] for hits in found]
        answer = {"hits": results[0]} if request.query is not None else {"results": results}
        m = retriever.manifest
        return SearchResponse(
            alias=alias, version=m["version"], encoder=m["encoder"]["checkpoint"], took_ms=took, **answer
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


def application(root: str, aliases: list[str], config: ServeConfig) -> Any:
    """Return the Serve application for these aliases. Raises ArtifactError for one that does not exist."""
    versions = {alias: publish.read_version(root, alias) for alias in aliases}
    shards: dict[str, list[Any]] = {}
    shard: Any = Shard
    if config.placement == "spread":
        for alias, manifest in versions.items():
            shards[alias] = [
                shard.options(name=f"shard-{alias}-{n}").bind(root, manifest, n) for n in range(manifest["num_shards"])
            ]
    reranker = Reranker.bind(config.reranker) if config.reranker else None  # type: ignore[attr-defined]
    gateway = Gateway.options(num_replicas=config.replicas)  # type: ignore[attr-defined]
    return gateway.bind(root, versions, config.model_dump(), shards, reranker)


def start(root: str, aliases: list[str], config: ServeConfig) -> str:
    """Deploy the application on the connected cluster and return its address once it is ready."""
    import ray
    import ray.serve.context

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": config.host, "port": config.port}, logging_config={"log_level": "WARNING"})
    try:
        serve.run(
            application(root, aliases, config),
            name=APPLICATION,
            route_prefix="/",
            logging_config={"log_level": "WARNING"},
        )
    except (RuntimeError, ray.exceptions.RayError) as error:
        hint = "the deployment's log holds the cause; `pinakes status` checks the versions"
        raise PinakesError(f"the application did not start: {error}", hint=hint) from error
    address = f"http://{'127.0.0.1' if config.host == '0.0.0.0' else config.host}:{config.port}"
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
