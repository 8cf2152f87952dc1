"""What one replica has loaded: versions by alias, and which of them answers.

    prepare (load beside the others) -> activate (swap one reference) -> the one before stays warm -> older ones go

`now` is an immutable picture, replaced as a whole. A request takes its retriever from it once, so nothing it does
mixes two versions, and a version that was let go of lives until the last request that took it is answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from pipelines import publish
from pipelines.errors import ArtifactError, nearest
from pipelines.room import room_for

_UNUSED_SECONDS = 1200.0
"""A version that was prepared and never activated goes after this: longer than any replica is given to load it."""


class Loaded(Protocol):
    """What a replica holds of a version: a retriever, or some of its shards."""

    @property
    def manifest(self) -> dict[str, Any]: ...


L = TypeVar("L", bound=Loaded)


@dataclass(frozen=True)
class Pointer:
    """Where an alias points. moves: how often it was moved, by which an older state is told from a newer one."""

    current: str
    previous: str | None
    moves: int

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Pointer:
        return cls(str(state["current"]), state["previous"], len(state["history"]))


@dataclass(frozen=True)
class Picture(Generic[L]):
    """loaded: by (alias, version). aliases: where each points, as far as this replica has followed."""

    loaded: Mapping[tuple[str, str], L] = field(default_factory=dict)
    aliases: Mapping[str, Pointer] = field(default_factory=dict)


class Versions(Generic[L]):
    """The versions of some aliases of a root, loaded by `load(manifest)`; safe to call from any thread."""

    def __init__(
        self, root: str, aliases: Sequence[str], pinned: Sequence[str], load: Callable[[dict[str, Any]], L]
    ) -> None:
        """pinned: versions of the first alias that stay loaded."""
        self.root, self.aliases, self._pinned, self._load = root, list(aliases), list(pinned), load
        self.now: Picture[L] = Picture()
        self._swapping, self._loading = threading.Lock(), threading.Lock()
        self._prepared: dict[tuple[str, str], float] = {}

    def start(self) -> None:
        """Load what every alias points to, and the pinned versions. Raises what loading raises."""
        for alias in self.aliases:
            loaded = None
            while (state := publish.read_alias(self.root, alias)) != loaded:  # also what is promoted while it loads
                self.prepare(alias, str(state["current"]))
                self.activate(alias, state, even_older=True)
                loaded = state
        for version in self._pinned:
            self.prepare(self.aliases[0], version)

    def take(self, alias: str | None, version: str | None = None) -> tuple[str, L]:
        """Return (alias, what is loaded of its current version or of `version`).

        Raises ArtifactError when that is not served, naming what is.
        """
        now, name = self.now, alias or self.aliases[0]
        if name not in now.aliases:
            guess = nearest(name, now.aliases)
            hint = f"did you mean {guess!r}?" if guess else ""
            served = ", ".join(now.aliases)
            raise ArtifactError(f"there is no alias {name!r} here; served: {served}", expected=served, hint=hint)
        chosen = version or now.aliases[name].current
        if (name, chosen) not in now.loaded:
            served = ", ".join(v for a, v in now.loaded if a == name)
            hint = f"`pinakes promote {name} {chosen} --prepare` loads it beside the current one"
            what = f"version {chosen!r} of {name!r} is not served here; served: {served}"
            raise ArtifactError(what, expected=served, hint=hint)
        return name, now.loaded[name, chosen]

    def prepare(self, alias: str, version: str) -> L:
        """Load a version beside the others, unless it is, and return it. Raises what loading raises."""
        with self._loading:  # one at a time: two would need the room of three
            if (found := self.now.loaded.get((alias, version))) is not None:
                with self._swapping:
                    if (alias, version) in self._prepared:  # asked for once more: its time begins anew
                        self._prepared[alias, version] = time.monotonic()
                return found
            loaded = self._load(publish.read_version(self.root, alias, version))
            with self._swapping:
                self._prepared[alias, version] = time.monotonic()
                self.now = replace(self.now, loaded={**self.now.loaded, (alias, version): loaded})
            return loaded

    def prepare_if_room(
        self, alias: str, version: str, counts: Callable[[str], bool] = bool, encoder: bool = True
    ) -> str | None:
        """Load a version beside the others; return the room for it, None for one that is loaded.

        counts, encoder: as of `check_room`. Raises PinakesError where there is no room, and what loading raises.
        """
        if (alias, version) in self.now.loaded:
            self.prepare(alias, version)
            return None
        with room_for(self.root, publish.read_version(self.root, alias, version), counts, encoder) as told:
            self.prepare(alias, version)
        return told

    def activate(self, alias: str, state: Mapping[str, Any], *, even_older: bool = False) -> bool:
        """Answer by the version that `state` (an alias file's content) points to, which must be loaded.

        False, and nothing changes, when this replica has seen a newer state already, unless `even_older` says that the
        alias file itself holds this one. What is neither current nor previous any more is let go of.
        """
        pointer = Pointer.of(state)
        with self._swapping:
            now = self.now
            known = now.aliases.get(alias)
            if known is not None and pointer.moves < known.moves and not even_older:
                return False
            if (alias, pointer.current) not in now.loaded:
                raise ArtifactError(f"version {pointer.current} of {alias!r} is not loaded here")
            for version in (pointer.current, str(pointer.previous)):  # kept as such, and no longer once they are not
                self._prepared.pop((alias, version), None)
            self.now = self._kept(Picture(now.loaded, {**now.aliases, alias: pointer}))
            return True

    def release(self, alias: str, version: str) -> None:
        """Let go of a version that was prepared, unless it is current, previous or pinned."""
        with self._swapping:
            self._prepared.pop((alias, version), None)
            self.now = self._kept(self.now)

    def sweep(self) -> None:
        """Let go of versions that were prepared long ago, and are neither current, previous nor pinned."""
        with self._swapping:
            self.now = self._kept(self.now)

    def _kept(self, picture: Picture[L]) -> Picture[L]:
        since = time.monotonic() - _UNUSED_SECONDS
        keep = {key for key, at in self._prepared.items() if at > since}
        keep |= {(self.aliases[0], version) for version in self._pinned}
        for alias, pointer in picture.aliases.items():
            keep |= {(alias, pointer.current), (alias, str(pointer.previous))}
        return replace(picture, loaded={key: loaded for key, loaded in picture.loaded.items() if key in keep})

    def behind(self) -> list[tuple[str, dict[str, Any]]]:
        """Read the alias files and return (alias, state) of those that point elsewhere than this replica.

        Also one whose previous version, which should be warm, is not loaded. Raises StorageError, ArtifactError.
        """
        found = []
        for alias in self.aliases:
            before = self.now.aliases.get(alias)
            state = publish.read_alias(self.root, alias)
            if self.now.aliases.get(alias) is not before:
                continue  # it was moved while the file was read: which of the two is newer, the next look tells
            pointer = Pointer.of(state)
            cold = pointer.previous is not None and (alias, pointer.previous) not in self.now.loaded
            if pointer != before or cold:
                found.append((alias, state))
        return found
