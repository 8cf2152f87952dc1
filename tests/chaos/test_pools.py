"""The encoder pool on clusters of logical CPUs and GPUs: it starts full, grows with them, and ends with its stage.

The plan has the shape of `encode`'s, with workers that only wait and say where they are.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.pools import encode_resources, products, stream_rows, told_while_waiting
from pipelines.config import ClusterConfig

pytestmark = pytest.mark.chaos

_ENCODER_SECONDS = 1.0  # until a test has seen what it waits for; then parts take no time


class _Reader:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (Path(self.folder) / f"read-{batch['part'][0]}").touch()
        return batch


class _Encoder:
    def __init__(self, folder: str, bad_part: int | None = None) -> None:
        self.folder, self.bad_part = folder, bad_part

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import ray

        if batch["part"][0] == self.bad_part:
            raise ValueError("this part is bad")
        if not (Path(self.folder) / "hurry").exists():
            time.sleep(_ENCODER_SECONDS)
        here = ray.get_runtime_context()
        return {**batch, "actor": [here.get_actor_id()], "node": [here.get_node_id()]}


class _Writer:
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


def stage(config: ClusterConfig, num_parts: int, folder: Path, bad_part: int | None = None) -> Iterator[dict[str, Any]]:
    import ray

    use = encode_resources(config, num_parts)
    one: dict[str, Any] = {"batch_size": 1, "batch_format": "numpy"}
    arguments = (str(folder), bad_part)

    def plan() -> Any:
        return (
            ray.data.from_items([{"part": i} for i in range(num_parts)], override_num_blocks=num_parts)
            .map_batches(_Reader, fn_constructor_args=arguments[:1], compute=use.readers, **one, **use.reader)
            .map_batches(_Encoder, fn_constructor_args=arguments, compute=use.encoders, **one, **use.encoder)
            .map_batches(_Writer, compute=use.writers, **one, **use.writer)
        )

    return stream_rows(plan)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with two cores and no GPU, to which tests add nodes."""
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False)
    try:
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """A collection that happens to come would end actors too."""
    gc.disable()
    yield
    gc.enable()


def pool(strategy: Any) -> tuple[int, int, int]:
    return strategy.min_size, strategy.initial_size, strategy.max_size


def wait_until_free() -> None:
    """Return when nothing of the cluster is taken (its nodes report with a delay)."""
    import ray

    for _ in range(600):
        total, left = ray.cluster_resources(), ray.available_resources()
        if all(left.get(kind) == total.get(kind) for kind in ("CPU", "GPU")):
            return
        time.sleep(0.1)
    raise AssertionError(f"of {total} only {left} is free")


def test_the_pool_is_as_large_as_the_cluster_and_may_grow(cluster: Any) -> None:
    """On two cores and no GPU."""
    assert pool(encode_resources(ClusterConfig(), 100).encoders) == (2, 2, 100)
    assert pool(encode_resources(ClusterConfig(), 1).encoders) == (1, 1, 1)
    assert pool(encode_resources(ClusterConfig(workers=3), 100).encoders) == (3, 3, 3)
    assert pool(encode_resources(ClusterConfig(workers=(1, 4)), 100).encoders) == (1, 2, 4)
    assert pool(encode_resources(ClusterConfig(cpus_per_worker=2), 100).encoders) == (1, 1, 100)
    use = encode_resources(ClusterConfig(gpus_per_worker=1), 100)
    assert pool(use.encoders) == (1, 1, 100)
    assert pool(use.readers) == (1, 1, 32)
    assert use.encoder["num_gpus"] == 1


@pytest.mark.parametrize("end", ["close", "interrupt", "bad part"])
def test_actors_end_with_their_stage(cluster: Any, no_collection: None, tmp_path: Path, end: str) -> None:
    from ray.exceptions import RayTaskError

    rows: Any = stage(ClusterConfig(), 40, tmp_path, bad_part=6 if end == "bad part" else None)
    assert 0 <= next(rows)["part"] < 40
    held: BaseException | None = None
    if end == "close":
        rows.close()
    elif end == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            rows.throw(KeyboardInterrupt)
    else:
        with pytest.raises(RayTaskError, match="this part is bad") as raised:
            list(rows)
        held = raised.value
    wait_until_free()
    assert (held is not None) == (end == "bad part")  # the error was alive all the time


