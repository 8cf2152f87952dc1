"""The deployments behind the gateway: shards, reranker, reader; and how they are asked without waiting forever."""

# Serve copies a class when it is decorated, and reads its types: they are real objects (no `from __future__ import
# annotations` here).

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ray import serve
from ray.exceptions import RayActorError

from cluster.batcher import Wanted
from cluster.serve_follow import Follower
from cluster.serve_versions import Versions
from cluster.session import unwrap
from cluster.switch import broadcast
from pipelines.answer import answers_within, load_reader
from pipelines.config import AnswerConfig, RerankConfig
from pipelines.errors import BusyError
from pipelines.filters import Filter
from pipelines.guard_process import device_lost
from pipelines.index.search import merge_topk
from pipelines.models.base import Answer
from pipelines.rerank import load_reranker, rerank_within
from pipelines.retrieve import LocalShard
from pipelines.room import of_shards
from pipelines.schema import Hit

_log = logging.getLogger("ray.serve")
_MAX_ANSWERS = 5
_RETRY_SECONDS = 0.05


@dataclass(frozen=True)
class ShardGroup:
    """The shards of one version that one deployment holds, by number."""

    manifest: dict[str, Any]
    shards: Mapping[int, LocalShard]


class DeviceWatch:
    """Remembers an error that leaves the GPU's context broken: Serve then starts the replica anew (`check_health`)."""

    def __init__(self) -> None:
        self._lost: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and device_lost(error):
            self._lost = error

    def check(self) -> None:
        """Raise the error that was remembered."""
        if self._lost is not None:
            raise self._lost


@serve.deployment
class Shard:
    """Deployment `number` of `num_deployments`: the shards number, number + num_deployments, … of every version."""

    def __init__(
        self,
        root: str,
        aliases: Sequence[str],
        pinned: Sequence[str],
        number: int,
        num_deployments: int,
        device: str,
        follow_seconds: float,
    ) -> None:
        """device: "cuda" to search all vectors there; "cpu" to search by the index."""
        searched_on = None if device == "cpu" else device
        self.device_watch, self._counts = DeviceWatch(), of_shards(number, num_deployments)

        def load(manifest: dict[str, Any]) -> ShardGroup:
            mine = range(number, manifest["num_shards"], num_deployments)
            return ShardGroup(manifest, {n: LocalShard(root, manifest, n, device=searched_on) for n in mine})

        self.versions: Versions[ShardGroup] = Versions(root, aliases, pinned, load)
        self.versions.start()
        follower = Follower(self.versions, self.prepare, self.activate, follow_seconds)
        self._following = asyncio.get_running_loop().create_task(follower.run())

    async def prepare(self, alias: str, version: str) -> None:
        """Load this deployment's shards of a version beside the others."""
        await asyncio.to_thread(self.versions.prepare_if_room, alias, version, self._counts, False)

    async def activate(self, alias: str, state: dict[str, Any], even_older: bool) -> None:
        """Let go of what is neither current nor previous in `state`."""
        await asyncio.to_thread(self.versions.prepare, alias, str(state["current"]))
        self.versions.activate(alias, state, even_older=even_older)

    async def release(self, alias: str, version: str) -> None:
        self.versions.release(alias, version)

    async def search(
        self, alias: str, version: str, queries_BD: Any, k: int, where: Filter | None, seconds: float
    ) -> Any:
        """Return (score_BK, row_BK) over this deployment's shards; a version that is not loaded is loaded first.

        seconds: until nobody waits for it any more. Raises BusyError when a shard's turn comes later than that.
        """
        deadline = time.monotonic() + seconds
        group = self.versions.now.loaded.get((alias, version))
        if group is None:
            group = await asyncio.to_thread(self.versions.prepare, alias, version)

        def in_time(shard: LocalShard) -> Any:
            if time.monotonic() > deadline:
                raise BusyError("the time was over before the shard's turn came")
            return shard.search(queries_BD, k, where)

        with self.device_watch:
            found = await asyncio.gather(*(asyncio.to_thread(in_time, shard) for shard in group.shards.values()))
        return merge_topk(list(found), k)

    def check_health(self) -> None:
        self.device_watch.check()


