"""Kill an encoder actor, and a whole node: the job finishes, nothing lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import NUM_ROWS, Undisturbed
from tests.chaos.driver import PINAKES, content_of, run
from tests.chaos.test_driver_killed import check_same


def start(config: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PINAKES, "run", config, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def encoder_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if command.startswith("ray::") and "_EncoderActor" in command:
            found.append(process)
    return found


def wait_for_parts(root: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until `count` embedding parts are in place."""
    while len(list(root.glob("embeddings/*/*/part-*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


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
def three_nodes() -> Iterator[object]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    before = os.environ["RAY_ADDRESS"]
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster
    finally:
        os.environ["RAY_ADDRESS"] = before
        cluster.shutdown()


@pytest.mark.chaos
def test_a_node_dies(undisturbed: Undisturbed, tmp_path: Path, three_nodes: object) -> None:
    config = undisturbed.config(tmp_path)
    process = start(config)
    wait_for_parts(tmp_path / "root", 3, process)
    three_nodes.remove_node(three_nodes.list_all_nodes[-1], allow_graceful=False)  # type: ignore[attr-defined]
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len(list((tmp_path / "root").glob("embeddings/*/*/part-*.parquet"))) == -(-NUM_ROWS // 64)
    made = {k: v for k, v in content_of(tmp_path / "root").items() if k.startswith(("corpora", "embeddings"))}
    assert made == {k: v for k, v in undisturbed.content.items() if k in made}
    check_same(tmp_path, undisturbed, run(config))
