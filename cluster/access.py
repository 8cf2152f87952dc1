"""Who may ask, how much and how often: what stands between the socket and the routes, as one pure ASGI middleware.

    id -> room -> key -> rate -> body -> the routes -> headers -> metrics, log, trace

Refusals for want of room, or beyond the rate, are held back (`cluster.admission`). An error that nobody expected ends
here, too: the caller learns the request's id, the log all the rest.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any

from cluster.admission import RateLimit, Room
from cluster.problems import Problem, busy, failed
from cluster.session import DOOR
from cluster.telemetry import Metrics, Tracer, log_line
from pipelines.access_keys import AccessKey, KeyRing
from pipelines.config import ServeConfig

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_OPEN = {"/", "/health", "/ready", "/docs", "/openapi.json"}
ALWAYS = {"/health", "/ready", "/metrics"}
"""Operators' paths, which are answered however many requests are under way."""
ADMITTED = "pinakes.admitted"
"""The key of a scope whose request has its place already (`cluster.door`)."""
DOOR_HEADER, HOLD_HEADER = b"x-pinakes-door", b"x-pinakes-hold"
"""What a door tells the API (its refusals that nobody has counted yet: "in_flight=3,reading=1"), and the API a door
(the seconds after which a refused request may come back: the door holds the refusal)."""
WITH_BODY = {"POST", "PUT", "PATCH"}
BODY_SECONDS = 30.0
_KEYS_SECONDS = 1.0
_MOST_DIGITS = 18
_GONE = 499
"""In logs and metrics alone: the caller did not wait for the answer (nginx made the number known)."""
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
}


class _Gone(Exception):
    """The caller went away before the request was whole."""


