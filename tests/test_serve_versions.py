"""What a replica holds and how replicas switch together, without Ray: nothing mixed, lost or left over."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from typer.testing import CliRunner

from cluster import cli, switch
from cluster.cli_switch import _summary
from cluster.serve_follow import Follower
from cluster.serve_gateway import Gateway
from cluster.serve_stages import Shard, ShardDeployments
from cluster.serve_versions import _UNUSED_SECONDS, Versions
from pipelines import publish
from pipelines.config import PromoteConfig
from pipelines.errors import ArtifactError, PinakesError, StorageError
from pipelines.retrieve import Retriever
from tests.two_versions import ALIAS, QUERIES, TwoVersions, build_two

SETTINGS = PromoteConfig()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> TwoVersions:
    return build_two(tmp_path_factory.mktemp("versions"))


@pytest.fixture
def two(built: TwoVersions, tmp_path: Path) -> TwoVersions:
    """A copy of the root, whose alias points to the old version, which it never left."""
    shutil.copytree(built.root, tmp_path / "root")
    (tmp_path / "root" / "aliases" / f"{ALIAS}.json").unlink()
    copy = TwoVersions(str(tmp_path / "root"), built.old, built.new)
    publish.promote(copy.root, ALIAS, copy.old)
    return copy


GATEWAY = Gateway.func_or_class
"""The class itself: what it does once versions, follower and shards are there needs no Ray."""


class Replica:
    """One replica: its versions and its follower, loading by `load`, which a test may make fail."""

    def __init__(self, two: TwoVersions, pinned: list[str] | None = None) -> None:
        self.root, self.broken = two.root, set[str]()
        self.versions: Versions[Retriever] = Versions(two.root, [ALIAS], pinned or [], self._load)
        self.versions.start()
        self.follower = Follower(self.versions, self.prepare, self.activate, 0.01)
        self.shards, self.settings = ShardDeployments([], 1), SETTINGS
        self._tried = {(alias, pointer.current) for alias, pointer in self.versions.now.aliases.items()}

    def _check_alias(self, alias: str) -> None:
        pass

    def _fleet(self) -> Any:
        return None

    def _load(self, manifest: dict[str, Any]) -> Retriever:
        if manifest["version"] in self.broken:
            raise ArtifactError("the shard is damaged")
        return Retriever(self.root, manifest)

    async def prepare(self, alias: str, version: str) -> list[Any]:
        await asyncio.to_thread(self.versions.prepare, alias, version)
        return []

    async def activate(self, alias: str, state: dict[str, Any], even_older: bool = False) -> str:
        return str(await GATEWAY.activate(self, alias, state, even_older))

    @property
    def loaded(self) -> set[str]:
        return {version for _, version in self.versions.now.loaded}

    @property
    def current(self) -> str:
        return self.versions.now.aliases[ALIAS].current


class Replicas:
    """Some replicas of this process, as a fleet."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas

    async def prepare(self, alias: str, version: str) -> list[Any]:
        asked = [replica.prepare(alias, version) for replica in self.replicas]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    async def activate(self, alias: str, state: dict[str, Any]) -> list[Any]:
        asked = [replica.activate(alias, state) for replica in self.replicas]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    async def release(self, alias: str, version: str) -> None:
        for replica in self.replicas:
            replica.versions.release(alias, version)


def promote(two: TwoVersions, *replicas: Replica) -> dict[str, Any]:
    return asyncio.run(switch.promote(Replicas(*replicas), two.root, ALIAS, two.new, SETTINGS))


def rollback(two: TwoVersions, *replicas: Replica) -> dict[str, Any]:
    return asyncio.run(switch.rollback(Replicas(*replicas), two.root, ALIAS))


def test_promote_loads_everywhere_then_switches_and_rollback_loads_nothing(two: TwoVersions) -> None:
    replicas = Replica(two), Replica(two)
    result = promote(two, *replicas)
    assert (result["current"], result["replicas"]) == (two.new, 2)
    assert [replica.current for replica in replicas] == [two.new, two.new]
    assert all(replica.loaded == {two.old, two.new} for replica in replicas)
    before = [dict(replica.versions.now.loaded) for replica in replicas]
    assert rollback(two, *replicas)["current"] == two.old
    assert [replica.current for replica in replicas] == [two.old, two.old]
    assert [dict(replica.versions.now.loaded) for replica in replicas] == before