def test_encoders_start_on_every_core_and_on_the_nodes_that_join(cluster: Any, tmp_path: Path) -> None:
    num_parts = 400
    where: dict[str, set[str]] = {}
    done: list[int] = []
    joined = None
    for row in stage(ClusterConfig(), num_parts, tmp_path):
        done.append(row["part"])
        where.setdefault(row["node"], set()).add(row["actor"])
        if joined is None and sum(map(len, where.values())) == 2:
            joined = cluster.add_node(num_cpus=2)  # both encoders of the first node are at work
        if joined is not None and len(where.get(joined.node_id, ())) == 2:
            (tmp_path / "hurry").touch()
    assert sorted(done) == list(range(num_parts))
    assert [len(actors) for actors in where.values()] == [2, 2]
    wait_until_free()
    cluster.remove_node(joined)


def test_a_stage_without_gpus_takes_those_that_come_two_encoders_on_each(cluster: Any, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    num_parts = 200
    rows = stage(ClusterConfig(gpus_per_worker=0.5), num_parts, tmp_path)
    actors: dict[str, set[str]] = {}

    def consume() -> list[int]:
        done = []
        for row in rows:
            done.append(int(row["part"]))
            actors.setdefault(row["node"], set()).add(row["actor"])
            if sum(map(len, actors.values())) == 2:
                (tmp_path / "hurry").touch()
        return done

    with ThreadPoolExecutor(1) as thread:
        consumed = thread.submit(consume)
        while not list(tmp_path.glob("read-*")):  # reading goes ahead without an encoder
            time.sleep(0.1)
        assert not actors
        node = cluster.add_node(num_cpus=2, num_gpus=1)
        assert sorted(consumed.result()) == list(range(num_parts))
    assert {name: len(found) for name, found in actors.items()} == {node.node_id: 2}
    wait_until_free()
    cluster.remove_node(node)


def test_a_cluster_without_the_gpu_that_is_asked_for_says_so_at_once(cluster: Any) -> None:
    said: list[str] = []
    with told_while_waiting(ClusterConfig(gpus_per_worker=1024), said.append):
        while not said:
            time.sleep(0.01)
    assert "asks for: 1024 GPUs" in said[0]
    with told_while_waiting(ClusterConfig(), said.append):
        pass
    assert len(said) == 1


def _whereabouts(item: int, seen: str) -> tuple[str, list[str], int, str]:
    import os

    import ray

    here = ray.get_runtime_context()
    return here.get_node_id(), here.get_accelerator_ids()["GPU"], os.getpid(), seen


def test_products_keep_the_gpus_that_are_free_and_do_without_else(cluster: Any) -> None:
    with products(4, 0.5) as (run, on_gpu):
        assert not on_gpu
        assert [gpus for _, (_, gpus, _, _) in run(_whereabouts, range(4), "x")] == [[]] * 4
    node = cluster.add_node(num_cpus=2, num_gpus=1)
    cluster.wait_for_nodes()
    with products(9, 0.5) as (run, on_gpu):
        assert on_gpu
        for _ in range(2):
            found = dict(run(_whereabouts, range(9), "x"))
            assert sorted(found) == list(range(9))
            places = {(node_id, *gpus, seen) for node_id, gpus, _, seen in found.values()}
            assert places == {(node.node_id, "0", "x")}
        assert len({pid for _, _, pid, _ in found.values()}) == 2
        with products(4, 0.5) as (run_beside, beside_on_gpu):
            assert not beside_on_gpu
            assert len(dict(run_beside(_whereabouts, range(4), "x"))) == 4
    wait_until_free()
    cluster.remove_node(node)
