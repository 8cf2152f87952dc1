"""The HTTP API: its routes, over a `Backend` that searches. It runs under Ray Serve or any other ASGI server.

POST /search                     one query or a batch          GET  /aliases, /versions           what is served
POST /search/batch               many queries, NDJSON          GET  /reports/{alias}/{version}    how it was built
GET  /passages/{id}              one passage                   GET  /health, /ready, /metrics     for operators
POST /admin/promote, /rollback   only with `serve.admin_routes`
"""

# FastAPI reads the types at run time, so they are real objects (no `from __future__ import annotations` here).

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from cluster.access import Access, Call
from cluster.admission import Room
from cluster.api_docs import DOCS_POLICY, describe, docs_page
from cluster.api_models import (
    NAME_PATTERN,
    AliasesModel,
    AliasMoved,
    BatchLine,
    BatchRequest,
    PassageModel,
    PromoteRequest,
    ReadyModel,
    RollbackRequest,
    SearchRequest,
    SearchResponse,
    VersionsModel,
    found_json,
)
from cluster.api_stream import Batch
from cluster.problems import Problem, of_error
from cluster.search_page import search_page
from cluster.telemetry import METRICS_TYPE, Metrics, Tracer, open_log
from pipelines.access_keys import KeyFile, KeyRing, default_url
from pipelines.config import ServeConfig
from pipelines.errors import ConfigError, PinakesError

__all__ = ["Backend", "SearchRequest", "build_api", "found_json", "key_file"]

Name = Annotated[str | None, Query(pattern=NAME_PATTERN)]
PathName = Annotated[str, Path(pattern=NAME_PATTERN)]
_MAX_TOLD, _MAX_TOLD_CHARS = 10, 200  # problems of a body, and characters of each
# A report is a file of the root, drawn by whoever built the version: it may look as it likes, but run nothing.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'none'"


class Json(JSONResponse):
    """Plain dicts, encoded by pydantic's compiled encoder: ten times as fast as the standard library's."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


class NDJSON(StreamingResponse):
    media_type = "application/x-ndjson"


class Backend(Protocol):
    """What searches behind the API: the gateway replica of Ray Serve, or a retriever in this process (in tests).

    Everything that is given is plain JSON (dicts), in the form that the models of `api_models` document. Errors are
    the project's own: ConfigError and InputError mean the request (422), ArtifactError what does not exist (404),
    QualityError a refused gate (409), BusyError too much load or too little time (503, with Retry-After).
    """

    config: ServeConfig

    async def search(self, request: SearchRequest, deadline: float) -> dict[str, Any]:
        """Return a SearchResponse. The request is checked. deadline: time.monotonic() at which it must be back."""
        ...

    async def passage(self, passage_id: str, alias: str | None, version: str | None) -> dict[str, Any]:
        """Return a PassageModel. Raises ArtifactError when there is no such passage, alias or version."""
        ...

    async def catalogue(self) -> dict[str, Any]:
        """Return what is served.

        default: the alias searched when none is named. stages: {"reranker": bool, "reader": bool}.
        aliases: {alias: {"current": version, "previous": version or None}}.
        versions: a list of {alias, version, state, num_rows, dim, factory, encoder, metric, num_shards, recall,
        search_params, created}, the loaded ones; state: "current", "previous", "pinned", "prepared"; encoder: its name.
        """
        ...

    async def report(self, alias: str, version: str) -> bytes:
        """Return the report.html of a served version. Raises ArtifactError when it is not served."""
        ...

    async def promote(self, alias: str, version: str, force: bool) -> dict[str, Any]:
        """Switch the alias on every replica; return its state {"current", "previous", …}."""
        ...

    async def rollback(self, alias: str) -> dict[str, Any]:
        """Switch the alias back on every replica; return its state."""
        ...


def build_api(
    backend: Callable[[], Backend],
    config: ServeConfig,
    keys: KeyFile | None = None,
    *,
    tells_id: bool = True,
    room: Room | None = None,
) -> FastAPI:
    """Return the application, to be built where it runs. `backend` is called on each request.

    keys: the file of the API keys. tells_id: False where the server before it adds X-Request-Id to answers. room: where
    a door before it (`cluster.door`) counts the same.
    Raises ConfigError when the config wants keys and no file of them is given.
    """
    ring = _ring(config, keys)
    # FastAPI's own /docs needs the internet, and its redirects of `path/` would pass by what Access knows of paths.
    app = FastAPI(title="Pinakes", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics, tracer = Metrics(), Tracer.from_environment()
    app.add_middleware(Access, config=config, keys=ring, metrics=metrics, tracer=tracer, tells_id=tells_id, room=room)
    _handle_errors(app)
    _add_search(app, backend, config, metrics)
    _add_operations(app, backend, config, metrics)
    _add_pages(app, backend)
    if config.admin_routes:
        _add_admin(app, backend)
    describe(app, config)
    if config.access_log:
        open_log()
    return app


def _ring(config: ServeConfig, keys: KeyFile | None) -> KeyRing | None:
    if not (config.require_key or config.admin_routes):
        return None
    if keys is None:
        raise ConfigError("the server has no file of API keys", expected="serve.keys, or keys.json in the root")
    return KeyRing(keys)


def key_file(config: ServeConfig, root: str) -> KeyFile:
    """Return the file that the config names for API keys, or the root's own."""
    return KeyFile(config.keys or default_url(root))


def _call(request: Request) -> Call:
    call: Call = request.scope["pinakes"]
    return call


