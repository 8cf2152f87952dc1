"""Kill and stop what answers: shards, reranker, gateway. Answers say what they lack, and all comes back by itself."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import jobs, switch
from pipelines import publish
from pipelines.config import parse_config
from pipelines.index.search import merge_topk
from pipelines.retrieve import Retriever
from tests.chaos.driver import PINAKES
from tests.checkpoints import write_cross_encoder
from tests.test_serve import call
from tests.two_versions import ALIAS, QUERIES, TwoVersions, build_two

pytestmark = pytest.mark.chaos
K = 5


@pytest.fixture(scope="module")
def two(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoVersions]:
    import ray

    ray.init(address=ray_cluster, log_to_driver=False)
    yield build_two(tmp_path_factory.mktemp("serving"))
    from ray import serve

    serve.shutdown()


PORT = jobs.free_port()  # Serve keeps the port it was started with


def content_of(two: TwoVersions, **settings: Any) -> dict[str, Any]:
    """Return a config that serves the two versions."""
    return {
        "root": two.root,
        "corpus": {"sources": ["-"]},
        "encoder": {"checkpoint": two.manifest(two.new)["encoder"]["checkpoint"]},
        "index": {"name": ALIAS},
        "serve": {"port": PORT, "follow_seconds": 0.2, **settings},
    }


@contextmanager
def serving(two: TwoVersions, reranker: str | None = None, **settings: Any) -> Iterator[str]:
    stages = {"rerank": {"checkpoint": reranker}} if reranker else {}
    with jobs.serving(parse_config({**content_of(two, **settings), **stages})) as address:
        yield address


def replicas_of(deployment: str, server: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes of a deployment's replicas among the server's (by default this process's) descendants."""
    found = []
    for process in (server or psutil.Process()).children(recursive=True):
        try:
            if f"ServeReplica:pinakes:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def search(address: str, query: str, **more: Any) -> tuple[int, Any]:
    status, answer, _ = call(address, "/search", {"query": query, "k": K, **more})
    return status, answer


class Callers:
    """Some threads that ask one question after the other, until they are told to stop."""

    def __init__(self, address: str, number: int = 4, **request: Any) -> None:
        self.answers: list[tuple[int, Any]] = []
        self._stop, self._pool = threading.Event(), ThreadPoolExecutor(number)

        def ask(first: int) -> None:
            for query in itertools.islice(itertools.cycle(QUERIES), first, None):
                if self._stop.is_set():
                    return
                try:
                    self.answers.append(search(address, query, **request))
                except OSError as error:  # the connection broke
                    self.answers.append((0, str(error)))

        self._asked = [self._pool.submit(ask, number) for number in range(number)]

    def more(self, count: int = 20) -> None:
        """Wait for so many more answers."""
        wanted = len(self.answers) + count
        while len(self.answers) < wanted:
            time.sleep(0.02)
            for one in self._asked:
                if one.done():
                    one.result()

    def finish(self) -> list[tuple[int, Any]]:
        self._stop.set()
        for one in self._asked:
            one.result()
        self._pool.shutdown()
        return self.answers


def expected(two: TwoVersions, shards: list[int]) -> dict[str, list[int]]:
    """Return the rows that each query finds in these shards of the new version."""
    retriever = Retriever(two.root, two.manifest(two.new))
    emb_BD = retriever.encoder.encode_queries(QUERIES)
    _, row_BK = merge_topk([retriever.shards[n].search(emb_BD, K) for n in shards], K)
    return dict(zip(QUERIES, row_BK.tolist(), strict=True))


def wait_until_whole(address: str) -> None:
    while search(address, QUERIES[0])[1].get("complete") is not True:
        time.sleep(0.1)


def test_a_shard_that_hangs_is_named_and_the_others_answer(two: TwoVersions) -> None:
    whole, without = expected(two, [0, 1, 2]), expected(two, [0, 2])
    with serving(two, placement="spread", shard_timeout_ms=500) as address:
        for query in QUERIES:
            _, answer = search(address, query)
            assert ([hit["row"] for hit in answer["hits"]], answer["complete"]) == (whole[query], True)
        (hanging,) = replicas_of("shard-1")
        hanging.suspend()
        try:
            for query in QUERIES:
                status, answer = search(address, query)
                assert (status, answer["complete"], answer["missing_shards"]) == (200, False, [1])
                assert [hit["row"] for hit in answer["hits"]] == without[query]
            others = [replicas_of(f"shard-{n}")[0] for n in (0, 2)]
            for process in others:
                process.suspend()
            status, problem = search(address, QUERIES[0])
            assert (status, "no shard answered" in problem["detail"]) == (503, True)
            for process in others:
                process.resume()
        finally:
            hanging.resume()
        wait_until_whole(address)


