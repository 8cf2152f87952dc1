"""Find the edge of one search parameter: the smallest value that is good, in few searches.

Without more to go by, the value is doubled until it is good, then bisected. Where it is known what a value finds at
most, the first one tried is the least that may be good, and for codes that lose nothing it is the edge.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.index.tune import Good, Knob, Measure, Params, Trial

_FINENESS = 16  # bisecting ends within a 16th of the value: finer steps change recall by less than its noise
_MOST_GROWTH = 4  # of a value from one try to the next: an expectation that is wrong must not cost the widest search
_CHEAP = (16, 4)  # shares of a value that are tried as well: they show the curve, and what codes lose, at little cost


def smallest(knob: Knob, held: Params, at: Measure, good: Good, bound: Measure | None) -> int | None:
    """Return the smallest value tried that is good beside `held`, None when not even the largest is."""
    ahead = _Doubling(knob) if bound is None else _Foresight(knob, good, bound)
    below, value = ahead.start(lambda value: at({**held, knob.name: value}))
    while not good(found := at({**held, knob.name: value})):
        if value == knob.most:
            return None
        below, value = value, min(ahead.after(value, found), knob.most)
    stride = ahead.stride(value)
    while value - below > _fine(value):
        middle = max((below + value) // 2, value - stride)
        if good(at({**held, knob.name: middle})):
            value, stride = middle, _MOST_GROWTH * stride
        else:
            below = middle
    return value


def enough(knob: Knob, bound: Measure) -> int:
    """Return the smallest value that may find as much as the largest."""
    most = bound({knob.name: knob.most}).recall
    return _first(knob, lambda value: bound({knob.name: value}).recall >= most)


def _fine(value: int) -> int:
    return max(1, value // _FINENESS)


@dataclass
class _Doubling:
    """Where to try next when nothing is known: at the least value, and then twice as far."""

    knob: Knob

    def start(self, at: Callable[[int], Trial]) -> tuple[int, int]:
        return self.knob.least - 1, self.knob.least

    def after(self, value: int, found: Trial) -> int:
        return 2 * value

    def stride(self, value: int) -> int:
        return value


@dataclass
class _Foresight:
    """Where to try next when it is known what a value finds at most: where that, less what the codes lose, is good.

    What codes lose of the bound at one value is about what they lose at another.
    """

    knob: Knob
    good: Good
    bound: Measure
    step: int = 1

    def start(self, at: Callable[[int], Trial]) -> tuple[int, int]:
        """Return (the largest value that the bound rules out, the first to try)."""
        value = first = self._edge(1.0)
        for cheap in (first // share for share in _CHEAP if first // share >= self.knob.least):
            value = self._edge(self._kept(at(cheap)))
        self.step = _fine(first)
        return first - 1, max(first, min(value, _MOST_GROWTH * first))

    def after(self, value: int, found: Trial) -> int:
        least, self.step = value + self.step, 2 * self.step
        return max(least, min(self._edge(self._kept(found)), _MOST_GROWTH * value))

    def stride(self, value: int) -> int:
        """Return how far below a good value the first try lies: foresight seldom misses by much."""
        return _fine(value)

    def _kept(self, found: Trial) -> float:
        most = self.bound(found.params).recall
        return found.recall / most if most else 1.0

    def _edge(self, kept: float) -> int:
        """Return the smallest value that is good if this share of its bound is found; the largest where none is."""

        def fits(value: int) -> bool:
            most = self.bound({self.knob.name: value})
            return self.good(replace(most, recall=kept * most.recall))

        return _first(self.knob, fits)


def _first(knob: Knob, fits: Callable[[int], bool]) -> int:
    """Return the smallest value that fits, as all larger ones do; the largest where no other does."""
    return knob.least + bisect_left(range(knob.least, knob.most), True, key=fits)
