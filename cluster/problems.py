"""What the HTTP API says when it refuses: RFC 9457 problem JSON. Nothing of the server's inside is in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from pipelines.errors import AccessError, ArtifactError, BusyError, ConfigError, InputError, PinakesError, QualityError

MEDIA_TYPE = "application/problem+json"

TITLES = {
    400: "The body can't be read",
    401: "A key is needed",
    403: "The key does not give this right",
    404: "Not found",
    405: "The method does not fit the path",
    408: "The request did not arrive in time",
    409: "The gate is shut",
    413: "The body is too large",
    415: "The body is not JSON",
    422: "The request can't be answered",
    429: "Too many requests",
    500: "The server failed",
    503: "Too busy, or out of time",
}
"""One problem type a status; `/docs#problem-STATUS` is its address and explains it."""

_DETAIL_OF_500 = "the cause is in the server's log, under the request's id"


class Problem(Exception):
    """Refuse the request under way. reason: one word for logs and metrics."""

    retry_seconds = 0.0
    """After which the same request may do better; 0 where it would not."""

    def __init__(self, status: int, detail: str, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        # A detail may repeat what was sent, and that may be no text at all: half a surrogate pair.
        self.detail = detail.encode("utf-8", "backslashreplace").decode()
        self.status, self.reason, self.headers = status, reason, dict(headers or {})

    def content(self, request_id: str) -> dict[str, Any]:
        """Return the members of the problem's JSON."""
        told = {"title": TITLES.get(self.status, "The request failed"), "status": self.status, "detail": self.detail}
        return {"type": f"/docs#problem-{self.status}", **told, "instance": f"urn:pinakes:request:{request_id}"}

    def waited(self, seconds: float) -> None:
        """Take a time that has passed off the Retry-After, which is in whole seconds and never none."""
        self.retry_seconds = max(0.0, self.retry_seconds - seconds)
        self.headers["Retry-After"] = whole_seconds(self.retry_seconds)

    def response(self, request_id: str) -> Response:
        return Response(to_json(self.content(request_id)), self.status, self.headers, MEDIA_TYPE)


def whole_seconds(seconds: float) -> str:
    """Return what a Retry-After may say, which is never nothing."""
    return str(max(1, math.ceil(seconds)))


def busy(detail: str, reason: str, retry_seconds: float, status: int = 503) -> Problem:
    """Return a refusal for now, with Retry-After in whole seconds."""
    problem = Problem(status, detail, reason)
    problem.retry_seconds = retry_seconds
    problem.waited(0.0)
    return problem


def of_error(error: PinakesError) -> Problem:
    """Return how an error of ours is told to callers: paths and hints, which speak to operators, stay here."""
    told = error.what + (f"; expected {error.expected}" if error.expected else "")
    if isinstance(error, BusyError):
        return busy(error.what, "busy", error.retry_seconds, error.status)
    if isinstance(error, ConfigError | InputError):
        return Problem(422, told, "invalid")
    if isinstance(error, ArtifactError):
        return Problem(404, error.what, "not_found")
    if isinstance(error, QualityError):
        return Problem(409, told, "gate")
    if isinstance(error, AccessError):
        return Problem(403, error.what, "scope")
    return failed()


def failed() -> Problem:
    """Return what callers learn of a failure that is not theirs: nothing but where its cause is to be found."""
    return Problem(500, _DETAIL_OF_500, "failed")
