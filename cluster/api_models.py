"""The JSON of the HTTP API: what it takes, as strict models, and what it gives.

Answers leave the server as plain dicts that are encoded once; their models here document them. Validating an answer of
100 hits would take as long again as encoding it does.
"""

# FastAPI reads the types at run time, so they are real objects (no `from __future__ import annotations` here).

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.config import ServeConfig
from pipelines.errors import ConfigError
from pipelines.models.base import Answer
from pipelines.schema import Hit

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Aliases and versions. Neither holds a slash or starts with a dot, so neither can lead out of its folder."""

Text = Annotated[str, Field(min_length=1)]
NameText = Annotated[str, Field(pattern=NAME_PATTERN)]

_MOST_UNKNOWN = 10  # fields in one body that are looked at


class _Asked(BaseModel):
    """What a body may hold. Checking stops where a body is plainly wrong: every problem told costs a microsecond and a
    kilobyte, and a body has room for a million of them."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, content: Any) -> Any:
        if isinstance(content, dict) and len(content) > len(cls.model_fields) + _MOST_UNKNOWN:
            raise ValueError(f"{len(content)} fields, of which at most {len(cls.model_fields)} are known")
        return content


class _Options(_Asked):
    """How to search, for one query and for many."""

    k: int = Field(10, ge=1, description="Hits for each query; at most the number of passages.")
    alias: NameText | None = Field(None, description="Which index to search; the first one served by default.")
    version: NameText | None = Field(None, description="A version of it instead of the alias's current one.")
    rerank: bool = Field(False, description="Reorder the hits by the reranker, if one is configured.")
    answer: bool = Field(False, description="Answer from the hits by the reader, if one is configured.")
    explain: bool = Field(False, description="Say how the answer came about: `explain` in the response.")
    budget_ms: int | None = Field(
        None, ge=1, description="Time for the request; reranking and answering are left out where they do not fit."
    )
    filter: dict[str, Any] | None = Field(None, description="Only passages whose metadata fits.")

    def check(self, config: ServeConfig) -> None:
        """Raise ConfigError when more is asked for than this server gives."""
        if self.k > config.max_k:
            raise ConfigError(f"k is {self.k}", expected=f"at most {config.max_k}")


class SearchRequest(_Options):
    """What to search for: `query`, or `queries` for a batch."""

    query: Text | None = Field(None, description="One query.", examples=["who invented the telephone"])
    queries: list[Text] | None = Field(
        None, min_length=1, fail_fast=True, description="A batch of queries, answered in `results`."
    )

    def texts(self, config: ServeConfig) -> list[str]:
        """Return the queries. Raises ConfigError when there are none, both forms, too many or too long ones, or when
        they ask for too many hits."""
        if (self.query is None) == (self.queries is None):
            raise ConfigError("give either `query` or `queries`", expected="exactly one of them")
        texts = [self.query] if self.query is not None else list(self.queries or [])
        if len(texts) > config.max_batch:
            raise ConfigError(f"{len(texts)} queries in one request", expected=f"at most {config.max_batch}")
        for text in texts:
            check_query(text, config)
        self.check(config)
        if (num_hits := len(texts) * self.k) > config.max_hits:
            what = f"{len(texts)} queries with k {self.k} ask for {num_hits} hits"
            raise ConfigError(what, expected=f"at most {config.max_hits} in one answer")
        return texts


class BatchRequest(_Options):
    """Many queries, answered one a line and in order."""

    queries: list[str] = Field(
        min_length=1, fail_fast=True, description="One that is blank or too long gets a line that says so."
    )
    budget_ms: int | None = Field(None, ge=1, description="Time for each group of queries that are encoded together.")

    def check(self, config: ServeConfig) -> None:
        """Raise ConfigError when more is asked for than this server gives."""
        super().check(config)
        if len(self.queries) > config.max_stream:
            raise ConfigError(f"{len(self.queries)} queries in one batch", expected=f"at most {config.max_stream}")

    def group(self, texts: Sequence[str], version: str | None) -> SearchRequest:
        """Return the request for some of the queries. version: the one that the first group was answered from."""
        options = {name: getattr(self, name) for name in _Options.model_fields}
        return SearchRequest.model_construct(**{**options, "queries": list(texts), "query": None, "version": version})


def check_query(text: str, config: ServeConfig) -> None:
    """Raise ConfigError for a query that is blank or too long."""
    if len(text) > config.max_query_chars:
        raise ConfigError(f"a query of {len(text)} characters", expected=f"at most {config.max_query_chars}")
    if not text.strip():
        raise ConfigError("a query is blank", expected="some text")


class PassageModel(BaseModel):
    row: int
    id: str
    title: str
    text: str
    answers: list[str] | None = None
    metadata: dict[str, Any] | None = None


