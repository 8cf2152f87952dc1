"""POST /search/batch: many queries in, one line of JSON for each out, as they are answered.

Queries are encoded and searched in groups. All groups are answered from the version that answered the first one, so a
switch in the middle does not mix two vector spaces in one batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from pydantic_core import to_json

from cluster.access import Call
from cluster.api_models import BatchRequest, SearchRequest, check_query
from cluster.problems import Problem, failed, of_error
from cluster.telemetry import log_line
from pipelines.config import ServeConfig
from pipelines.errors import BusyError, PinakesError

GROUP = 64
"""Queries that are encoded together: enough to fill the arithmetic, few enough that lines come soon."""

Outcome = dict[str, Any] | Problem


class Batch:
    """One batch under way. search: the backend's; note: what counts an answer."""

    def __init__(
        self, request: BatchRequest, config: ServeConfig, call: Call, search: Any, note: Callable[..., None]
    ) -> None:
        self.request, self.config, self.call, self._search, self._note = request, config, call, search, note
        self.size = min(GROUP, config.max_batch, config.max_hits // request.k)
        self.version = request.version

    async def start(self) -> list[Outcome]:
        """Return the outcomes of the first group. Raises what they all came to, if that is one and the same error of
        the search: an alias that does not exist, say, is told by the status of the whole request. Queries that are no
        good have a line each, unless there are no others."""
        first = await self._group(0)
        problems = [outcome for outcome in first if isinstance(outcome, Problem)]
        if len(problems) == len(first) and len({(p.status, p.detail) for p in problems}) == 1:
            good = [self._fault(text) is None for text in self.request.queries]
            if any(good[: self.size]) or not any(good):
                raise problems[0]
        return first

    async def lines(self, first: Sequence[Outcome]) -> AsyncIterator[bytes]:
        """Yield the lines of a group at a time, those of `first` to begin with."""
        for start in range(0, len(self.request.queries), self.size):
            outcomes = await self._group(start) if start else first
            yield b"".join(self._line(start + i, outcome) for i, outcome in enumerate(outcomes))

    def _line(self, index: int, outcome: Outcome) -> bytes:
        told = {"error": self._error(outcome)} if isinstance(outcome, Problem) else outcome
        return to_json({"index": index, **told}) + b"\n"

    def _error(self, problem: Problem) -> dict[str, Any]:
        """Return a problem's JSON with when to come back: a line has no header to say it."""
        after = {"retry_after": math.ceil(problem.retry_seconds)} if problem.retry_seconds else {}
        return {**problem.content(self.call.request_id), **after}

    async def _group(self, start: int) -> list[Outcome]:
        texts = self.request.queries[start : start + self.size]
        faults = [self._fault(text) for text in texts]
        answers = iter(await self._ask([text for text, fault in zip(texts, faults, strict=True) if fault is None]))
        return [next(answers) if fault is None else fault for fault in faults]

    def _fault(self, text: str) -> Problem | None:
        """Return what is wrong with a query by itself."""
        try:
            check_query(text, self.config)
        except PinakesError as error:
            return of_error(error)
        return None

    async def _ask(self, texts: Sequence[str]) -> list[Outcome]:
        """Return the answer to each query. When they fail together each is tried alone, so that one does not spoil
        the others; but not by a server that is too busy."""
        if not texts:
            return []
        try:
            return await self._together(self.request.group(texts, self.version))
        except BusyError as error:
            return [of_error(error)] * len(texts)
        except Exception as error:
            if len(texts) == 1:
                return [self._problem(error)]
        return [outcome for text in texts for outcome in await self._ask([text])]

    def _problem(self, error: Exception) -> Problem:
        problem = of_error(error) if isinstance(error, PinakesError) else failed()
        if problem.status >= 500:
            log_line("failure", {"request_id": self.call.request_id, "route": self.call.route}, error)
        return problem

    async def _together(self, group: SearchRequest) -> list[Outcome]:
        budget_ms = min(self.request.budget_ms or self.config.budget_ms, self.config.budget_ms)
        answer = await self._search(group, time.monotonic() + budget_ms / 1000)
        self._note(answer, group)
        self.version = answer["version"]
        names = ["alias", "version", "encoder", "complete", "skipped", "missing_shards", "explain"]
        names += ["took_ms"] if self.request.explain else []
        shared = {name: answer[name] for name in names if name in answer}
        read = answer.get("results_answers")
        more = [{"answers": few} for few in read] if read is not None else [{}] * len(answer["results"])
        return [{**shared, "hits": hits, **m} for hits, m in zip(answer["results"], more, strict=True)]