class Call:
    """One request: who asks, what its route found out (`facts`, for log and trace), and what was answered."""

    def __init__(self, scope: Message, headers: dict[str, str], send: Send, tells_id: bool) -> None:
        given = headers.get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.began = time.perf_counter()
        self.key: AccessKey | None = None
        self.facts: dict[str, Any] = {}
        self.status, self.refused, self._scope, self._send = 0, "", scope, send
        self._id_header = [(b"x-request-id", self.request_id.encode())] if tells_id else []
        self.charge: Callable[[int], None] = lambda num: None

    @property
    def route(self) -> str:
        """The path with its parameters' names in it, so that there are few of them."""
        return getattr(self._scope.get("route"), "path", "") or "none"

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    async def send(self, message: Message) -> None:
        """Pass a message on; the first one gets the headers that every answer bears."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", []))
            known = {name.lower() for name, _ in headers}
            headers += [pair for pair in _HEADERS.items() if pair[0] not in known]
            message = {**message, "headers": headers + self._id_header}
        await self._send(message)

    async def refuse(self, problem: Problem, receive: Receive) -> None:
        self.refused = problem.reason
        await problem.response(self.request_id)(self._scope, receive, self.send)


class Access:
    """The middleware. keys: None where no key is ever needed. tells_id: whether answers bear the request's id; Ray
    Serve's proxies add it themselves. room: if others count it, too."""

    def __init__(
        self,
        app: Any,
        config: ServeConfig,
        keys: KeyRing | None,
        metrics: Metrics,
        tracer: Tracer | None = None,
        tells_id: bool = True,
        room: Room | None = None,
    ) -> None:
        self.app, self.config, self.keys, self.metrics, self.tracer = app, config, keys, metrics, tracer
        self.tells_id = tells_id
        self.limit = RateLimit(config.rate_per_second, config.rate_burst) if config.rate_per_second else None
        self.room = room or Room(config.max_ongoing, config.hold_ms / 1000)
        metrics.watch(self.room)
        self.door_stands = os.environ.get(DOOR[0]) == DOOR[1]
        self._reading: asyncio.Task[None] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        call = scope["pinakes"] = Call(scope, headers, send, self.tells_id)
        try:
            await self._answer(scope, headers, receive, call)
        except _Gone:
            call.status = _GONE
        except asyncio.CancelledError:
            call.status = call.status or _GONE
            raise
        except Exception as error:
            log_line("failure", {"request_id": call.request_id, "route": call.route}, error)
            if call.status:
                raise  # part of an answer is out: the server cuts the connection, and the caller sees it
            await call.refuse(failed(), receive)
        finally:
            self._record(scope["method"], headers, call)

    async def _answer(self, scope: Message, headers: dict[str, str], receive: Receive, call: Call) -> None:
        path = path_of(scope)
        told = headers.get(DOOR_HEADER.decode())
        behind_door = ADMITTED in scope or (self.door_stands and told is not None)
        try:
            if behind_door and told:
                self._count_refused(told)
            with nullcontext() if ADMITTED in scope else self.room.place(always=path in ALWAYS):
                await self.app(scope, await self._admit(path, scope, headers, receive, call), call.send)
        except Problem as problem:
            if not behind_door:
                await self.room.put_off(problem, headers)
            elif problem.retry_seconds:
                problem.headers[HOLD_HEADER.decode()] = f"{problem.retry_seconds:.3f}"
            await call.refuse(problem, receive)

    def _count_refused(self, told: str) -> None:
        for reason, _, number in (pair.partition("=") for pair in told.split(",")):
            self.metrics.refused(reason, int(number))

    async def _admit(self, path: str, scope: Message, headers: dict[str, str], receive: Receive, call: Call) -> Receive:
        """Return a `receive` that gives the whole body. Raises Problem for who may not pass."""
        if self.keys is not None:
            await self._refresh(self.keys)
            call.key = self._key(self.keys, headers)
        self._check_scope(path, call.key)
        if self.limit and path not in _OPEN:
            self._check_rate(self.limit, scope, call)
        if scope["method"] not in WITH_BODY:
            return receive
        body = await self._body(headers, receive)
        return replay([{"type": "http.request", "body": body, "more_body": False}], receive)

    async def _refresh(self, keys: KeyRing) -> None:
        """Read the keys again when they are due, on a thread; a store that is slow to answer is not waited for long."""
        if keys.stale and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(asyncio.to_thread(keys.refresh))
            await asyncio.wait({self._reading}, timeout=_KEYS_SECONDS)

    def _key(self, keys: KeyRing, headers: dict[str, str]) -> AccessKey | None:
        """Return the key that was presented, None without one. Raises Problem (401) for one that is not good."""
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        presented = headers.get("x-api-key") or (bearer.strip() if kind.lower() == "bearer" else "")
        if not presented:
            return None
        key = keys.find(presented)
        if key is None:
            raise _unauthorised("the key is not known here")
        if key.expired():
            raise _unauthorised(f"the key {key.id} has expired")
        return key

    def _check_scope(self, path: str, key: AccessKey | None) -> None:
        admin = self.config.admin_routes and path.startswith("/admin/")
        if not admin and (path in _OPEN or not self.config.require_key):
            return
        if key is None:
            raise _unauthorised("send a key: Authorization: Bearer KEY, or X-Api-Key: KEY")
        wanted = "admin" if admin else "search"
        if wanted not in key.scopes and path != "/metrics":
            raise Problem(403, f"the key {key.id} lacks the scope {wanted!r}", "scope")

    def _check_rate(self, limit: RateLimit, scope: Message, call: Call) -> None:
        caller = call.key.id if call.key else (scope.get("client") or ["?"])[0]

        def refuse(wait: float) -> None:
            if wait:
                raise busy(f"more than {limit.rate:g} queries a second", "rate", wait, 429)

        refuse(limit.wait_seconds(caller))
        call.charge = lambda num: refuse(limit.charge(caller, num))

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """Return the whole body. Raises Problem for one that is no JSON, too large (413) or too slow (408)."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise Problem(415, "send the header Content-Type: application/json", "media_type")
        most = self.config.max_body_bytes
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > _MOST_DIGITS or int(declared) > most):
            raise _too_large(most)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await _read(receive, most)
        except TimeoutError:
            raise too_slow() from None

    def _record(self, method: str, headers: dict[str, str], call: Call) -> None:
        """Tell metrics, log and trace what became of a request."""
        seconds = call.seconds
        # Callers can think up methods; in metrics each would be kept for ever.
        self.metrics.request(call.route, method if method in _METHODS else "other", call.status, seconds)
        if call.refused:
            self.metrics.refused(call.refused)
        if self.config.access_log:
            who = {"key": call.key.id} if call.key else {}
            told = {"request_id": call.request_id, "method": method, "route": call.route, "status": call.status}
            refused = {"refused": call.refused} if call.refused else {}
            log_line("request", {**told, "ms": round(seconds * 1000, 3), **who, **refused, **call.facts})
        if self.tracer:
            self.tracer.request(call, method, headers)


def path_of(scope: Message) -> str:
    """Return the path without the prefix that a server before this one took off."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


async def _read(receive: Receive, most: int) -> bytes:
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body"):
            return b"".join(pieces)


def replay(messages: Sequence[Message], receive: Receive) -> Receive:
    """Return a `receive` that gives the messages again before those that are still to come."""
    left = list(reversed(messages))

    async def next_message() -> Message:
        return left.pop() if left else await receive()

    return next_message


def too_slow() -> Problem:
    return Problem(408, f"the body took longer than {BODY_SECONDS:.0f} seconds", "slow_body")


def _too_large(most: int) -> Problem:
    return Problem(413, f"the body is larger than {most} bytes", "body", {"Connection": "close"})


def _unauthorised(detail: str) -> Problem:
    return Problem(401, detail, "key", {"WWW-Authenticate": "Bearer"})


def exposure(config: ServeConfig) -> str | None:
    """Return a warning when whoever reaches this machine may search, else None."""
    if config.require_key or _is_loopback(config.host):
        return None
    return (
        f"serving on {config.host} without keys: whoever reaches port {config.port} can search. "
        "Set serve.require_key=true and make keys with `pinakes keys create NAME`"
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