def test_a_version_may_be_loaded_to_be_compared_before_the_switch(two: TwoVersions) -> None:
    replicas = Replica(two), Replica(two)
    prepare = partial(switch.prepare, Replicas(*replicas), two.root, ALIAS, two.new, SETTINGS)
    result = asyncio.run(prepare())
    assert (result["current"], result["prepared"], result["replicas"]) == (two.old, two.new, 2)
    assert publish.current(two.root, ALIAS) == two.old
    assert [(replica.current, replica.loaded) for replica in replicas] == [(two.old, {two.old, two.new})] * 2
    for replica in replicas:
        loaded = replica.versions.take(ALIAS, two.new)[1]
        replica.versions._prepared[ALIAS, two.new] -= _UNUSED_SECONDS - 60
        asyncio.run(prepare())  # its time begins anew, and nothing is loaded again
        replica.versions._prepared[ALIAS, two.new] -= 120
        replica.versions.sweep()
        assert replica.versions.take(ALIAS, two.new)[1] is loaded
        replica.versions._prepared[ALIAS, two.new] -= _UNUSED_SECONDS
        replica.versions.sweep()
        with pytest.raises(ArtifactError, match="is not served here") as told:
            replica.versions.take(ALIAS, two.new)
        assert f"pinakes promote {ALIAS} {two.new} --prepare" in told.value.hint

    replicas[1].broken.add(two.new)
    with pytest.raises(PinakesError, match="1 of 2 replicas cannot load"):
        asyncio.run(prepare())
    assert [replica.loaded for replica in replicas] == [{two.old}] * 2


def test_one_replica_that_cannot_load_stops_it_all(two: TwoVersions) -> None:
    sound, broken = Replica(two), Replica(two)
    broken.broken.add(two.new)
    with pytest.raises(PinakesError, match=r"1 of 2 replicas cannot load.*nothing changed.*the shard is damaged"):
        promote(two, sound, broken)
    assert publish.current(two.root, ALIAS) == two.old
    assert [replica.current for replica in (sound, broken)] == [two.old, two.old]
    assert [replica.loaded for replica in (sound, broken)] == [{two.old}, {two.old}]


def test_replicas_that_did_not_switch_are_counted_apart_and_the_cause_is_told(two: TwoVersions) -> None:
    sound, cold = Replica(two), Replica(two)
    promote(two, sound)
    cold.broken.add(two.old)
    cold.versions.prepare(ALIAS, two.new)
    cold.versions.activate(ALIAS, {**two.state(two.new, moves=2), "previous": None})
    result = rollback(two, sound, cold)
    assert (result["current"], result["replicas"], result["behind"]) == (two.old, 1, 1)
    assert f"version {two.old} of 'cats' is not loaded here" in result["cause"]
    shown = _summary(result)
    assert "1 replica: loaded" in shown
    assert f"1 replica did not switch, or not with all shards: {result['cause']}" in shown
    alone = _summary({**result, "replicas": 0, "behind": 2})
    assert "2 replicas did not switch, or" in alone
    assert "no server within reach" not in alone


def test_an_alias_file_made_anew_is_followed_at_once(two: TwoVersions) -> None:
    replica = Replica(two)
    for _ in range(2):
        promote(two, replica)
        rollback(two, replica)
    Path(two.root, "aliases", f"{ALIAS}.json").unlink()
    result = promote(two, replica)
    assert (result["replicas"], "behind" in result, replica.current) == (1, False, two.new)


