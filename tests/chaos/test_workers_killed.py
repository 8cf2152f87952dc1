"""Kill an encoder actor, and a whole node: the job finishes, nothing lost or doubled."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import NUM_ROWS, Undisturbed
from tests.chaos.driver import content_of, run, start, wait_for_parts
from tests.chaos.test_driver_killed import check_same


def encoder_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith("ray::") and "EncoderActor" in command:
            found.append(process)
    return found


def test_an_encoder_actor_dies(undisturbed: Undisturbed, tmp_path: Path) -> None:
    import json

    process = start(undisturbed.config(tmp_path))
    wait_for_parts(tmp_path / "root", 2, process)
    victims = encoder_processes()
    assert victims
    os.kill(victims[0].pid, signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    check_same(tmp_path, undisturbed, json.loads(out))


@pytest.fixture
def three_nodes() -> Iterator[Callable[[], None]]:
    """A cluster of three nodes; gives what kills the third."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    before = os.environ["RAY_ADDRESS"]
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield lambda: cluster.remove_node(nodes[1], allow_graceful=False)
    finally:
        os.environ["RAY_ADDRESS"] = before
        cluster.shutdown()


@pytest.mark.chaos
def test_a_node_dies(undisturbed: Undisturbed, tmp_path: Path, three_nodes: Callable[[], None]) -> None:
    config = undisturbed.config(tmp_path)
    process = start(config)
    wait_for_parts(tmp_path / "root", 3, process)
    three_nodes()
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len(list((tmp_path / "root").glob("embeddings/*/*/part-*.parquet"))) == -(-NUM_ROWS // 64)
    made = {k: v for k, v in content_of(tmp_path / "root").items() if k.startswith(("corpora", "embeddings"))}
    assert made == {k: v for k, v in undisturbed.content.items() if k in made}
    check_same(tmp_path, undisturbed, run(config))