def test_a_killed_shard_comes_back_and_no_answer_hides_that_it_was_gone(two: TwoVersions) -> None:
    whole, without = expected(two, [0, 1, 2]), expected(two, [0, 2])
    with serving(two, placement="spread", shard_timeout_ms=500) as address:
        callers = Callers(address)
        callers.more()
        replicas_of("shard-1")[0].kill()
        callers.more()
        wait_until_whole(address)
        callers.more()
        answers = callers.finish()
    assert {status for status, _ in answers} == {200}
    for _, answer in answers:
        rows = [hit["row"] for hit in answer["hits"]]
        if answer["complete"]:
            assert rows in whole.values()
        else:
            assert answer["missing_shards"] == [1]
            assert rows in without.values()


def test_rolling_back_passes_a_shard_that_hangs_and_one_that_is_gone(two: TwoVersions) -> None:
    with serving(two, placement="spread", shard_timeout_ms=500, replicas=2) as address:
        wait_until_whole(address)
        (shard,) = replicas_of("shard-1")
        shard.suspend()
        for expected in (two.old, two.new):
            began = time.monotonic()
            result = switch.rollback_from_here(two.root, ALIAS)
            assert time.monotonic() - began < 15
            assert (result["current"], publish.current(two.root, ALIAS)) == (expected, expected)
            assert {search(address, query)[1]["version"] for query in QUERIES} == {expected}
            if result["current"] == two.old:
                assert "shard-1" in result["cause"]  # it hangs; one that is gone comes back by the alias
                shard.kill()
            else:
                assert "behind" not in result
        wait_until_whole(address)


@pytest.mark.parametrize("proxy", ["python", "haproxy"])
def test_a_killed_gateway_comes_back_on_what_was_promoted_meanwhile(
    two: TwoVersions, tmp_path: Path, proxy: str
) -> None:
    port = jobs.free_port()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(content_of(two, port=port, replicas=2, proxy=proxy)))
    alone = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    alone |= {f"RAY_SERVE_HAPROXY_{use}_PORT": str(jobs.free_port()) for use in ("METRICS", "STATS")}
    with subprocess.Popen([PINAKES, "serve", str(config)], stderr=subprocess.PIPE, text=True, env=alone) as server:
        assert server.stderr is not None
        told: list[str] = []
        while not any("curl -s" in line for line in told):
            told.append(server.stderr.readline())
            assert told[-1], f"it never said that it serves: {''.join(told)}"
        try:
            answers = _kill_both_gateways(two, f"http://127.0.0.1:{port}", psutil.Process(server.pid))
        finally:
            server.send_signal(signal.SIGINT)
            server.stderr.read()
    publish.promote(two.root, ALIAS, two.new)
    failed = [status for status, _ in answers if status != 200]
    # The one that is killed while the other is there may cost what it was working on. HAProxy asks the other one again
    # unless an answer had begun, and rarely breaks a connection off when it learns of the new replica.
    assert len(failed) <= 4, failed
    assert {answer["version"] for status, answer in answers if status == 200} == {two.old, two.new}


def _kill_both_gateways(two: TwoVersions, address: str, server: psutil.Process) -> list[tuple[int, Any]]:
    """Kill one under load, wait for its successor, then kill the other, so that the successor has to answer.

    Returns what the callers got around the first kill.
    """
    callers = Callers(address)
    callers.more()
    publish.promote(two.root, ALIAS, two.old)
    victim, other = replicas_of("Gateway", server)
    victim.kill()
    callers.more(50)
    while len(replicas_of("Gateway", server)) < 2:
        time.sleep(0.1)
    while search(address, QUERIES[0])[1]["version"] != two.old:
        time.sleep(0.1)
    callers.more(50)
    answers = callers.finish()
    other.kill()
    while not _is_answered(address):
        time.sleep(0.1)
    assert search(address, QUERIES[0])[1]["version"] == two.old
    return answers


def _is_answered(address: str) -> bool:
    try:
        return search(address, QUERIES[0])[0] == 200
    except OSError:  # HAProxy breaks the connection off while there is nobody
        return False


def test_a_killed_reranker_costs_its_stage_at_most(two: TwoVersions, tmp_path: Path) -> None:
    reranker = write_cross_encoder(str(tmp_path / "reranker"))
    with serving(two, reranker, stage_replicas=2) as address:
        callers = Callers(address, rerank=True)
        callers.more()
        replicas_of("Reranker")[0].kill()
        callers.more(40)
        answers = callers.finish()
    assert {status for status, _ in answers} == {200}
    assert all(answer["complete"] or answer["skipped"] == ["rerank"] for _, answer in answers)
