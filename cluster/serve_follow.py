"""Following the alias files: what another process promoted is loaded in the background, then switched to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.serve_versions import Versions
from pipelines.errors import PinakesError

_log = logging.getLogger("ray.serve")
_LONGEST_WAIT = 300.0  # seconds between two attempts to load a version that does not load


class Follower:
    """Looks at the alias files every so often, and keeps what they point to loaded: current and previous versions."""

    def __init__(
        self,
        versions: Versions[Any],
        prepare: Callable[[str, str], Awaitable[Any]],
        activate: Callable[[str, dict[str, Any], bool], Awaitable[Any]],
        seconds: float,
    ) -> None:
        """prepare(alias, version) loads, activate(alias, state, even_older) switches. seconds: between two looks."""
        self._versions, self._prepare, self._activate, self._seconds = versions, prepare, activate, seconds
        self._waits: dict[tuple[str, str], tuple[float, float]] = {}
        self.troubles: dict[tuple[str, str], str] = {}

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            try:
                await self.catch_up()
            except Exception as error:  # the store is out of reach, say: what is loaded goes on answering
                _log.warning("the aliases could not be looked at: %s", error)
            await asyncio.sleep(self._seconds)

    async def catch_up(self) -> None:
        """Load what the alias files point to and what should be warm beside it, then switch to it.

        Versions that were prepared long ago and in vain are let go of, and troubles with what is no longer wanted.
        """
        self._versions.sweep()
        wanted = [
            (alias, str(version))
            for alias, state in await asyncio.to_thread(self._versions.behind)
            for version in (state["current"], state["previous"])
            if version is not None
        ]
        for kept in (self._waits, self.troubles):  # what no alias wants any more is no problem any more
            for key in kept.keys() - set(wanted):
                del kept[key]
        for alias, version in wanted:
            if await self._could_prepare(alias, version):
                await self._switch(alias)

    async def _switch(self, alias: str) -> None:
        # Loading takes a while: the file is read again, and what it says by now is what counts.
        for name, state in await asyncio.to_thread(self._versions.behind):
            if name == alias and (alias, state["current"]) in self._versions.now.loaded:
                await self._activate(alias, state, True)

    async def _could_prepare(self, alias: str, version: str) -> bool:
        """Load a version if it is not; False when that fails, after which it is left alone for longer and longer."""
        key = (alias, version)
        until, wait = self._waits.get(key, (0.0, self._seconds))
        if time.monotonic() < until:
            return False
        try:
            await self._prepare(alias, version)
        except Exception as error:
            wait = min(2 * wait, _LONGEST_WAIT)
            self._waits[key] = (time.monotonic() + wait, wait)
            self.troubles[key] = error.what if isinstance(error, PinakesError) else type(error).__name__
            _log.error("version %s of %r does not load; what is loaded goes on answering: %s", version, alias, error)
            return False
        self._waits.pop(key, None)
        self.troubles.pop(key, None)
        return True
