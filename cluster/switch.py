"""Move an alias without a caller noticing: gate, load everywhere, move the alias, swap; and back.

    gate -> prepare on every replica -> alias moved, if nobody else did -> activate on every replica

Nothing changes before every replica has the version loaded and has answered smoke queries with it. The alias file is
the truth: a replica that misses the last step, or starts later, follows the file by itself. Rolling back moves the
alias at once and tells the replicas then: they hold the version before, and none that is down can hold it up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines import publish
from pipelines.config import ClusterConfig, PromoteConfig
from pipelines.errors import PinakesError, ServiceError
from pipelines.gate import check_candidate, open_candidate
from pipelines.manifest import fingerprint
from pipelines.storage import Store, cache_dir

APPLICATION = "pinakes"
_AUTH_MODE = "RAY_AUTH_MODE"
_FIND_SECONDS = 10.0  # for a gateway's word that it serves an alias
_LOAD_SECONDS = 900.0  # for all replicas to load a version
_SWITCH_SECONDS = 10.0  # for all to switch to one that is loaded


class Fleet(Protocol):
    """All replicas that answer for an alias."""

    async def prepare(self, alias: str, version: str) -> list[Any]:
        """Load the version beside the others everywhere; return for each replica its findings, or what it raised."""
        ...

    async def activate(self, alias: str, state: dict[str, Any]) -> list[Any]:
        """Answer by the version that the alias's `state` points to, everywhere.

        Returns for each replica the version that it answers by then, or what it raised.
        """
        ...

    async def release(self, alias: str, version: str) -> None:
        """Let go of a version that was prepared in vain."""
        ...


class Replicas:
    """The replicas of a deployment of Ray Serve, by its handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def prepare(self, alias: str, version: str) -> list[Any]:
        return await broadcast(self._handle, _LOAD_SECONDS, "prepare", alias, version)

    async def activate(self, alias: str, state: dict[str, Any]) -> list[Any]:
        return await broadcast(self._handle, _SWITCH_SECONDS, "activate", alias, state)

    async def release(self, alias: str, version: str) -> None:
        await broadcast(self._handle, _SWITCH_SECONDS, "release", alias, version)


async def broadcast(handle: Any, seconds: float, method: str, *arguments: Any) -> list[Any]:
    """Return what each replica of a deployment answered or raised; a PinakesError where that took too long.

    Replicas that died are left out, and so is a deployment that has none just now: they come back by the alias.
    """
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        found = await handle.broadcast(method, *arguments).results_async(timeout_s=seconds, return_exceptions=True)
    except DeploymentUnavailableError:
        return []
    except TimeoutError:
        what = f"not every replica of {handle.deployment_name} answered {method!r} within {seconds:g} s"
        return [PinakesError(what, hint="look at its log; `ray status` shows what hangs or waits")]
    return [one for one in found if not isinstance(one, RayActorError)]


class NoReplicas:
    """The fleet where no server is within reach: the version is loaded and tried in this process."""

    def __init__(self, root: str, settings: PromoteConfig) -> None:
        self.root, self.settings = root, settings

    async def prepare(self, alias: str, version: str) -> list[Any]:
        findings = await asyncio.to_thread(open_candidate, self.root, alias, version, self.settings)
        return [[finding.as_dict() for finding in findings]]

    async def activate(self, alias: str, state: dict[str, Any]) -> list[Any]:
        return []

    async def release(self, alias: str, version: str) -> None:
        pass


async def promote(
    fleet: Fleet, root: str, alias: str, version: str, settings: PromoteConfig, force: bool = False
) -> dict[str, Any]:
    """Switch an alias to a version; return its state, with what the gate found and how many replicas switched.

    force: pass the gate with a worse quality or recall, never with files that do not check. Raises ArtifactError,
    QualityError from the gate, PinakesError when a replica cannot load the version, StorageError when somebody else
    moved the alias meanwhile; the alias then still points where it did.
    """
    publish.read_version(root, alias, version)
    before = publish.current(root, alias) if alias in publish.list_aliases(root) else None
    findings = await asyncio.to_thread(check_candidate, root, alias, version, before, settings, force)
    told = [finding.as_dict() for finding in findings if finding.check in ("recall", "quality")]
    result = await _switch(fleet, root, alias, version, before)
    return {**result, "gate": told + result["gate"]}


