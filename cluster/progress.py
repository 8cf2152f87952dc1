"""What a run tells while it works: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SECONDS_BETWEEN_LINES = 5.0


class Stage:
    """One stage under way: `advance` counts finished units and whatever rows, tokens and so on came with them.

    throughput: what is known of its speed at its end, of the stages that measure it.
    """

    def __init__(self, name: str, total: int | None, live: bool, quiet: bool) -> None:
        self.name, self.total, self.done, self.reused = name, total, 0, 0
        self.counts: dict[str, int] = {}
        self.throughput: dict[str, Any] | None = None
        self._made: dict[str, int] = {}
        self.started = self._last = time.monotonic()
        self._live, self._quiet = live, quiet

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def advance(self, units: int = 1, reused: bool = False, **counts: int) -> None:
        self.done += units
        self.reused += units if reused else 0
        for key, value in counts.items():
            self.counts[key] = self.counts.get(key, 0) + value
            self._made[key] = self._made.get(key, 0) + (0 if reused else value)
        if self._live or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._show("\r\x1b[2K" if self._live else "", "" if self._live else "\n")

    def line(self) -> str:
        """Return the state as one line: units, rows, rates and the time left."""
        seconds = max(self.seconds, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        pieces = [f"{self.name:<10} {self.done}{of}" + (f" ({self.reused} were done)" if self.reused else "")]
        for key, value in self.counts.items():
            made = self._made[key]
            rate = f" ({made / seconds:,.0f}/s)" if made and key != "quarantined" else ""
            pieces.append(f"{value:,} {key}{rate}")
        fresh = self.done - self.reused
        if self.total and fresh and self.done < self.total:
            left = seconds / fresh * (self.total - self.done)
            pieces.append(f"ETA {int(left // 3600)}:{int(left // 60 % 60):02d}:{int(left % 60):02d}")
        return "  ".join(pieces)

    def finish(self) -> None:
        self._show("\r\x1b[2K" if self._live else "", f"  {self.seconds:.1f} s\n")

    def _show(self, before: str, after: str) -> None:
        self._last = time.monotonic()
        if not self._quiet:
            sys.stderr.write(before + self.line() + after)
            sys.stderr.flush()


class Progress:
    """Open stages one after the other and remember how long each took."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self.stages: dict[str, dict[str, Any]] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Stage]:
        self.say(f"{name:<10} started")
        stage = Stage(name, total, self._live, self._quiet)
        yield stage
        stage.finish()
        made = stage.done - stage.reused
        told = {"throughput": stage.throughput} if stage.throughput else {}
        counts = {"made": made, "reused": stage.reused, **stage.counts}
        self.stages[name] = {"seconds": round(stage.seconds, 3), **counts, **told}

    def say(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)
