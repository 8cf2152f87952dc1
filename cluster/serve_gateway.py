"""The gateway: what a request meets. It encodes, searches or asks the shards, fetches, and asks the stages behind.

Every replica holds the versions of its aliases (`serve_versions`) and follows the alias files, so it comes up on what
was promoted, however and from wherever that was done.
"""

# Serve copies a class when it is decorated, and reads its types: they are real objects (no `from __future__ import
# annotations` here).

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray import serve

from cluster import switch
from cluster.api import SearchRequest, build_api, found_json, key_file
from cluster.batcher import Batcher, Wanted
from cluster.door import share_room
from cluster.serve_follow import Follower
from cluster.serve_stages import ShardDeployments, within
from cluster.serve_versions import Versions
from cluster.session import unwrap
from pipelines import publish
from pipelines.config import PromoteConfig, ServeConfig
from pipelines.errors import ArtifactError, ConfigError, PinakesError
from pipelines.gate import check_smoke, smoke_k, smoke_queries
from pipelines.retrieve import Retriever, check_k, encoder_name
from pipelines.room import of_passages
from pipelines.schema import Hit

_log = logging.getLogger("ray.serve")
_LOAD_SECONDS = 600.0  # for shards to load a version; less than all gateways are given for it, as is the next
_SHARD_SECONDS = 5.0  # for shards to switch to a version, or to let go of one
_MANY_HITS = 256  # more are fetched on a thread, so that other requests go on
_FACTS = ("num_rows", "dim", "factory", "metric", "num_shards", "recall", "search_params", "created")


@dataclass(frozen=True)
class _Found:
    """Scores and rows (B, K), shards that did not answer, seconds by step, queries in the batch it was part of."""

    score_BK: Any
    row_BK: Any
    lost: list[int]
    seconds: dict[str, float]
    num_batched: int