async def prepare(fleet: Fleet, root: str, alias: str, version: str, settings: PromoteConfig) -> dict[str, Any]:
    """Load a version beside the current one everywhere, to be compared with it; the alias stays where it is.

    Returns its state, `prepared`, and what the gate finds, which refuses nothing yet. Raises ArtifactError for files
    that do not check, PinakesError when a replica cannot load the version.
    """
    state = publish.read_alias(root, alias)
    findings = await asyncio.to_thread(check_candidate, root, alias, version, str(state["current"]), settings, True)
    began = time.monotonic()
    prepared = await fleet.prepare(alias, version)
    try:
        _check_all(prepared, alias, version)
    except PinakesError:
        await fleet.release(alias, version)
        raise
    told = [finding.as_dict() for finding in findings if finding.check in ("recall", "quality")]
    seconds = {"prepare": round(time.monotonic() - began, 3)}
    gate = told + (prepared[0] if prepared else [])
    return {**state, "name": alias, "prepared": version, "gate": gate, "replicas": len(prepared), "seconds": seconds}


async def rollback(fleet: Fleet, root: str, alias: str) -> dict[str, Any]:
    """Switch an alias back to its previous version, which the replicas still hold. Raises ConfigError without one."""
    state = await asyncio.to_thread(publish.rollback, root, alias)
    return await _tell(fleet, alias, state, [], 0.0)


async def _switch(fleet: Fleet, root: str, alias: str, version: str, before: str | None) -> dict[str, Any]:
    """Do what the gate does not: return the alias's state, the findings on loading, and how many replicas switched."""
    began = time.monotonic()
    try:
        prepared = await fleet.prepare(alias, version)
        _check_all(prepared, alias, version)
        seconds = time.monotonic() - began
        state = await asyncio.to_thread(publish.promote, root, alias, version, before)
    except BaseException:
        if version != before:
            await fleet.release(alias, version)
        raise
    return await _tell(fleet, alias, state, prepared[0] if prepared else [], seconds)


async def _tell(
    fleet: Fleet, alias: str, state: dict[str, Any], findings: list[Any], loading_seconds: float
) -> dict[str, Any]:
    """Switch all replicas to what the alias points to; return `state`, with how many of them did.

    behind, cause: how many did not, and why the first did not, where there are such.
    """
    began = time.monotonic()
    answers = await fleet.activate(alias, state)
    seconds = {"prepare": round(loading_seconds, 3), "switch": round(time.monotonic() - began, 3)}
    behind = [one for one in answers if one != state["current"]]
    result = {**state, "name": alias, "gate": findings, "replicas": len(answers) - len(behind), "seconds": seconds}
    return {**result, "behind": len(behind), "cause": _why(behind[0])} if behind else result


def _why(answer: Any) -> str:
    if not isinstance(answer, BaseException):
        return f"it still answers by version {answer}"
    error = _cause(answer)
    return error.what if isinstance(error, PinakesError) else type(error).__name__


def _check_all(prepared: list[Any], alias: str, version: str) -> None:
    """Raise when a replica could not load the version."""
    failed = [one for one in prepared if isinstance(one, BaseException)]
    if not failed:
        return
    error = _cause(failed[0])
    what = f"{len(failed)} of {len(prepared)} replicas cannot load version {version} of {alias!r}"
    told, hint = (error.what, error.hint) if isinstance(error, PinakesError) else (str(error), "look at their log")
    where = error.where if isinstance(error, PinakesError) else ""
    raise PinakesError(f"{what}, so nothing changed: {told}", where=where, hint=hint) from error


def _cause(error: BaseException) -> BaseException:
    from cluster.session import unwrap

    return unwrap(error)


# From a command