class ShardDeployments:
    """All shard deployments, asked together; deployment n holds the shards n, n + N, … of each version."""

    def __init__(self, handles: Sequence[Any], timeout_seconds: float) -> None:
        self._handles, self._timeout = list(handles), timeout_seconds

    def __len__(self) -> int:
        return len(self._handles)

    async def search(
        self, manifest: dict[str, Any], emb_BD: Any, wanted: Wanted, deadline: float
    ) -> tuple[Any, list[int]]:
        """Return ((score_BK, row_BK) of the shards that answered, the numbers of those that did not).

        deadline: time.monotonic(). Raises BusyError when none answered.
        """
        until = min(deadline, time.monotonic() + self._timeout)
        version = manifest["name"], manifest["version"]
        used = self._handles[: manifest["num_shards"]]
        found = await asyncio.gather(*(_answer_of(h, until, *version, emb_BD, *wanted) for h in used))
        lost = [n for n in range(manifest["num_shards"]) if found[n % len(used)] is None]
        if all(part is None for part in found):
            raise BusyError("no shard answered in time", hint="ask again later, or allow more time")
        return merge_topk([part for part in found if part is not None], wanted[0]), lost

    async def tell(self, seconds: float, method: str, *arguments: Any) -> None:
        """Call `method` of every replica of every deployment, and wait so long at most; raise what one raised.

        A deployment without replicas does not count: they come up by the alias.
        """
        told = await asyncio.gather(*(broadcast(h, seconds, method, *arguments) for h in self._handles))
        for error in chain.from_iterable(told):
            if isinstance(error, BaseException):
                raise unwrap(error)


async def _answer_of(handle: Any, until: float, *arguments: Any) -> Any:
    try:
        return await within(until, lambda left: handle.search.remote(*arguments, left))
    except Exception as error:  # whatever it is, the other shards' hits still count, and the answer says what lacks
        _log.warning("a shard deployment does not answer: %s", error)
        return None


async def within(deadline: float, ask: Callable[[float], Any]) -> Any:
    """Return what `ask(seconds left)` answers before the deadline (time.monotonic()), else None.

    What is still under way then is cancelled. A replica that dies is no answer: another one is asked.
    """
    while (left := deadline - time.monotonic()) > 0:
        reply = ask(left)
        try:
            return await asyncio.wait_for(_awaited(reply), left)
        except TimeoutError:
            reply.cancel()
            return None
        except RayActorError:
            await asyncio.sleep(_RETRY_SECONDS)
    return None


async def _awaited(reply: Awaitable[Any]) -> Any:
    return await reply


class _Stage:
    """A model that works for one request after the other, on a thread of its own; waiting counts against the time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._device_watch = DeviceWatch()

    async def _run(self, seconds: float, work: Callable[[float], Any]) -> Any:
        """Return `work(seconds left)`, run when its turn comes, or None when that is too late."""
        deadline = time.monotonic() + seconds

        def in_turn() -> Any:
            left = deadline - time.monotonic()
            with self._device_watch:
                return work(left) if left > 0 else None

        return await asyncio.get_running_loop().run_in_executor(self._thread, in_turn)

    def check_health(self) -> None:
        self._device_watch.check()


@serve.deployment(max_ongoing_requests=16)
class Reranker(_Stage):
    """The cross-encoder or PAQ reranker."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        super().__init__()
        self.config = RerankConfig(**config)
        self.model = load_reranker(self.config, device)

    async def rerank(self, queries: list[str], hits: list[list[Hit]], seconds: float) -> list[list[Hit]] | None:
        """Return the hits reordered, or None when that takes longer than `seconds`."""
        depth = self.config.depth
        return await self._run(seconds, lambda left: rerank_within(self.model, queries, hits, depth, left))


@serve.deployment(max_ongoing_requests=16)
class Reader(_Stage):
    """What answers from the hits."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        super().__init__()
        self.config = AnswerConfig(**config)
        compute, tokeniser = self.config.compute, self.config.tokeniser
        self.model = load_reader(self.config.reader, compute, device, tokeniser=tokeniser)

    async def answer(self, queries: list[str], hits: list[list[Hit]], seconds: float) -> list[list[Answer]] | None:
        """Return each query's answers, best first, or None when reading takes longer than `seconds`."""
        depth = self.config.depth
        found = await self._run(seconds, lambda left: answers_within(self.model, queries, hits, depth, left))
        return None if found is None else [given[:_MAX_ANSWERS] for given in found]
