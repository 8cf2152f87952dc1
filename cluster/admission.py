"""Room and rate: what is worked on now, who asks too often, and how a caller who has to come back later is put off.

To refuse a request takes much of what it takes to receive it, and callers who come straight back are refused hundreds
of times a second, until refusing is all that the server does. So a refusal that would be repeated is held back for a
while; a caller who waits for it costs next to nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from cluster.problems import Problem, busy

_MAX_CALLERS = 10_000
_MOST_HELD = 1024
_HELD_BYTES = 64 << 10  # a larger body would lie in memory as long as its refusal is held
_MOST_DIGITS = 6
_FULL_SECONDS = 1.0  # a server without room says this; its requests take less


class RateLimit:
    """A token bucket for each caller, in this replica: `burst` queries at once, then `rate` a second.

    A batch is let in when one query would be, and its other queries are charged then: callers go into debt and wait it
    out. Callers not heard of for longest are forgotten beyond 10,000.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_seconds(self, caller: str) -> float:
        """Take one query's token and return 0, or return the seconds until there will be one."""
        left = self._left(caller)
        if left < 1:
            return (1 - left) / self.rate
        self._keep(caller, left - 1)
        return 0.0

    def charge(self, caller: str, num: int) -> float:
        """Take the tokens of a batch's other queries and return 0; of who is in debt by now, none, but the seconds.

        Batches that were let in together would each come to the whole burst otherwise.
        """
        left = self._left(caller)
        if left < 0:
            return (1 - left) / self.rate
        self._keep(caller, left - num)
        return 0.0

    def _left(self, caller: str) -> float:
        tokens, at = self._buckets.get(caller, (float(self.burst), self._clock()))
        return min(float(self.burst), tokens + (self._clock() - at) * self.rate)

    def _keep(self, caller: str, tokens: float) -> None:
        self._buckets[caller] = (tokens, self._clock())
        self._buckets.move_to_end(caller)
        if len(self._buckets) > _MAX_CALLERS:
            self._buckets.popitem(last=False)


class Room:
    """The requests of one replica that are worked on, and those whose refusal is held back."""

    def __init__(self, size: int, hold_seconds: float, most_held: int = _MOST_HELD) -> None:
        """size: requests that are worked on at a time. hold_seconds: the most that a refusal is held back."""
        self.size, self.hold_seconds, self.most_held = size, hold_seconds, most_held
        self.working = self.held = 0
        self.refused: Callable[[str], None] = lambda reason: None  # told of those that the API never sees

    @property
    def full(self) -> bool:
        return self.working >= self.size

    def refusal(self) -> Problem:
        return busy(f"{self.size} requests are under way", "in_flight", _FULL_SECONDS)

    @contextmanager
    def place(self, always: bool = False) -> Iterator[Callable[[], None]]:
        """Take a place while the body runs; give what gives it back sooner. Raises Problem (503) without one.

        always: even where there is none.
        """
        if self.full and not always:
            raise self.refusal()
        self.working += 1
        left = False

        def leave() -> None:
            nonlocal left
            self.working -= not left
            left = True

        try:
            yield leave
        finally:
            leave()

    async def put_off(self, problem: Problem, headers: Mapping[str, str]) -> None:
        """Hold a refusal back for as long as it would be repeated, and take that off its Retry-After."""
        if waited := await self.hold(problem.retry_seconds, headers):
            problem.waited(waited)

    async def hold(self, retry_seconds: float, headers: Mapping[str, str]) -> float:
        """Wait as long as a refusal would be repeated; return the seconds.

        None when it is final, when its request is large, and when enough of them are held already.
        """
        seconds = min(retry_seconds, self.hold_seconds)
        if seconds <= 0 or self.held >= self.most_held or not _is_small(headers):
            return 0.0
        self.held += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self.held -= 1
        return seconds


def _is_small(headers: Mapping[str, str]) -> bool:
    length = headers.get("content-length", "0")
    known = length.isdecimal() and len(length) <= _MOST_DIGITS and int(length) <= _HELD_BYTES
    return known and "transfer-encoding" not in headers
