"""The door before Ray Serve: it lets in whom there is room for, and refuses as the API does."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from cluster import door
from cluster.access import ADMITTED, Access
from cluster.admission import Room
from cluster.session import DOOR, DOOR_LIMITS, choose_proxy
from cluster.telemetry import Metrics
from pipelines.config import ServeConfig
from tests.test_access import asked
from tests.test_admission import Slow, until

CONFIG = ServeConfig(max_ongoing=2, hold_ms=0, access_log=False)


@pytest.fixture(autouse=True)
def no_replica() -> Iterator[None]:
    """Leave no replica's room behind in this process."""
    yield
    door._of_this_process.clear()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_a_proxy_lets_in_as_many_as_it_was_told() -> None:
    async def crowd() -> None:
        slow, seen = Slow(), list[Any]()

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope)
            await slow(scope, receive, send)

        app = door.Door(serve, Room(2, 0.0))
        tasks = [asyncio.create_task(asked(app)) for _ in range(2)]
        await until(lambda: len(seen) == 2)
        status, headers, body = await asked(app, {"headers": [(b"x-request-id", b"mine")]})
        assert (status, headers[b"retry-after"], headers[b"x-request-id"]) == (503, b"1", b"mine")
        assert (headers[b"content-type"], headers[b"x-frame-options"]) == (b"application/problem+json", b"DENY")
        assert json.loads(body)["instance"] == "urn:pinakes:request:mine"
        always = [
            asyncio.create_task(asked(app, {"path": path})) for path in ("/health", "/ready", "/metrics", "/-/healthz")
        ]
        await until(lambda: len(seen) == 6)
        slow.gate.set()
        assert [(await task)[0] for task in (*tasks, *always)] == [200] * 6
        assert (await asked(app))[0] == 200
        assert not any(ADMITTED in scope for scope in seen)  # the replica behind counts for itself

    run(crowd)


def test_before_a_replica_both_count_the_same_once() -> None:
    async def crowd() -> None:
        metrics, slow = Metrics(), Slow()
        room = door.share_room(CONFIG)
        app = door.Door(Access(slow, CONFIG, None, metrics, room=room), Room(99, 0.0))
        tasks = [asyncio.create_task(asked(app)) for _ in range(2)]
        await until(lambda: room.working == 2)
        probe = asyncio.create_task(asked(app, {"path": "/health"}))
        assert [(await asked(app))[0] for _ in range(3)] == [503] * 3
        slow.gate.set()
        assert [(await task)[0] for task in (*tasks, probe)] == [200] * 3
        assert (room.working, room.held) == (0, 0)
        assert b'pinakes_refused_requests_total{reason="in_flight"' in metrics.page({"versions": []})

    run(crowd)


def test_a_place_is_given_back_whatever_happens() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    async def fail() -> None:
        app = door.Door(broken, room := Room(1, 0.0))
        for _ in range(3):
            with pytest.raises(RuntimeError, match="broken"):
                await asked(app)
        assert room.working == 0

    run(fail)


def test_other_protocols_pass() -> None:
    async def lifespan() -> None:
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["type"])

        await door.Door(app, Room(1, 0.0))({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
        assert seen == ["lifespan"]

    run(lifespan)


def test_a_cluster_is_told_of_the_door_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DOOR[0], DOOR_LIMITS):
        monkeypatch.setenv(name, "to be put back after the test")
        monkeypatch.delenv(name)
    room = door.middlewares()[0].kwargs["room"]
    assert (room.size, room.hold_seconds) == (256, 1.0)
    choose_proxy(ServeConfig(max_ongoing=5, replicas=(1, 3), hold_ms=250))
    assert os.environ[DOOR[0]] == "cluster.door:middlewares"
    (middleware,) = door.middlewares()
    room = middleware.kwargs["room"]
    assert (middleware.cls, room.size, room.hold_seconds) == (door.Door, 15, 0.25)
