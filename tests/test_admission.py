"""Room and rate: nobody gets more than there is, and whoever has to come back is put off without being forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.access import Access
from cluster.admission import RateLimit, Room
from cluster.problems import Problem, busy
from cluster.telemetry import Metrics
from pipelines.config import ServeConfig
from tests.test_access import asked, fine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_caller_gets_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    limit = RateLimit(2.0, 5, clock)
    assert [limit.wait_seconds("a") for _ in range(5)] == [0.0] * 5
    assert limit.wait_seconds("a") == pytest.approx(0.5)
    assert limit.wait_seconds("b") == 0.0
    clock.now = 0.5
    assert limit.wait_seconds("a") == 0.0
    limit.charge("a", 9)
    clock.now = 5.0
    assert limit.wait_seconds("a") == pytest.approx(0.5)
    clock.now = 1000.0
    assert [limit.wait_seconds("a") > 0 for _ in range(6)] == [False] * 5 + [True]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 4)), max_size=60))
def test_nobody_gets_more_than_burst_and_rate(steps: list[tuple[float, int]]) -> None:
    clock, passed = Clock(), 0
    limit = RateLimit(3.0, 10, clock)
    for pause, num in steps:
        clock.now += pause
        if limit.wait_seconds("a") == 0 and limit.charge("a", num - 1) == 0:
            passed += num
    # A last batch may go into debt, by as much as it brings beyond one.
    assert passed <= 10 + 3.0 * clock.now + 3


def test_batches_let_in_together_do_not_each_get_the_burst() -> None:
    clock = Clock()
    limit = RateLimit(2.0, 5, clock)
    assert [limit.wait_seconds("a") for _ in range(3)] == [0.0] * 3
    assert [limit.charge("a", 10) for _ in range(3)] == pytest.approx([0.0, 4.5, 4.5])
    clock.now = 4.5
    assert limit.wait_seconds("a") == 0.0


def test_callers_not_heard_of_for_longest_are_forgotten() -> None:
    limit = RateLimit(1.0, 5, Clock())
    for i in range(10_050):
        limit.wait_seconds(str(i))
    assert len(limit._buckets) == 10_000
    assert "0" not in limit._buckets


# Room


class Slow:
    """An application that answers when it is told to."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.gate.wait()
        await fine(scope, receive, send)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("hold_ms", [0, 20])
def test_no_more_requests_are_worked_on_than_allowed(hold_ms: int) -> None:
    async def crowd() -> list[Any]:
        slow = Slow()
        app = Access(slow, ServeConfig(max_ongoing=3, hold_ms=hold_ms, access_log=False), None, Metrics())
        tasks = [asyncio.create_task(asked(app)) for _ in range(8)]
        probe = asyncio.create_task(asked(app, {"path": "/health"}))
        found = [await task for task in tasks[3:]]  # while the first three are still under way
        assert app.room.working == 4
        slow.gate.set()
        found += [await task for task in tasks[:3]]
        assert (await probe)[0] == 200
        assert (app.room.working, app.room.held) == (0, 0)
        assert (await asked(app))[0] == 200
        return found

    found = asyncio.run(crowd())
    assert [status for status, _, _ in found] == [503] * 5 + [200] * 3
    for _, headers, body in found[:5]:
        assert (headers[b"retry-after"], headers[b"content-type"]) == (b"1", b"application/problem+json")
        assert json.loads(body)["detail"] == "3 requests are under way"


def run_held(hold: Callable[[Room], Awaitable[None]], **room: Any) -> None:
    asyncio.run(hold(Room(**{"size": 1, "hold_seconds": 3600.0, **room})))  # type: ignore[arg-type]


def test_only_so_many_refusals_are_held() -> None:
    async def hold(room: Room) -> None:
        held = [asyncio.create_task(room.put_off(busy("full", "x", 1.0), {})) for _ in range(2)]
        await until(lambda: room.held == 2)
        await room.put_off(busy("full", "x", 1.0), {})  # at once, or this would never end
        for task in held:
            task.cancel()  # their callers went away
        await asyncio.wait(held)
        assert room.held == 0

    run_held(hold, most_held=2)


@pytest.mark.parametrize(
    "headers",
    [{"content-length": "65537"}, {"content-length": "9" * 50}, {"content-length": "x"},
     {"transfer-encoding": "chunked"}],
)  # fmt: skip
def test_a_large_request_is_not_kept_in_memory(headers: dict[str, str]) -> None:
    run_held(lambda room: room.put_off(busy("full", "x", 3600.0), headers))


def test_what_is_final_is_refused_at_once() -> None:
    run_held(lambda room: room.put_off(Problem(403, "no", "scope"), {}))


def test_the_time_that_passed_is_taken_off_what_the_caller_is_told() -> None:
    problem = busy("too often", "rate", 2.5, 429)
    assert problem.headers["Retry-After"] == "3"
    run_held(lambda room: room.put_off(problem, {"content-length": "65536"}), hold_seconds=0.01)
    assert (problem.headers["Retry-After"], problem.retry_seconds) == ("3", pytest.approx(2.49))
    problem.waited(1.0)
    assert problem.headers["Retry-After"] == "2"
    problem.waited(60.0)
    assert problem.headers["Retry-After"] == "1"


def test_a_caller_who_leaves_while_it_is_held_is_forgotten() -> None:
    async def leave() -> None:
        metrics, slow = Metrics(), Slow()
        app = Access(slow, ServeConfig(max_ongoing=1, hold_ms=10_000, access_log=False), None, metrics)
        first = asyncio.create_task(asked(app))
        await until(lambda: app.room.working == 1)
        second = asyncio.create_task(asked(app))
        await until(lambda: app.room.held == 1)
        page = metrics.page({"versions": []}).decode()
        told = {line.split("{")[0]: line.split()[-1] for line in page.splitlines() if "pinakes_re" in line}
        assert (told["pinakes_requests_in_flight"], told["pinakes_refusals_held"]) == ("1.0", "1.0")
        second.cancel()
        await asyncio.wait({second})
        assert (app.room.working, app.room.held) == (1, 0)
        assert b'status="499"' in metrics.page({"versions": []})
        slow.gate.set()
        assert (await first)[0] == 200

    asyncio.run(leave())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4))
def test_places_are_given_and_taken_back(steps: list[bool], size: int) -> None:
    """In any order of coming and going, as many are inside as came and have not gone, and no more than fit."""
    room, inside = Room(size, 0.0), list[Any]()
    for comes in steps:
        if comes:
            place = room.place()
            if len(inside) < size:
                place.__enter__()
                inside.append(place)
            else:
                with pytest.raises(Problem, match="are under way"):
                    place.__enter__()
        elif inside:
            inside.pop().__exit__(None, None, None)
        assert room.working == len(inside)
