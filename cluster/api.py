"""What the HTTP API takes, gives and says when it refuses: the models of its JSON and the FastAPI application."""

# FastAPI reads the types at run time, so they are real objects (no `from __future__ import annotations` here).

import logging
from typing import Annotated

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from pipelines.config import ServeConfig
from pipelines.errors import ArtifactError, ConfigError, InputError, PinakesError
from pipelines.models.base import Answer
from pipelines.schema import Hit

_log = logging.getLogger("ray.serve")

Text = Annotated[str, Field(min_length=1)]


class SearchRequest(BaseModel):
    """What to search for: `query`, or `queries` for a batch."""

    model_config = ConfigDict(extra="forbid")

    query: Text | None = Field(None, description="One query.", examples=["who invented the telephone"])
    queries: list[Text] | None = Field(None, min_length=1, description="A batch of queries, answered in `results`.")
    k: int = Field(10, ge=1, description="Hits for each query; at most the number of passages.")
    alias: str | None = Field(None, description="Which index to search; the first one served by default.")
    rerank: bool = Field(False, description="Reorder the hits by the reranker, if one is configured.")
    answer: bool = Field(False, description="Answer from the hits by the reader, if one is configured.")
    budget_ms: int | None = Field(
        None, ge=1, description="Time for the request; reranking and answering are left out where they do not fit."
    )

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

    @classmethod
    def of(cls, hit: Hit) -> "HitModel":
        return cls(row=hit.row, score=hit.score, rerank_score=hit.rerank_score, **hit.passage.as_dict())


class AnswerModel(BaseModel):
    """passage: id of the passage it was read from, if it was read from one. start, end: characters of its text."""

    text: str
    score: float
    passage: str | None = None
    start: int | None = None
    end: int | None = None

    @classmethod
    def of(cls, answer: Answer, hits: list[Hit]) -> "AnswerModel":
        source = hits[answer.passage].passage.id if answer.passage >= 0 else None
        span = {"start": answer.start, "end": answer.end} if answer.start >= 0 else {}
        return cls(text=answer.text, score=answer.score, passage=source, **span)


class SearchResponse(BaseModel):
    """`hits` and `answers` belong to `query`; `results` and `results_answers` to `queries`, in their order.

    Higher scores are better. complete: false when `skipped` names a stage that the time did not suffice for.
    """

    alias: str
    version: str
    encoder: str
    complete: bool = True
    skipped: list[str] | None = None
    took_ms: dict[str, float]
    hits: list[HitModel] | None = None
    results: list[list[HitModel]] | None = None
    answers: list[AnswerModel] | None = None
    results_answers: list[list[AnswerModel]] | None = None


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
