"""The door before Ray Serve: it lets in whom there is room for, and refuses as the API does."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from cluster import door
from cluster.access import ADMITTED, DOOR_HEADER, HOLD_HEADER, Access, replay
from cluster.session import DOOR, DOOR_LIMITS, choose_proxy
from cluster.telemetry import Metrics
from pipelines.config import ServeConfig
from tests.test_access import asked, fine
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

        app = door.Door(serve, CONFIG)
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
        app = door.Door(Access(slow, CONFIG, None, metrics, room=room), CONFIG.model_copy(update={"max_ongoing": 99}))
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
        app = door.Door(broken, CONFIG)
        for _ in range(3):
            status, headers, _ = await asked(app)
            assert (status, headers[b"content-type"]) == (500, b"application/problem+json")
        assert app._own.working == 0

    run(fail)


def test_other_protocols_pass() -> None:
    async def lifespan() -> None:
        seen: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["type"])

        await door.Door(app, CONFIG)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
        assert seen == ["lifespan"]

    run(lifespan)


def test_a_cluster_is_told_of_the_door_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DOOR[0], DOOR_LIMITS, "FORWARDED_ALLOW_IPS"):
        monkeypatch.setenv(name, "to be put back after the test")
        monkeypatch.delenv(name)
    assert door.middlewares()[0].kwargs["config"] == ServeConfig()
    choose_proxy(ServeConfig(max_ongoing=5, replicas=(1, 3), hold_ms=250, max_body_bytes=2048, access_log=False))
    assert os.environ[DOOR[0]] == "cluster.door:middlewares"
    assert os.environ["FORWARDED_ALLOW_IPS"] == ""
    (middleware,) = door.middlewares()
    told = ServeConfig(max_ongoing=15, hold_ms=250, max_body_bytes=2048, access_log=False)
    assert (middleware.cls, middleware.kwargs["config"]) == (door.Door, told)


# What a proxy's door does for the API behind it

SEARCH = {"method": "POST", "path": "/search", "headers": [(b"content-type", b"application/json")]}


class Replica:
    """What Ray's proxy is to the door: it dies `deaths` times before it answers, or says `words` of its own.

    begins: whether it dies between the head of its answer and the rest.
    """

    def __init__(self, app: Any = fine, deaths: int = 0, words: int = 0, begins: bool = False) -> None:
        self.app, self.deaths, self.words, self.begins = app, deaths, words, begins
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.bodies.append((await receive()).get("body", b""))
        if len(self.scopes) <= self.deaths:
            if self.begins:
                await send(
                    {"type": "http.response.start", "status": 200, "headers": [(b"x-content-type-options", b"")]}
                )
            return  # Ray's proxy says nothing when a replica dies, and its HTTP server "Internal Server Error"
        if self.words:
            await send({"type": "http.response.start", "status": self.words, "headers": [(b"x-request-id", b"1")]})
            await send({"type": "http.response.body", "body": b"Ray says no"})
            return
        again = {"type": "http.request", "body": self.bodies[-1], "more_body": False}
        await self.app(scope, replay([again], receive), send)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(
    ("request_", "deaths", "status", "tries"),
    [
        (SEARCH, 2, 200, 3),
        (SEARCH, 3, 503, 3),
        ({"path": "/passages/1"}, 1, 200, 2),
        ({**SEARCH, "path": "/admin/rollback"}, 1, 500, 1),
    ],
)
def test_what_a_dead_replica_left_unanswered_is_asked_of_another(
    request_: dict[str, Any], deaths: int, status: int, tries: int, begins: bool
) -> None:
    async def die() -> None:
        replica = Replica(deaths=deaths, begins=begins)
        body = [{"type": "http.request", "body": b'{"query": "x"}', "more_body": False}]
        app = door.Door(replica, CONFIG)
        answer = await asked(app, request_, body)
        assert (answer[0], len(replica.scopes)) == (status, tries)
        assert set(replica.bodies) == {b'{"query": "x"}'}
        ids = {dict(scope["headers"])[b"x-request-id"] for scope in replica.scopes}
        assert len(ids) == 1
        if status != 200:
            assert answer[1][b"content-type"] == b"application/problem+json"
            assert json.loads(answer[2])["instance"].encode().endswith(ids.pop())
        assert app._own.working == 0

    run(die)


@pytest.mark.parametrize("status", [408, 429, 503])
def test_what_ray_says_in_its_own_words_is_told_in_ours(status: int) -> None:
    async def busy() -> None:
        found, headers, body = await asked(door.Door(Replica(words=status), CONFIG))
        assert (found, headers[b"retry-after"], json.loads(body)["title"]) == (503, b"1", "Too busy, or out of time")

    run(busy)


def limited(**settings: Any) -> door.Door:
    """Return a door before an API that answers one query of a caller, and no other for long."""
    config = CONFIG.model_copy(update={"rate_burst": 1, **settings})
    return door.Door(Access(fine, config, None, Metrics()), config)


def test_callers_beyond_their_rate_take_no_room_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*DOOR)

    async def crowd() -> None:
        app = limited(hold_ms=10_000, rate_per_second=0.01)
        assert (await asked(app))[0] == 200
        held = [asyncio.create_task(asked(app)) for _ in range(5)]
        await until(lambda: app._own.held == 5)
        assert app._own.working == 0
        assert (await asked(app, {"client": ("10.0.0.2", 1)}))[0] == 200
        for task in held:
            task.cancel()
        assert await asyncio.gather(*held, return_exceptions=True)
        assert app._own.held == 0

    run(crowd)


def test_a_held_refusal_says_what_is_left_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*DOOR)

    async def ask() -> None:
        app = limited(hold_ms=20, rate_per_second=0.25)
        assert (await asked(app))[0] == 200
        status, headers, _ = await asked(app)
        assert (status, headers[b"retry-after"]) == (429, b"4")
        assert HOLD_HEADER not in headers

    run(ask)


def test_headers_that_ray_would_obey_stay_outside() -> None:
    headers = [
        (b"x-request-id", b"\xff"),
        (b"X-Request-Timeout-Seconds", b"0.01"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"x-session-id", b"\xff"),
        (DOOR_HEADER, b"999999"),
        (b"x-api-key", b"mine"),
    ]

    async def steer() -> None:
        replica = Replica()
        assert (await asked(door.Door(replica, CONFIG), {"headers": headers}))[0] == 200
        seen = dict(replica.scopes[0]["headers"])
        assert set(seen) == {b"x-request-id", b"x-api-key", DOOR_HEADER}
        assert len(seen[b"x-request-id"]) == 32
        assert seen[DOOR_HEADER] == b""

    run(steer)


def test_a_body_takes_no_room_before_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "BODY_SECONDS", 0.1)
    part = {"type": "http.request", "body": b"{", "more_body": True}

    async def trickle() -> None:
        app = door.Door(replica := Replica(), CONFIG)

        async def receive() -> Any:
            await asyncio.sleep(0.03)
            return part

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "client": ("10.0.0.1", 1), **SEARCH}
        slow = [asyncio.create_task(app(dict(scope), receive, send)) for _ in range(3)]
        await until(lambda: app._reading == 3)
        assert app._own.working == 0
        assert (await asked(app))[0] == 200
        await asyncio.gather(*slow)
        assert [m["status"] for m in sent if m["type"] == "http.response.start"] == [408] * 3
        assert (app._reading, len(replica.scopes)) == (0, 1)

        monkeypatch.setattr(door, "_MOST_READING", 0)
        assert (await asked(app, SEARCH))[0] == 503

    run(trickle)


def test_a_body_beyond_the_limit_is_passed_on_to_be_refused() -> None:
    pieces = [{"type": "http.request", "body": b"x" * 800, "more_body": True} for _ in range(5)]

    async def pour() -> None:
        config = CONFIG.model_copy(update={"max_body_bytes": 2000})
        app = door.Door(Access(fine, config, None, Metrics()), config)
        assert (await asked(app, SEARCH, pieces))[0] == 413
        gone = [pieces[0], {"type": "http.disconnect"}]
        assert (await asked(app, SEARCH, gone))[0] == 0

    run(pour)


def test_who_has_a_whole_answer_takes_no_room() -> None:
    async def lingering(scope: Any, receive: Any, send: Any) -> None:
        await fine(scope, receive, send)
        await asyncio.sleep(3600)

    async def ask() -> None:
        app, sent = door.Door(lingering, CONFIG), list[Any]()

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(app._own.working)

        scope = {"type": "http", "client": ("10.0.0.1", 1), "method": "GET", "path": "/x", "headers": []}
        task = asyncio.create_task(app(scope, receive, send))
        await until(lambda: len(sent) == 2)
        assert (sent, app._own.working) == ([1, 1], 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert app._own.working == 0

    run(ask)


def test_what_breaks_within_an_answer_is_cut() -> None:
    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hal", "more_body": True})
        raise RuntimeError("broken")

    async def ask() -> None:
        with pytest.raises(RuntimeError, match="broken"):
            await asked(door.Door(half, CONFIG))

    run(ask)


def test_a_caller_who_takes_no_answer_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_SEND_SECONDS", 0.05)

    async def wait() -> None:
        app = door.Door(fine, CONFIG)

        async def send(message: Any) -> None:
            await asyncio.sleep(3600)

        scope = {"type": "http", "client": ("10.0.0.1", 1), "method": "GET", "path": "/x", "headers": []}

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        with pytest.raises(TimeoutError):
            await app(scope, receive, send)
        assert app._own.working == 0

    run(wait)


def test_refusals_of_a_proxy_are_logged_there_and_counted_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*DOOR)
    lines: list[tuple[str, Any]] = []
    monkeypatch.setattr(door, "log_line", lambda event, facts: lines.append((event, facts)))
    config = CONFIG.model_copy(update={"access_log": True})

    async def crowd() -> None:
        metrics, slow = Metrics(), Slow()
        app = door.Door(Access(slow, CONFIG, None, metrics), config)
        tasks = [asyncio.create_task(asked(app)) for _ in range(2)]
        await until(lambda: app._own.working == 2)
        assert [(await asked(app))[0] for _ in range(3)] == [503] * 3
        slow.gate.set()
        assert [(await task)[0] for task in tasks] == [200] * 2
        assert (await asked(app))[0] == 200
        page = metrics.page({"versions": []}).decode()
        (line,) = [line for line in page.splitlines() if line.startswith("pinakes_refused_requests_total{")]
        assert (line.endswith(" 3.0"), 'reason="in_flight"' in line) == (True, True)

    run(crowd)
    assert [(event, facts["status"], facts["refused"]) for event, facts in lines] == [("request", 503, "in_flight")] * 3
