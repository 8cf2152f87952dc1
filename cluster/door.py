"""The door before Ray Serve: who finds no room is put off here, at a tenth of what Serve takes to pass a request on.

    HAProxy -> door -> Serve's replica -> the API          (the door counts the replica's own room)
    Serve's Python proxy, behind a door -> replica -> the API   (the door counts what this proxy has let in)

Ray puts it there where the environment of the cluster says so before it starts (`choose_proxy`). Elsewhere the API
refuses by itself (`cluster.access`): the same words, for more work.
"""

from __future__ import annotations

import json
import os
from typing import Any

from starlette.middleware import Middleware

from cluster.access import ADMITTED, ALWAYS, Call, Message, Receive, Send, path_of
from cluster.admission import Room
from cluster.session import DOOR_LIMITS
from pipelines.config import ServeConfig

_of_this_process: list[Room] = []


def middlewares() -> list[Middleware]:
    """Return what Ray Serve puts before its HTTP servers (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH)."""
    usual = ServeConfig()
    size, hold_seconds = json.loads(os.environ.get(DOOR_LIMITS, f"[{usual.max_ongoing}, {usual.hold_ms / 1000}]"))
    return [Middleware(Door, room=Room(size, hold_seconds))]


def share_room(config: ServeConfig) -> Room:
    """Return the room of this process's replica, which a door before it will count as well."""
    _of_this_process[:] = [Room(config.max_ongoing, config.hold_ms / 1000)]
    return _of_this_process[0]


class Door:
    """Let requests in while there is room. room: of a process without a replica."""

    def __init__(self, app: Any, room: Room) -> None:
        self.app, self._own = app, room

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = path_of(scope) if scope["type"] == "http" else ""
        if not path or path in ALWAYS or path.startswith("/-/"):  # these are Serve's own
            await self.app(scope, receive, send)
            return
        room = _of_this_process[0] if _of_this_process else self._own
        if not room.full:
            with room.place():
                if room is not self._own:
                    scope[ADMITTED] = True
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        problem = room.refusal()
        await room.put_off(problem, headers)
        await Call(scope, headers, send, tells_id=True).refuse(problem, receive)
        room.refused(problem.reason)
