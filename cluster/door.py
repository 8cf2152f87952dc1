"""The door before Ray Serve: it refuses what finds no room at a tenth of what Serve takes to pass a request on.

    HAProxy -> door -> Serve's replica -> the API               (the door counts the replica's own room)
    Serve's Python proxy, behind a door -> replica -> the API   (the door counts what this proxy has let in)

A request takes its place when its body has come whole, and gives it back before a refusal is held: neither slow callers
nor those beyond their rate take room from others. Headers by which callers could steer Ray Serve are taken off. Behind
the Python proxy a search whose replica died unanswered is asked of another one (HAProxy does so by itself).

Ray puts the door there where the environment of the cluster says so before it starts (`choose_proxy`). Elsewhere the
API refuses by itself (`cluster.access`): the same words, for more work.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import Counter
from typing import Any

from starlette.middleware import Middleware

from cluster.access import (
    ADMITTED,
    ALWAYS,
    BODY_SECONDS,
    DOOR_HEADER,
    HOLD_HEADER,
    REQUEST_ID,
    WITH_BODY,
    Call,
    Message,
    Receive,
    Send,
    path_of,
    replay,
    too_slow,
)
from cluster.admission import Room
from cluster.problems import Problem, busy, failed, whole_seconds
from cluster.session import DOOR_LIMITS
from cluster.telemetry import log_line, open_log
from pipelines.config import ServeConfig

_STEERING = {
    "x_request_timeout_seconds",
    "x_request_disconnect_disabled",
    "serve_multiplexed_model_id",
    os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().replace("-", "_"),
    DOOR_HEADER.decode().replace("-", "_"),
}
"""Headers that Ray Serve, or we, would obey; hyphens as underscores, as Ray compares them."""
_AGAIN = {"/search", "/search/batch"}
_TRIES = 3
_RETRY_SECONDS = 0.05
_SEND_SECONDS = 60.0
_MOST_READING = 1024
_OURS = b"x-content-type-options"  # every answer of the API bears it (`Call.send`); Ray's own do not

_of_this_process: list[Room] = []


def middlewares() -> list[Middleware]:
    """Return what Ray Serve puts before its HTTP servers (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    return [Middleware(Door, config=ServeConfig.model_validate_json(os.environ.get(DOOR_LIMITS, "{}")))]


def share_room(config: ServeConfig) -> Room:
    """Return the room of this process's replica, which a door before it will count as well."""
    _of_this_process[:] = [Room(config.max_ongoing, config.hold_ms / 1000)]
    return _of_this_process[0]


class Door:
    """Let requests in while there is room. config: the limits; max_ongoing counts in processes without a replica."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.app, self.config = app, config
        self._own = Room(config.max_ongoing, config.hold_ms / 1000)
        self._untold: Counter[str] = Counter()
        self._own.refused = lambda reason: self._untold.update([reason])
        self._reading = 0
        if config.access_log:
            open_log()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = path_of(scope) if scope["type"] == "http" else ""
        if not path or path.startswith("/-/"):  # these are Serve's own
            await self.app(scope, receive, send)
            return
        room = _of_this_process[0] if _of_this_process else self._own
        visit = _Visit(scope, receive, send, room, room is self._own)
        try:
            await self._answer(path, room, visit)
        except Problem as problem:
            await room.put_off(problem, visit.headers)
            await visit.refuse(problem)
            room.refused(problem.reason)
            if self.config.access_log:
                facts = {"request_id": visit.request_id, "method": scope["method"], "route": "door"}
                log_line("request", {**facts, "status": problem.status, "refused": problem.reason})

    async def _answer(self, path: str, room: Room, visit: _Visit) -> None:
        """Pass a request on. Raises Problem for one that finds no room, or whose replica died."""
        if room.full and path not in ALWAYS:
            raise room.refusal()
        if path not in ALWAYS:
            await self._read(visit)
        if visit.gone:
            return
        with room.place(always=path in ALWAYS) as leave:
            visit.leave = leave
            if room is not self._own:
                await self._pass(visit, {ADMITTED: True}, "")
                return
            tries = _TRIES if visit.whole and (path in _AGAIN or visit.method not in WITH_BODY) else 1
            for number in range(tries):
                await asyncio.sleep(_RETRY_SECONDS * number)
                told = ",".join(f"{reason}={number}" for reason, number in self._untold.items())
                self._untold.clear()
                await self._pass(visit, {}, told)
                if visit.begun or visit.gone:
                    return
                if visit.put_aside:
                    break
            raise busy("no replica answers now", "no_replica", 1.0) if visit.put_aside or tries > 1 else failed()

    async def _pass(self, visit: _Visit, more: Message, untold: str) -> None:
        """Have the request answered. Raises Problem (500) where that breaks before any of the answer is out."""
        try:
            await self.app(visit.scope(more, untold), visit.replayed(), visit.send)
        except Exception as error:
            if visit.begun:
                raise  # the server cuts the connection, and the caller sees it
            log_line("failure", {"request_id": visit.request_id, "route": "door"}, error)
            raise failed() from error

    async def _read(self, visit: _Visit) -> None:
        """Wait for the body; it takes no place meanwhile. Raises Problem for one too slow, and for one of too many."""
        if self._reading >= _MOST_READING:
            raise busy(f"{_MOST_READING} requests are on their way in", "reading", 1.0)
        self._reading += 1
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await visit.read(self.config.max_body_bytes)
        except TimeoutError:
            raise too_slow() from None
        finally:
            self._reading -= 1


class _Visit:
    """One request at the door: its clean headers, what has been read of its body, and whether its answer has begun."""

    def __init__(self, scope: Message, receive: Receive, send: Send, room: Room, may_be_rays: bool) -> None:
        """may_be_rays: whether answers come from Ray's proxy, which has some of its own."""
        self._scope, self._receive, self._send, self._room = scope, receive, send, room
        self._may_be_rays = may_be_rays
        self.method = scope["method"]
        clean = [(name, value) for name, value in scope["headers"] if _plain(name) not in _STEERING]
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in clean}
        given = self.headers.get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._headers = [pair for pair in clean if pair[0] != b"x-request-id"]
        self._headers.append((b"x-request-id", self.request_id.encode()))
        self._pieces: list[Message] = []
        self._start: Message | None = None
        self.whole = False
        self.begun = self.gone = self.put_aside = False
        self.leave = lambda: None

    def scope(self, more: Message, untold: str) -> Message:
        """Return the scope of one try. untold: refusals that no replica has counted yet."""
        return {**self._scope, **more, "headers": [*self._headers, (DOOR_HEADER, untold.encode())]}

    async def read(self, most: int) -> None:
        """Keep the body's messages until it is whole, or larger than `most`, which the API refuses."""
        size = 0
        while not self.whole and size <= most:
            message = await self.receive()
            self._pieces.append(message)
            size += len(message.get("body", b""))
            self.whole = not message.get("more_body")

    async def receive(self) -> Message:
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message

    def replayed(self) -> Receive:
        return replay(self._pieces, self.receive)

    async def send(self, message: Message) -> None:
        """Pass an answer on; hold it back where it refuses for a while; put aside what Ray says in words of its own.

        Raises TimeoutError when the caller takes nothing for long: it may not keep its place.
        """
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self.put_aside = self._may_be_rays and message["status"] in (408, 429, 503) and _OURS not in headers
            if hold := headers.pop(HOLD_HEADER, None):
                message = {**message, "headers": await self._held(headers, float(hold))}
            self._start = message  # it goes out with what follows: nothing is out when a replica dies in between
        elif not self.put_aside:
            start, self._start, self.begun = self._start, None, True
            async with asyncio.timeout(_SEND_SECONDS):
                if start is not None:
                    await self._send(start)
                await self._send(message)
            if not message.get("more_body"):
                self.leave()  # before this loop hears of the caller again, whatever the server has yet to put away

    async def _held(self, headers: dict[bytes, bytes], retry_seconds: float) -> list[tuple[bytes, bytes]]:
        self.leave()
        left = retry_seconds - await self._room.hold(retry_seconds, self.headers)
        return list({**headers, b"retry-after": whole_seconds(left).encode()}.items())

    async def refuse(self, problem: Problem) -> None:
        self._may_be_rays = False
        call = Call(self._scope, {"x-request-id": self.request_id}, self.send, tells_id=True)
        await call.refuse(problem, self.receive)


def _plain(name: bytes) -> str:
    return name.decode("latin-1").lower().replace("-", "_")