def promote_from_here(
    root: str, alias: str, version: str, settings: dict[str, Any], force: bool = False, address: str | None = None
) -> dict[str, Any]:
    """Promote through the application that serves this root, where one is within reach; else move the alias alone.

    settings: keys of PromoteConfig that take the place of the application's. address: a Ray cluster; without it
    RAY_ADDRESS, else that of a server on this machine. Servers out of reach follow the alias by themselves. Raises what
    `promote` raises.
    """
    publish.read_version(root, alias, version)
    with _gateway(root, alias, address) as gateway:
        if gateway is not None:
            return dict(gateway.promote.remote(alias, version, force, settings).result())
    chosen = PromoteConfig(**settings)
    return asyncio.run(promote(NoReplicas(root, chosen), root, alias, version, chosen, force))


def prepare_from_here(
    root: str, alias: str, version: str, settings: dict[str, Any], address: str | None = None
) -> dict[str, Any]:
    """Prepare a version on the application that serves this root. Raises ServiceError without one within reach."""
    publish.read_version(root, alias, version)
    with _gateway(root, alias, address) as gateway:
        if gateway is None:
            hint = "start `pinakes serve`, or name the Ray cluster that serves it: --address"
            raise ServiceError(f"no server of {alias!r} is within reach, to load a version on", where=root, hint=hint)
        return dict(gateway.prepare_everywhere.remote(alias, version, settings).result())


def rollback_from_here(root: str, alias: str, address: str | None = None) -> dict[str, Any]:
    """Roll back as `promote_from_here` promotes, but without the gate, and also past a gateway that dies or hangs."""
    before = publish.read_alias(root, alias)
    version = publish.previous_of(alias, before)
    with _gateway(root, alias, address) as gateway:
        if gateway is not None and (told := _rolled_back(gateway, alias)):
            return told
    # Where the gateway has moved the alias before it died, this changes nothing.
    return {**publish.promote(root, alias, version, str(before["current"])), "name": alias, "replicas": 0}


def _rolled_back(gateway: Any, alias: str) -> dict[str, Any] | None:
    from ray.exceptions import RayActorError

    with suppress(RayActorError, TimeoutError):
        return dict(gateway.rollback.remote(alias).result(timeout_s=3 * _SWITCH_SECONDS))
    return None


@contextmanager
def _gateway(root: str, alias: str, address: str | None) -> Iterator[Any]:
    """Give a handle of the gateway that serves the alias of this root, or None where none is within reach."""
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None and (found := announced(root)):
        address = found.address
        if found.auth_mode:  # Ray turns tokens on for a cluster that it starts, not for who connects to it
            os.environ.setdefault(_AUTH_MODE, found.auth_mode)
    if address is None:
        yield None
        return
    from cluster.session import session

    with session(ClusterConfig(address=address)):
        yield _find_gateway(root, alias)


def _find_gateway(root: str, alias: str) -> Any:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing it sets another one
    try:
        gateway = serve.get_app_handle(APPLICATION)
        served = gateway.serves.remote(place_of(root), alias).result(timeout_s=_FIND_SECONDS)
    except (RayServeException, TimeoutError):  # Serve does not run there, or not this application, or no replica of it
        return None
    return gateway if served else None


def place_of(root: str) -> str:
    """Return the same for every way to write one root."""
    store = Store(root)
    return f"{store.fs.protocol}:{store.path()}"


def _announcement(root: str) -> str:
    return os.path.join(cache_dir("servers"), f"{fingerprint([place_of(root)])}.json")


@dataclass(frozen=True)
class Announced:
    """The Ray cluster of a server on this machine, and its RAY_AUTH_MODE."""

    address: str
    auth_mode: str | None


def announce(root: str, address: str) -> None:
    """Leave word on this machine that this process serves `root` from the Ray cluster at `address`."""
    word = {"address": address, "auth_mode": os.environ.get(_AUTH_MODE), "pid": os.getpid()}
    Store(cache_dir("servers")).put(os.path.basename(_announcement(root)), json.dumps(word).encode())


def withdraw(root: str) -> None:
    """Take back what `announce` left."""
    with suppress(FileNotFoundError):
        os.unlink(_announcement(root))


def announced(root: str) -> Announced | None:
    """Return from which cluster a living process of this machine serves `root`, or None."""
    try:
        with open(_announcement(root), encoding="utf-8") as handle:
            found = json.load(handle)
        os.kill(int(found["pid"]), 0)
        return Announced(str(found["address"]), found["auth_mode"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