def _add_pages(app: FastAPI, backend: Callable[[], Backend]) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        shown = search_page()
        return HTMLResponse(shown.html, headers={"Content-Security-Policy": shown.policy})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers={"Content-Security-Policy": DOCS_POLICY})

    @app.get("/reports/{alias}/{version}", response_class=HTMLResponse)
    async def report(alias: PathName, version: PathName) -> HTMLResponse:
        """Return the report of a version: how it was built and how well it searches."""
        return HTMLResponse(await backend().report(alias, version), headers={"Content-Security-Policy": _REPORT_POLICY})


def _add_operations(app: FastAPI, backend: Callable[[], Backend], config: ServeConfig, metrics: Metrics) -> None:
    @app.get("/health", responses={200: {"model": dict[str, str]}})
    async def health() -> Response:
        """Say that the process answers."""
        return Json({"status": "ok"})

    @app.get("/ready", responses={200: {"model": ReadyModel}})
    async def ready(request: Request) -> Response:
        """Say what is loaded and served."""
        told = await backend().catalogue()
        if config.require_key and _call(request).key is None:
            return Json({"ready": True})
        facts = {(v["alias"], v["version"]): v for v in told["versions"]}
        names = ("version", "num_rows", "dim", "factory", "encoder")
        current = {alias: facts[alias, state["current"]] for alias, state in told["aliases"].items()}
        aliases = {alias: {name: fact[name] for name in names} for alias, fact in current.items()}
        return Json({"ready": True, **told["stages"], "aliases": aliases})

    @app.get("/aliases", responses={200: {"model": AliasesModel}})
    async def aliases() -> Response:
        """List the aliases with the versions they point to, and what each version is."""
        told = await backend().catalogue()
        listed = {
            alias: {**state, "versions": [v for v in told["versions"] if v["alias"] == alias]}
            for alias, state in told["aliases"].items()
        }
        return Json({"default": told["default"], "stages": told["stages"], "aliases": listed})

    @app.get("/versions", responses={200: {"model": VersionsModel}})
    async def versions() -> Response:
        """List the versions that are loaded."""
        return Json({"versions": (await backend().catalogue())["versions"]})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        """Return this replica's metrics, for Prometheus."""
        return Response(metrics.page(await backend().catalogue()), media_type=METRICS_TYPE)


def _add_search(app: FastAPI, backend: Callable[[], Backend], config: ServeConfig, metrics: Metrics) -> None:
    def note(call: Call, answer: dict[str, Any], request: SearchRequest) -> None:
        """Keep what logs, metrics and traces tell of an answer."""
        queries = [request.query] if request.query is not None else request.queries or []
        metrics.answer(answer, len(queries))
        names = ("alias", "version", "complete", "took_ms")
        facts = {"k": request.k, **{name: answer[name] for name in names if name in answer}}
        call.facts.update(facts, num_queries=call.facts.get("num_queries", 0) + len(queries))
        if config.log_queries:
            call.facts.setdefault("queries", []).extend(queries)

    @app.post("/search", responses={200: {"model": SearchResponse}})
    async def search(asked: SearchRequest, request: Request) -> Response:
        """Search one query or a batch; rerank and answer where asked, as far as the time goes."""
        call, num = _call(request), len(asked.texts(config))
        call.charge(num - 1)
        budget_ms = min(asked.budget_ms or config.budget_ms, config.budget_ms)
        answer = await backend().search(asked, time.monotonic() + budget_ms / 1000)
        note(call, answer, asked)
        return Json(answer)

    @app.post("/search/batch", response_class=NDJSON, responses={200: {"model": BatchLine}})
    async def search_batch(asked: BatchRequest, request: Request) -> Response:
        """Search many queries; the answers stream as lines of JSON (NDJSON), one a query and in their order."""
        call = _call(request)
        asked.check(config)
        call.charge(len(asked.queries) - 1)
        batch = Batch(asked, config, call, backend().search, partial(note, call))
        return NDJSON(batch.lines(await batch.start()))

    @app.get("/passages/{passage_id:path}", responses={200: {"model": PassageModel}})
    async def passage(passage_id: str, alias: Name = None, version: Name = None) -> Response:
        """Return the passage with this id."""
        return Json(await backend().passage(passage_id, alias, version))


def _add_admin(app: FastAPI, backend: Callable[[], Backend]) -> None:
    def check_right(request: Request) -> None:
        """Raise Problem without the right; Access has checked it, by the path alone."""
        key = _call(request).key
        if key is None or "admin" not in key.scopes:
            raise Problem(403, "the key lacks the scope 'admin'", "scope")

    @app.post("/admin/promote", responses={200: {"model": AliasMoved}})
    async def promote(asked: PromoteRequest, request: Request) -> Response:
        """Point an alias to another version, on every replica, if the version passes the gate."""
        check_right(request)
        return Json(await backend().promote(asked.alias, asked.version, asked.force))

    @app.post("/admin/rollback", responses={200: {"model": AliasMoved}})
    async def rollback(asked: RollbackRequest, request: Request) -> Response:
        """Point an alias back to its previous version."""
        check_right(request)
        return Json(await backend().rollback(asked.alias))


def _handle_errors(app: FastAPI) -> None:
    app.exception_handler(PinakesError)(_refuse)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)


async def _refuse(request: Request, error: PinakesError) -> Response:
    problem = of_error(error)
    if problem.status == 500:
        raise error  # Access logs it under the request's id
    return _answer(request, problem)


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    told = (f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()[:_MAX_TOLD])
    return _answer(request, Problem(422, "; ".join(problem[:_MAX_TOLD_CHARS] for problem in told), "invalid"))


async def _http(request: Request, error: HTTPException) -> Response:
    return _answer(request, Problem(error.status_code, str(error.detail), "http", error.headers))


def _answer(request: Request, problem: Problem) -> Response:
    call = _call(request)
    call.refused = problem.reason
    return problem.response(call.request_id)