class HitModel(PassageModel):
    score: float
    rerank_score: float | None = None


class AnswerModel(BaseModel):
    """passage: id of the passage it was read from, if it was read from one. start, end: characters of its text."""

    text: str
    score: float
    passage: str | None = None
    start: int | None = None
    end: int | None = None


class SearchResponse(BaseModel):
    """`hits` and `answers` belong to `query`; `results` and `results_answers` to `queries`, in their order.

    Higher scores are better. complete: false when `skipped` names a stage that the time did not suffice for, or
    `missing_shards` the shards that did not answer in time.
    """

    alias: str
    version: str
    encoder: str
    complete: bool = True
    skipped: list[str] | None = None
    missing_shards: list[int] | None = None
    took_ms: dict[str, float]
    hits: list[HitModel] | None = None
    results: list[list[HitModel]] | None = None
    answers: list[AnswerModel] | None = None
    results_answers: list[list[AnswerModel]] | None = None
    explain: dict[str, Any] | None = None


class ProblemModel(BaseModel):
    """RFC 9457 problem details; `instance` holds the request's id, which is also in the header X-Request-Id."""

    type: str
    title: str
    status: int
    detail: str
    instance: str


class LineProblemModel(ProblemModel):
    """What one query of a batch came to. retry_after: seconds after which it may do better (429 and 503)."""

    retry_after: int | None = None


class BatchLine(BaseModel):
    """One line of a batch: an answer as of POST /search, or the `error` that this query alone came to.

    index: position of the query in `queries`. took_ms: with `explain`, of the queries that were searched together with
    this one.
    """

    index: int
    alias: str | None = None
    version: str | None = None
    encoder: str | None = None
    complete: bool | None = None
    skipped: list[str] | None = None
    missing_shards: list[int] | None = None
    hits: list[HitModel] | None = None
    answers: list[AnswerModel] | None = None
    took_ms: dict[str, float] | None = None
    explain: dict[str, Any] | None = None
    error: LineProblemModel | None = None


class VersionFacts(BaseModel):
    """A version that is loaded. state: "current", "previous", "pinned", "prepared". recall: as measured when built."""

    model_config = ConfigDict(extra="allow")

    alias: str
    version: str
    state: str
    num_rows: int
    dim: int
    factory: str
    encoder: str


class AliasState(BaseModel):
    model_config = ConfigDict(extra="allow")

    current: str
    previous: str | None
    versions: list[VersionFacts]


class AliasesModel(BaseModel):
    """default: the alias that is searched when none is named. stages: which of "reranker" and "reader" are there."""

    default: str
    stages: dict[str, bool]
    aliases: dict[str, AliasState]


class VersionsModel(BaseModel):
    versions: list[VersionFacts]


class ReadyModel(BaseModel):
    """`ready` alone, where a key is needed and none was sent; else what each alias points to as well."""

    ready: bool
    reranker: bool | None = None
    reader: bool | None = None
    aliases: dict[str, dict[str, Any]] | None = None


class AliasMoved(BaseModel):
    """The alias after the move."""

    model_config = ConfigDict(extra="allow")

    current: str
    previous: str | None


class PromoteRequest(_Asked):
    """Which version an alias shall point to."""

    alias: NameText
    version: NameText
    force: bool = Field(False, description="Switch even to a version whose quality is below the current one's.")


class RollbackRequest(_Asked):
    """Which alias shall point back to the version before."""

    alias: NameText


def found_json(
    request: SearchRequest, found: Sequence[Sequence[Hit]], given: Sequence[Sequence[Answer]] | None = None
) -> dict[str, Any]:
    """Return the hits and answers of a SearchResponse, in the form that was asked for: for one query or a batch."""
    hits = [[hit_json(hit) for hit in few[: request.k]] for few in found]
    one = request.query is not None
    content: dict[str, Any] = {"hits": hits[0]} if one else {"results": hits}
    if given is not None:
        read = [[answer_json(a, few) for a in some] for some, few in zip(given, found, strict=True)]
        content |= {"answers": read[0]} if one else {"results_answers": read}
    return content


def hit_json(hit: Hit) -> dict[str, Any]:
    """Return one hit as a HitModel describes it."""
    reranked = {} if hit.rerank_score is None else {"rerank_score": hit.rerank_score}
    return {"row": hit.row, "score": hit.score, **reranked, **hit.passage.as_dict()}


def answer_json(answer: Answer, hits: Sequence[Hit]) -> dict[str, Any]:
    """Return one answer as an AnswerModel describes it."""
    source = {"passage": hits[answer.passage].passage.id} if answer.passage >= 0 else {}
    span = {"start": answer.start, "end": answer.end} if answer.start >= 0 else {}
    return {"text": answer.text, "score": answer.score, **source, **span}