@pytest.mark.parametrize(("given", "expected"), [([], 0.3), (["--max-quality-loss", "0"], 0)])
def test_a_command_changes_only_the_settings_it_is_given(
    two: TwoVersions, monkeypatch: pytest.MonkeyPatch, given: list[str], expected: float
) -> None:
    server, chosen = Replica(two), list[PromoteConfig]()
    server.settings = PromoteConfig(max_quality_loss=0.3, smoke_queries=2)

    async def promoted(*arguments: Any) -> dict[str, Any]:
        chosen.append(arguments[4])
        return {"name": ALIAS, "current": two.new, "replicas": 0}

    class Served(Handle):
        def remote(self, *arguments: Any) -> Handle:
            return Handle(asyncio.run(GATEWAY.promote(server, *arguments)))

    monkeypatch.setattr(switch, "promote", promoted)
    monkeypatch.setattr(switch, "_gateway", lambda *_: nullcontext(Served(None)))
    done = CliRunner().invoke(cli.app, ["promote", ALIAS, two.new, "--root", two.root, *given])
    assert (done.exit_code, chosen) == (0, [PromoteConfig(max_quality_loss=expected, smoke_queries=2)]), done.output


def test_a_lost_race_changes_nothing_here(two: TwoVersions, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(two)

    def lost(*arguments: Any) -> None:
        raise StorageError("the alias was moved by somebody else")

    monkeypatch.setattr(publish, "promote", lost)
    with pytest.raises(StorageError):
        promote(two, replica)
    assert (replica.current, replica.loaded) == (two.old, {two.old})


def test_an_older_word_does_not_undo_a_newer_one_but_the_file_does(two: TwoVersions) -> None:
    versions = Replica(two).versions
    versions.prepare(ALIAS, two.new)
    assert versions.activate(ALIAS, two.state(two.new, moves=5))
    assert not versions.activate(ALIAS, two.state(two.old, moves=4))
    assert versions.now.aliases[ALIAS].current == two.new
    assert versions.activate(ALIAS, two.state(two.old, moves=1), even_older=True)  # the file was made anew
    assert versions.now.aliases[ALIAS].current == two.old


def test_what_is_not_loaded_cannot_be_activated(two: TwoVersions) -> None:
    versions = Replica(two).versions
    with pytest.raises(ArtifactError, match="not loaded"):
        versions.activate(ALIAS, two.state(two.new, moves=9))
    assert versions.now.aliases[ALIAS].current == two.old


def test_requests_name_alias_and_version_or_get_to_know_what_is_served(two: TwoVersions) -> None:
    versions = Replica(two, pinned=[two.new]).versions
    assert versions.take(None)[1].manifest["version"] == two.old
    assert versions.take(ALIAS, two.new)[1].manifest["version"] == two.new
    with pytest.raises(ArtifactError, match=f"no alias 'cat' here; served: {ALIAS}") as refused:
        versions.take("cat")
    assert "did you mean 'cats'" in refused.value.hint
    with pytest.raises(ArtifactError, match=f"'gone' of 'cats' is not served here; served: .*{two.new}"):
        versions.take(ALIAS, "gone")


def test_pinned_versions_stay_and_others_go_once_nobody_uses_them(two: TwoVersions) -> None:
    replica = Replica(two)
    gone = weakref.ref(replica.versions.take(ALIAS)[1])
    in_use = replica.versions.take(ALIAS)[1]
    promote(two, replica)
    alone = {"current": two.new, "previous": None, "history": [{}] * 9}  # the old version is no longer the previous one
    assert replica.versions.activate(ALIAS, alone)
    assert replica.loaded == {two.new}
    assert in_use.search(QUERIES[:1], 3)[0]  # a request under way goes on
    del in_use
    gc.collect()
    assert gone() is None
    pinned = Replica(two, pinned=[two.old])
    assert pinned.versions.activate(ALIAS, alone)
    assert pinned.loaded == {two.old, two.new}


def test_a_pinned_version_answers_smoke_queries_before_it_is_promoted(two: TwoVersions) -> None:
    asked = []

    class Trying(Replica):
        async def prepare(self, alias: str, version: str) -> list[Any]:
            return list(await GATEWAY.prepare(self, alias, version))

        async def release(self, alias: str, version: str) -> None:
            self.versions.release(alias, version)

        async def _smoke(self, retriever: Retriever) -> dict[str, str]:
            asked.append(retriever.manifest["version"])
            if self.broken:
                raise ArtifactError("a smoke query finds nothing")
            return {"check": "smoke", "state": "ok", "what": ""}

    replica = Trying(two, pinned=[two.new])
    replica.broken.add("it")
    with pytest.raises(PinakesError, match="a smoke query finds nothing"):
        promote(two, replica)
    assert (replica.current, replica.loaded) == (two.old, {two.old, two.new})
    replica.broken.clear()
    for _ in range(2):
        promote(two, replica)
        rollback(two, replica)
    assert asked == [two.new, two.new]
    asyncio.run(replica.prepare(ALIAS, two.old))  # it has answered for the alias
    assert asked == [two.new, two.new]


def test_no_third_version_stays_once_it_is_neither_current_nor_previous(two: TwoVersions) -> None:
    versions = Replica(two).versions
    versions.prepare(ALIAS, two.new)
    versions.activate(ALIAS, two.state(two.old, moves=2))  # the other one, just loaded, is its previous version
    versions.activate(ALIAS, {**two.state(two.old, moves=3), "previous": None})
    assert set(versions.now.loaded) == {(ALIAS, two.old)}


def test_what_a_straggler_loads_again_goes_in_time(two: TwoVersions, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(two)
    replica.versions.prepare(ALIAS, two.new)  # a request that names it, say, or a call that came too late
    asyncio.run(replica.follower.catch_up())
    assert replica.loaded == {two.old, two.new}
    monkeypatch.setattr("cluster.serve_versions._UNUSED_SECONDS", -1.0)
    asyncio.run(replica.follower.catch_up())
    assert replica.loaded == {two.old}


def test_a_shard_deployment_follows_the_alias_as_well(two: TwoVersions) -> None:
    async def follow() -> None:
        shard = Shard.func_or_class(two.root, [ALIAS], [], 0, 2, "cpu", 0.01)
        publish.promote(two.root, ALIAS, two.new)
        while shard.versions.now.aliases[ALIAS].current != two.new:
            await asyncio.sleep(0.01)
        assert set(shard.versions.now.loaded) == {(ALIAS, two.old), (ALIAS, two.new)}
        assert set(shard.versions.take(ALIAS)[1].shards) == {0, 2}
        shard._following.cancel()

    asyncio.run(asyncio.wait_for(follow(), 30))


def test_following_a_rollback_asks_no_shards_and_a_damaged_one_leaves_nothing_loaded(two: TwoVersions) -> None:
    class Spread(Replica):
        async def prepare(self, alias: str, version: str) -> list[Any]:
            return list(await GATEWAY.prepare(self, alias, version))

        async def release(self, alias: str, version: str) -> None:
            await GATEWAY.release(self, alias, version)

        async def _make_ready(self, alias: str, version: str) -> None:
            await GATEWAY._make_ready(self, alias, version)

    replica = Spread(two)
    promote(two, Replica(two))
    replica.shards = ShardDeployments([Handle([ArtifactError("the shard is damaged")])], 1)
    with pytest.raises(ArtifactError, match="damaged"):
        asyncio.run(replica._make_ready(ALIAS, two.new))
    assert replica.loaded == {two.old}
    asyncio.run(replica._make_ready(ALIAS, two.old))
    with pytest.raises(ArtifactError, match="damaged"):
        asyncio.run(replica.prepare(ALIAS, two.old))


def test_a_version_prepared_in_vain_is_let_go_of(two: TwoVersions) -> None:
    versions = Replica(two).versions
    versions.prepare(ALIAS, two.new)
    versions.release(ALIAS, two.old)  # current: it stays
    assert set(versions.now.loaded) == {(ALIAS, two.old), (ALIAS, two.new)}
    versions.release(ALIAS, two.new)
    assert set(versions.now.loaded) == {(ALIAS, two.old)}


def test_a_replica_follows_what_another_process_promoted(two: TwoVersions) -> None:
    replica = Replica(two)
    publish.promote(two.root, ALIAS, two.new)
    asyncio.run(replica.follower.catch_up())
    assert (replica.current, replica.loaded) == (two.new, {two.old, two.new})
    publish.rollback(two.root, ALIAS)
    asyncio.run(replica.follower.catch_up())
    assert replica.current == two.old
    assert Replica(two).current == two.old  # a restarted one begins there
    late = Replica(two)
    asyncio.run(late.follower.catch_up())
    assert late.loaded == {two.old, two.new}  # and warms the one before


def test_a_replica_that_starts_during_a_switch_comes_up_on_what_was_promoted(two: TwoVersions) -> None:
    def load(manifest: dict[str, Any]) -> Retriever:
        publish.promote(two.root, ALIAS, two.new)
        return Retriever(two.root, manifest)

    versions: Versions[Retriever] = Versions(two.root, [ALIAS], [], load)
    versions.start()
    assert versions.now.aliases[ALIAS].current == two.new
    assert set(versions.now.loaded) == {(ALIAS, two.old), (ALIAS, two.new)}


def test_a_replica_that_cannot_follow_goes_on_and_says_so(two: TwoVersions) -> None:
    replica = Replica(two)
    replica.broken.add(two.new)
    publish.promote(two.root, ALIAS, two.new)
    asyncio.run(replica.follower.catch_up())
    assert replica.current == two.old
    assert replica.follower.troubles == {(ALIAS, two.new): "the shard is damaged"}
    replica.broken.clear()
    while replica.current != two.new:  # it waits a little longer after each failure
        asyncio.run(replica.follower.catch_up())
    assert replica.follower.troubles == {}


def test_troubles_with_a_version_that_no_alias_points_to_any_more_are_forgotten(two: TwoVersions) -> None:
    replica = Replica(two)
    replica.broken.add(two.new)
    publish.promote(two.root, ALIAS, two.new)
    asyncio.run(replica.follower.catch_up())
    assert set(replica.follower.troubles) == {(ALIAS, two.new)}
    Path(two.root, "aliases", f"{ALIAS}.json").unlink()
    publish.promote(two.root, ALIAS, two.old)
    asyncio.run(replica.follower.catch_up())
    assert (replica.follower.troubles, replica.current) == ({}, two.old)


def test_a_store_out_of_reach_stops_nothing(two: TwoVersions, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(two)

    async def follow_for_a_while() -> None:
        task = asyncio.create_task(replica.follower.run())
        with monkeypatch.context() as patch:
            patch.setattr(publish, "read_alias", lambda *_: (_ for _ in ()).throw(StorageError("unreachable")))
            await asyncio.sleep(0.1)
            assert not task.done()
        publish.promote(two.root, ALIAS, two.new)
        while replica.current != two.new:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(follow_for_a_while())


def test_no_answer_mixes_two_versions_while_they_are_switched(two: TwoVersions) -> None:
    """Each answer's scores are those of the version that it names, for the vectors of that version's encoder."""
    replica, stop = Replica(two), threading.Event()
    expected = {}
    for version in (two.old, two.new):
        retriever = Retriever(two.root, two.manifest(version))
        expected[version] = retriever.search_vectors(retriever.encoder.encode_queries(QUERIES), 5)

    def ask() -> tuple[set[str], int]:
        seen, count = set(), 0
        while not stop.is_set():
            _, retriever = replica.versions.take(None)
            score_BK, row_BK = retriever.search_vectors(retriever.encoder.encode_queries(QUERIES), 5)
            version = retriever.manifest["version"]
            np.testing.assert_array_equal(row_BK, expected[version][1])
            np.testing.assert_allclose(score_BK, expected[version][0], atol=1e-5)
            seen.add(version)
            count += 1
        return seen, count

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask) for _ in range(4)]
        try:
            for _ in range(10):
                promote(two, replica)
                rollback(two, replica)
        finally:
            stop.set()
        results = [one.result() for one in asked]
    assert set().union(*(seen for seen, _ in results)) == {two.old, two.new}


def test_a_server_is_found_by_the_word_it_left(
    two: TwoVersions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PINAKES_CACHE", str(tmp_path / "cache"))
    assert switch.announced(two.root) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    switch.announce(two.root, "127.0.0.1:1234")
    monkeypatch.chdir(Path(two.root).parent)
    # However the root is written.
    assert switch.announced(Path(two.root).name) == switch.Announced("127.0.0.1:1234", "token")
    (word,) = (tmp_path / "cache" / "servers").iterdir()
    word.write_text(word.read_text().replace(str(os.getpid()), "999999999"))
    assert switch.announced(two.root) is None  # of a process that is no more
    switch.withdraw(two.root)
    switch.withdraw(two.root)
    assert not list((tmp_path / "cache" / "servers").iterdir())


class Handle:
    """A deployment's handle, as far as it is used here: every method answers `told`, or raises it."""

    deployment_name = "shard-1"

    def __init__(self, told: Any) -> None:
        self.serves = self.rollback = self.promote = self
        self.told = told

    def remote(self, *arguments: Any) -> Handle:
        return self

    def broadcast(self, method: str, *arguments: Any) -> Handle:
        return self

    def result(self, timeout_s: float | None = None) -> Any:
        if isinstance(self.told, Exception):
            raise self.told
        return self.told

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> Any:
        return self.result(timeout_s)


DIED, NONE_THERE = RayActorError(), DeploymentUnavailableError(DeploymentID("shard-1"))


def test_replicas_that_are_down_hold_nobody_up_and_those_that_hang_not_for_long() -> None:
    assert asyncio.run(switch.broadcast(Handle(NONE_THERE), 1, "activate")) == []
    assert asyncio.run(switch.broadcast(Handle(["b", DIED, "b"]), 1, "activate")) == ["b", "b"]
    (hung,) = asyncio.run(switch.broadcast(Handle(TimeoutError()), 1, "activate"))
    assert "not every replica of shard-1 answered 'activate' within 1 s" in str(hung)
    asyncio.run(ShardDeployments([Handle(NONE_THERE), Handle([None]), Handle([DIED])], 1).tell(1, "activate"))
    with pytest.raises(ArtifactError, match="damaged"):
        asyncio.run(ShardDeployments([Handle([None, ArtifactError("damaged")])], 1).tell(1, "prepare"))


def test_rolling_back_asks_nobody_before_the_alias_is_moved(two: TwoVersions) -> None:
    replica = Replica(two)
    promote(two, replica)

    class Down(Replicas):
        async def prepare(self, alias: str, version: str) -> list[Any]:
            raise NONE_THERE

        async def activate(self, alias: str, state: dict[str, Any]) -> list[Any]:
            assert publish.current(two.root, ALIAS) == two.old
            return await super().activate(alias, state)

    assert asyncio.run(switch.rollback(Down(replica), two.root, ALIAS))["current"] == two.old
    assert replica.current == two.old


@pytest.mark.parametrize("error", [DIED, TimeoutError()])
@pytest.mark.parametrize("moved", [True, False])
def test_a_gateway_that_fails_while_it_rolls_back_leaves_the_alias_rolled_back_once(
    two: TwoVersions, monkeypatch: pytest.MonkeyPatch, error: Exception, moved: bool
) -> None:
    publish.promote(two.root, ALIAS, two.new)

    class Failing(Handle):
        def result(self, timeout_s: float) -> Any:
            if moved:
                publish.rollback(two.root, ALIAS)
            raise error

    monkeypatch.setattr(switch, "_gateway", lambda *_: nullcontext(Failing(None)))
    assert switch.rollback_from_here(two.root, ALIAS)["current"] == two.old
    assert publish.current(two.root, ALIAS) == two.old


@pytest.mark.parametrize("told", [True, False, TimeoutError(), RayServeException("not running")])
def test_only_the_look_for_a_gateway_may_fail_quietly(
    two: TwoVersions, monkeypatch: pytest.MonkeyPatch, told: Any
) -> None:
    monkeypatch.setattr("ray.serve.get_app_handle", lambda name: Handle(told))
    monkeypatch.setattr("cluster.session.session", lambda config: nullcontext())
    with switch._gateway(two.root, ALIAS, "somewhere") as gateway:
        assert (gateway is not None) == (told is True)
    with pytest.raises(RayServeException, match="overloaded"), switch._gateway(two.root, ALIAS, "somewhere"):
        raise RayServeException("overloaded")