@serve.deployment
@serve.ingress()
class Gateway:
    """Implement `cluster.api.Backend` on what this replica has loaded."""

    def __init__(
        self,
        root: str,
        aliases: Sequence[str],
        config: dict[str, Any],
        num_threads: int,
        shards: Sequence[Any],
        reranker: Any,
        reader: Any,
    ) -> None:
        """config: the whole Config, dumped. shards: their deployments' handles, none where every replica maps them all.

        reranker, reader: handles, or None.
        """
        self.root, self.num_threads = root, num_threads
        self.config, self.settings = ServeConfig(**config["serve"]), PromoteConfig(**config["promote"])
        self.depths = {stage: config[stage]["depth"] for stage in ("rerank", "answer") if config[stage]}
        self.shards = ShardDeployments(shards, self.config.shard_timeout_ms / 1000)
        self.reranker, self.reader = reranker, reader
        self.batcher = Batcher(self.config.batch_tokens, num_threads)
        self.versions: Versions[Retriever] = Versions(root, aliases, self.config.versions, self._load)
        self.versions.start()
        # What answers was promoted; a pinned version that is loaded has shown nothing yet.
        self._tried = {(alias, pointer.current) for alias, pointer in self.versions.now.aliases.items()}
        self.follower = Follower(self.versions, self._make_ready, self.activate, self.config.follow_seconds)
        self._following = asyncio.get_running_loop().create_task(self.follower.run())

    def __serve_build_asgi_app__(self) -> Any:
        keys, room = key_file(self.config, self.root), share_room(self.config)
        return build_api(lambda: self, self.config, keys, tells_id=False, room=room)

    def _load(self, manifest: dict[str, Any]) -> Retriever:
        # In placement "spread" the retriever keeps encoder and passages; the shards are elsewhere.
        return Retriever(self.root, manifest, [] if len(self.shards) else None, self.num_threads)

    # Answering

    async def search(self, request: SearchRequest, deadline: float) -> dict[str, Any]:
        """Return a SearchResponse: everything in it comes from the one version that is taken here."""
        began = time.perf_counter()
        alias, retriever = self.versions.take(request.alias, request.version)
        texts, stages = request.texts(self.config), self._stages(request)
        check_k(request.k, retriever.manifest)
        depth = min(max(request.k, *(self.depths[stage] for stage in stages), 1), len(retriever.passages))
        wanted = depth, retriever.filter(request.filter)
        answered = await self._find(retriever, texts, wanted, deadline)
        start = time.perf_counter()
        found = await self._fetch(retriever, answered)
        fetched = {"fetch": time.perf_counter() - start}
        found, given, skipped, later = await self._second_stages(stages, texts, found, deadline)
        seconds = {**answered.seconds, **fetched, **later, "total": time.perf_counter() - began}
        m = retriever.manifest
        response = {
            "alias": alias,
            "version": m["version"],
            "encoder": encoder_name(m),
            "complete": not (skipped or answered.lost),
            "took_ms": {name: round(spent * 1000, 3) for name, spent in seconds.items()},
            **found_json(request, found, given),
        }
        response |= {"skipped": skipped} if skipped else {}
        response |= {"missing_shards": answered.lost} if answered.lost else {}
        if request.explain:
            facts = {name: m[name] for name in ("factory", "metric", "search_params", "num_shards")}
            response["explain"] = {"depth": depth, "queries_in_batch": answered.num_batched, **facts}
        return response

    async def _find(self, retriever: Retriever, texts: list[str], wanted: Wanted, deadline: float) -> _Found:
        """Encode and search. deadline: time.monotonic() until which it waits for its turn, and for shards."""
        if (where := wanted[1]) is not None:  # here, where nobody else waits for a filter that is new
            await asyncio.to_thread(retriever.select, where)
        answered = await self.batcher.run(retriever, texts, wanted, deadline)
        spent, lost = answered.seconds, list[int]()
        seconds = {"receive": spent["wait"], "encode": spent["encode"], "search": spent["search"]}
        score_BK, row_BK = answered.score_BK, answered.row_BK
        if score_BK is None or row_BK is None:
            start = time.perf_counter()
            (score_BK, row_BK), lost = await self.shards.search(retriever.manifest, answered.emb_BD, wanted, deadline)
            seconds["search"] = time.perf_counter() - start
        return _Found(score_BK, row_BK, lost, seconds, answered.num_batched)

    async def _fetch(self, retriever: Retriever, found: _Found) -> list[list[Hit]]:
        if found.row_BK.size > _MANY_HITS:
            return await asyncio.to_thread(retriever.passages.hits, found.score_BK, found.row_BK)
        return retriever.passages.hits(found.score_BK, found.row_BK)

    def _stages(self, request: SearchRequest) -> list[str]:
        """Return the stages asked for behind retrieval. Raises ConfigError for one that is not configured."""
        if request.rerank and self.reranker is None:
            raise ConfigError("no reranker is configured", expected="rerank.checkpoint in the config")
        if request.answer and self.reader is None:
            raise ConfigError("no reader is configured", expected="answer.reader in the config")
        return [stage for stage in ("rerank", "answer") if getattr(request, stage)]

    async def _second_stages(
        self, stages: list[str], texts: list[str], found: list[list[Hit]], deadline: float
    ) -> tuple[list[list[Hit]], Any, list[str], dict[str, float]]:
        """Return (hits, answers or None, stages that did not fit the time, seconds by stage)."""
        given, skipped, seconds = None, [], {}
        for stage in stages:
            start = time.perf_counter()
            handle = self.reranker.rerank if stage == "rerank" else self.reader.answer
            result = await _stage_result(stage, within(deadline, partial(handle.remote, texts, found)))
            if result is None:
                skipped.append(stage)
            elif stage == "rerank":
                found = result
            else:
                given = result
            seconds[stage] = time.perf_counter() - start
        return found, given, skipped, seconds

    async def passage(self, passage_id: str, alias: str | None, version: str | None) -> dict[str, Any]:
        """Return the passage with this id. Raises ArtifactError when there is none."""
        _, retriever = self.versions.take(alias, version)
        row = retriever.passages.row_of(passage_id)
        if row is None:
            raise ArtifactError(f"there is no passage {passage_id!r}")
        return {"row": row, **retriever.passages.by_row(row).as_dict()}

    async def report(self, alias: str, version: str) -> bytes:
        """Return the report of a version that is served."""
        _, retriever = self.versions.take(alias, version)
        store = publish.index_store(self.root, retriever.manifest["name"]).child(retriever.manifest["version"])
        return await asyncio.to_thread(store.read, publish.REPORT)

    async def catalogue(self) -> dict[str, Any]:
        """Return the aliases and where they point, the versions loaded, the stages, and what does not load."""
        now = self.versions.now
        aliases: dict[str, dict[str, Any]] = {
            alias: {"current": pointer.current, "previous": pointer.previous} for alias, pointer in now.aliases.items()
        }
        versions = [
            {
                "alias": alias,
                "version": version,
                "state": self._state(alias, version),
                "encoder": encoder_name(retriever.manifest),
                **{name: retriever.manifest[name] for name in _FACTS},
                "metadata": retriever.passages.fields,
            }
            for (alias, version), retriever in now.loaded.items()
        ]
        stages = {"reranker": self.reranker is not None, "reader": self.reader is not None}
        for (alias, version), told in self.follower.troubles.items():
            aliases[alias].setdefault("problems", {})[version] = told
        return {
            "default": self.versions.aliases[0],
            "aliases": aliases,
            "versions": versions,
            "stages": stages,
        }

    def _state(self, alias: str, version: str) -> str:
        pointer = self.versions.now.aliases.get(alias)
        names = {} if pointer is None else {pointer.previous: "previous", pointer.current: "current"}
        pinned = version in self.config.versions and alias == self.versions.aliases[0]
        return names.get(version, "pinned" if pinned else "prepared")

    # Switching

    async def serves(self, place: str, alias: str) -> bool:
        """Tell whether this application answers for an alias of the root at `place` (see `switch.place_of`)."""
        return place == switch.place_of(self.root) and alias in self.versions.aliases

    async def promote(
        self, alias: str, version: str, force: bool, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Switch an alias on all replicas. settings: keys of PromoteConfig in place of the config's."""
        self._check_alias(alias)
        return await switch.promote(self._fleet(), self.root, alias, version, _merged(self.settings, settings), force)

    async def prepare_everywhere(
        self, alias: str, version: str, settings: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Load a version beside the current one on all replicas, for requests that name it."""
        self._check_alias(alias)
        return await switch.prepare(self._fleet(), self.root, alias, version, _merged(self.settings, settings))

    async def rollback(self, alias: str) -> dict[str, Any]:
        """Switch an alias back on all replicas."""
        self._check_alias(alias)
        return await switch.rollback(self._fleet(), self.root, alias)

    def _fleet(self) -> switch.Replicas:
        context = serve.get_replica_context()
        return switch.Replicas(serve.get_deployment_handle(context.deployment, context.app_name))

    def _check_alias(self, alias: str) -> None:
        if alias not in self.versions.aliases:
            raise ArtifactError(f"there is no alias {alias!r} here; served: {', '.join(self.versions.aliases)}")

    async def prepare(self, alias: str, version: str) -> list[dict[str, str]]:
        """Load a version beside the others and try it; return the findings. Of one that was tried or answers, none."""
        counts = of_passages if len(self.shards) else bool
        room = await asyncio.to_thread(self.versions.prepare_if_room, alias, version, counts)
        try:
            await self.shards.tell(_LOAD_SECONDS, "prepare", alias, version)
            if room is None and (alias, version) in self._tried:
                return []
            smoke = await self._smoke(self.versions.take(alias, version)[1])
        except BaseException:
            await self.release(alias, version)
            raise
        self._tried.add((alias, version))
        return [smoke] if room is None else [{"check": "room", "state": "ok", "what": room}, smoke]

    async def _make_ready(self, alias: str, version: str) -> None:
        """Prepare a version, unless it was before: a shard that hangs does not hold up following a rollback."""
        if (alias, version) not in self._tried & self.versions.now.loaded.keys():
            await self.prepare(alias, version)

    async def _smoke(self, retriever: Retriever) -> dict[str, str]:
        queries = smoke_queries(retriever.manifest, retriever.passages, self.settings.smoke_queries)
        k, deadline = smoke_k(retriever.manifest), time.monotonic() + self.config.budget_ms / 1000
        found = await self._find(retriever, queries, (k, None), deadline)
        if found.lost:
            raise PinakesError(f"shards {found.lost} do not answer smoke queries", hint="look at their log")
        hits = retriever.passages.hits(found.score_BK, found.row_BK)
        return check_smoke(retriever.manifest, queries, found.score_BK, found.row_BK, hits).as_dict()

    async def activate(self, alias: str, state: dict[str, Any], even_older: bool = False) -> str:
        """Answer by the version that `state` points to from now on; return the version answered by."""
        if self.versions.activate(alias, state, even_older=even_older):
            self._tried.add((alias, str(state["current"])))
            await self.shards.tell(_SHARD_SECONDS, "activate", alias, state, even_older)
        else:
            await self.follower.catch_up()  # overtaken, or the alias file was made anew: what it says counts
        return self.versions.now.aliases[alias].current

    async def release(self, alias: str, version: str) -> None:
        """Let go of a version that was prepared in vain."""
        self.versions.release(alias, version)
        with suppress(Exception):  # what was prepared is let go of in time, whether the shards hear of it or not
            await self.shards.tell(_SHARD_SECONDS, "release", alias, version)


def _merged(settings: PromoteConfig, given: dict[str, Any] | None) -> PromoteConfig:
    return PromoteConfig(**{**settings.model_dump(), **(given or {})})


async def _stage_result(stage: str, asked: Any) -> Any:
    """Return what the stage answers, None where it fails: what was found without it still counts.

    Raises PinakesError as our own code raised it there: it is about the request.
    """
    try:
        return await asked
    except Exception as error:
        cause = unwrap(error)
        if isinstance(cause, PinakesError):
            raise cause from error
        _log.warning("the stage %r fails: %s", stage, cause)
        return None
