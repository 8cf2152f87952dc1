"""The HTTP API: its routes, over a `Backend` that searches. It runs under Ray Serve or any other ASGI server.

POST /search                     one query or a batch          GET  /aliases, /versions           what is served
POST /search/batch               many queries, NDJSON          GET  /reports/{alias}/{version}    how it was built
GET  /passages/{id}              one passage                   GET  /health, /ready, /metrics     for operators
POST /admin/promote, /rollback   only with `serve.admin_routes`
"""

# FastAPI reads the types at run time, so they are real objects (no `from __future__ import annotations` here).

import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from cluster.api_models import (
    NAME_PATTERN,
    AnswerModel,
    HitModel,
    PassageModel,
    SearchRequest,
    SearchResponse,
    answer_json,
    found_json,
    hit_json,
)
from cluster.search_page import search_page
from pipelines.config import ServeConfig
from pipelines.errors import ArtifactError, ConfigError, InputError, PinakesError

__all__ = [
    "AnswerModel", "Backend", "HitModel", "PassageModel", "SearchRequest", "SearchResponse",
    "answer_json", "api", "build_api", "found_json", "hit_json",
]  # fmt: skip

_log = logging.getLogger("ray.serve")

Name = Annotated[str | None, Query(pattern=NAME_PATTERN)]


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
        search_params, created}, the loaded ones; state: "current", "previous" or "pinned"; encoder: its checkpoint.
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


def build_api(backend: Callable[[], Backend], config: ServeConfig) -> FastAPI:
    """Return the application. `backend` is called on each request, so that it may be set after the routes are."""
    app = FastAPI(title="Pinakes", description="Search a published index.", version="1")
    _handle_errors(app)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        shown = search_page()
        return HTMLResponse(shown.html, headers={**headers, "Content-Security-Policy": shown.policy})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        """Say what is loaded and served."""
        told = await backend().catalogue()
        facts = {(v["alias"], v["version"]): v for v in told["versions"]}
        names = ("version", "num_rows", "dim", "factory", "encoder")
        current = {alias: facts[alias, state["current"]] for alias, state in told["aliases"].items()}
        aliases = {alias: {name: fact[name] for name in names} for alias, fact in current.items()}
        return {"ready": True, **told["stages"], "aliases": aliases}

    @app.get("/aliases")
    async def aliases() -> dict[str, Any]:
        """List the aliases with the versions they point to, and what each version is."""
        told = await backend().catalogue()
        listed = {
            alias: {**state, "versions": [v for v in told["versions"] if v["alias"] == alias]}
            for alias, state in told["aliases"].items()
        }
        return {"default": told["default"], "stages": told["stages"], "aliases": listed}

    @app.get("/versions")
    async def versions() -> dict[str, Any]:
        """List the versions that are loaded."""
        return {"versions": (await backend().catalogue())["versions"]}

    @app.get("/reports/{alias}/{version}", response_class=HTMLResponse)
    async def report(alias: str, version: str) -> HTMLResponse:
        """Return the report of a version: how it was built and how well it searches."""
        return HTMLResponse(await backend().report(alias, version))

    @app.post("/search", responses={200: {"model": SearchResponse}})
    async def search(request: SearchRequest) -> Response:
        """Search one query or a batch; rerank and answer where asked, as far as the time goes."""
        request.texts(config)
        budget_ms = min(request.budget_ms or config.budget_ms, config.budget_ms)
        return JSONResponse(await backend().search(request, time.monotonic() + budget_ms / 1000))

    @app.get("/passages/{passage_id:path}", responses={200: {"model": PassageModel}})
    async def passage(passage_id: str, alias: Name = None, version: Name = None) -> Response:
        """Return the passage with this id."""
        return JSONResponse(await backend().passage(passage_id, alias, version))

    return app


def _handle_errors(app: FastAPI) -> None:
    app.exception_handler(PinakesError)(_refuse)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)


def _problem(status: int, title: str, detail: str) -> JSONResponse:
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(content, status, media_type="application/problem+json")


async def _refuse(request: Request, error: PinakesError) -> Response:
    if isinstance(error, ConfigError | InputError):
        detail = error.what + (f"; expected {error.expected}" if error.expected else "")
        return _problem(422, "The request can't be answered", detail)
    if isinstance(error, ArtifactError):
        return _problem(404, "Not found", error.what)
    _log.error("request failed: %s", error)
    return _problem(500, "The server failed", "see its log")


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    told = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
    return _problem(422, "The request is not valid", told)


async def _http(request: Request, error: HTTPException) -> Response:
    return _problem(error.status_code, "The request failed", str(error.detail))


api = FastAPI(title="Pinakes", description="Search a published index.", version="1")
"""What serve.py decorates until it builds its application by `build_api`."""
_handle_errors(api)
