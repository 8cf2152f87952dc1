"""A client of the HTTP API, typed, made of the standard library alone.

    with Client("http://127.0.0.1:8000", key="pk_…") as client:
        for hit in client.search("who invented the telephone", k=5).hits:
            print(hit.score, hit.passage.title)

Connections stay open between requests, and threads may share a client. A server that is too busy (429, 503) is asked
again when it said so, as long as that fits into `timeout`; and one that dropped an idle connection at once. Requests to
/admin/ are sent once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, TypedDict, Unpack
from urllib.parse import quote, urlencode

from pipelines.client_transport import Transport, refused
from pipelines.errors import PinakesError, ServiceError
from pipelines.schema import Hit, Passage

_BATCH = 1000
"""Queries that `search_batch` sends at once."""
_BATCH_PATH = "/search/batch"


class SearchOptions(TypedDict, total=False):
    """How to search; what is left out is for the server to say.

    k: hits. alias, version: which index. rerank, answer: whether these stages follow. explain: say how the answer came
    about. budget_ms: time, in which a stage that does not fit is left out. filter: on the passages' metadata.
    """

    k: int
    alias: str
    version: str
    rerank: bool
    answer: bool
    explain: bool
    budget_ms: int
    filter: dict[str, Any]


@dataclass(frozen=True)
class FoundAnswer:
    """An answer. passage: id of the hit it was read from, if it was. start, end: characters of that hit's text."""

    text: str
    score: float
    passage: str | None = None
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class SearchResult:
    """What one query found. complete: False where `skipped` names stages, or `missing_shards` shards, that were too
    slow. took_ms: of the server's stages; in a batch only with explain, for those searched together.
    answers: None unless asked for."""

    alias: str
    version: str
    encoder: str
    hits: list[Hit]
    answers: list[FoundAnswer] | None = None
    complete: bool = True
    skipped: list[str] = field(default_factory=list)
    missing_shards: list[int] = field(default_factory=list)
    took_ms: dict[str, float] = field(default_factory=dict)
    explain: dict[str, Any] | None = None


@dataclass(frozen=True)
class ServedVersion:
    """A version that is loaded. state: "current", "previous" or "pinned". facts: all that the server tells of it."""

    alias: str
    version: str
    state: str
    num_rows: int
    dim: int
    factory: str
    encoder: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class ServedAlias:
    name: str
    current: str
    previous: str | None
    versions: list[ServedVersion]


class Client:
    """Ask the server at `url`. timeout: seconds that a request may take, repetitions and all.

    Methods raise ServiceError when there is no answer, BusyError when the server stayed too busy, AccessError for a
    missing or insufficient key, ArtifactError for what does not exist, ConfigError for a request that cannot be meant.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 60.0) -> None:
        self._http, self.timeout = Transport(url, key, timeout), timeout

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are idle; a closed client opens new ones when it is used again."""
        self._http.close()

    def search(self, query: str, **options: Unpack[SearchOptions]) -> SearchResult:
        """Return what one query finds."""
        return _result(self.ask("POST", "/search", {"query": query, **options}))

    def search_batch(
        self, queries: Iterable[str], **options: Unpack[SearchOptions]
    ) -> Iterator[SearchResult | PinakesError]:
        """Yield what each query finds, in order and as it comes; for a query that failed alone, its error.

        All are answered from one version, also when the alias moves meanwhile. An answer that breaks off is asked for
        again from there on.
        """
        source, chosen = iter(queries), options.copy()
        while group := list(islice(source, _BATCH)):
            for outcome in self._group(group, chosen):
                if isinstance(outcome, SearchResult):
                    chosen["alias"], chosen["version"] = outcome.alias, outcome.version
                yield outcome

    def passage(self, passage_id: str, alias: str | None = None, version: str | None = None) -> Passage:
        """Return the passage with this id."""
        chosen = {name: value for name, value in (("alias", alias), ("version", version)) if value is not None}
        path = f"/passages/{quote(passage_id, safe='')}" + (f"?{urlencode(chosen)}" if chosen else "")
        return _passage(self.ask("GET", path))

    def aliases(self) -> list[ServedAlias]:
        """Return the aliases, each with its loaded versions."""
        return [
            ServedAlias(name, told["current"], told["previous"], [_version(v) for v in told["versions"]])
            for name, told in self.ask("GET", "/aliases")["aliases"].items()
        ]

    def versions(self) -> list[ServedVersion]:
        """Return the versions that are loaded."""
        return [_version(told) for told in self.ask("GET", "/versions")["versions"]]

    def ready(self) -> bool:
        """Say whether the server answers and is ready; never raises for one that is not there."""
        try:
            return bool(self.ask("GET", "/ready").get("ready"))
        except ServiceError:
            return False

    def ask(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON of any route, such as ("POST", "/admin/promote", {…})."""
        with self._http.answer(method, path, content) as response:
            data = response.read()
        try:
            told = json.loads(data)
        except ValueError as error:
            raise self._http.no_answer(path, error) from error
        if not isinstance(told, dict):
            raise self._http.no_answer(path, ValueError("the answer is no JSON object"))
        return told

    # Inside

    def _group(self, group: Sequence[str], options: SearchOptions) -> Iterator[SearchResult | PinakesError]:
        done, deadline = 0, time.monotonic() + self.timeout
        while done < len(group):
            before = done
            for line in self._lines({"queries": group[done:], **options}):
                done += 1
                yield _outcome(line, f"query {done} of the batch")
            if done < len(group) and (done == before or time.monotonic() > deadline):
                broken = EOFError(f"its answer broke off after {done} of {len(group)} lines")
                raise self._http.no_answer(_BATCH_PATH, broken)

    def _lines(self, content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the lines of a batch, fewer when the answer breaks off."""
        begun = False
        try:
            with self._http.answer("POST", _BATCH_PATH, content) as response:
                begun = True
                while line := response.readline():
                    yield json.loads(line)
        except (ServiceError, ValueError):
            if not begun:
                raise


def _outcome(line: Mapping[str, Any], where: str) -> SearchResult | PinakesError:
    return refused(line["error"], where) if line.get("error") else _result(line)


def _result(told: Mapping[str, Any]) -> SearchResult:
    answers = told.get("answers")
    names = ("alias", "version", "encoder", "complete", "skipped", "missing_shards", "took_ms", "explain")
    return SearchResult(
        hits=[Hit(h["row"], h["score"], _passage(h), h.get("rerank_score")) for h in told["hits"]],
        answers=None if answers is None else [_picked(FoundAnswer, answer) for answer in answers],
        **{name: told[name] for name in names if told.get(name) is not None},
    )


def _passage(told: Mapping[str, Any]) -> Passage:
    passage: Passage = _picked(Passage, told)
    return passage


def _version(told: Mapping[str, Any]) -> ServedVersion:
    version: ServedVersion = _picked(ServedVersion, {**told, "facts": dict(told)})
    return version


def _picked(kind: Any, told: Mapping[str, Any]) -> Any:
    """Return a `kind` of what it knows; a newer server may tell more."""
    return kind(**{name: told[name] for name in kind.__dataclass_fields__ if name in told})
