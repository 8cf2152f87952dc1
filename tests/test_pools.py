"""What the pools say when no node has room for an encoder. (How they grow and end: tests/chaos/test_pools.py.)"""

from __future__ import annotations

import pytest

from cluster.pools import lack, num_fitting
from pipelines.config import ClusterConfig


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("config", "nodes", "fitting"),
    [
        ({}, [node(2), node(3)], 5),
        ({"gpus_per_worker": 1}, [node(2), node(2, 4)], 4),
        ({"gpus_per_worker": 0.5}, [node(2, 1)], 2),
        ({"gpus_per_worker": 1, "cpus_per_worker": 4}, [node(8, 4)], 2),
        ({"cpus_per_worker": 4}, [node(7)], 1),
    ],
)
def test_with_room_nothing_lacks(config: dict[str, float], nodes: list[dict[str, object]], fitting: int) -> None:
    assert num_fitting(ClusterConfig(**config), nodes) == fitting
    assert lack(ClusterConfig(**config), nodes) is None


@pytest.mark.parametrize(
    ("config", "nodes", "told"),
    [
        ({"gpus_per_worker": 1}, [node(2), node(3)], "asks for: 1 GPUs; of 2 now none has more than 0 GPUs and 3 CPUs"),
        ({"gpus_per_worker": 1}, [node(2), node(2, 4, alive=False)], "of 1 now none has more than 0 GPUs and 2 CPUs"),
        ({"gpus_per_worker": 2, "cpus_per_worker": 4}, [node(2, 2), node(8, 1)], "asks for: 2 GPUs and 4 CPUs"),
        ({"cpus_per_worker": 4}, [node(2)], "asks for: 4 CPUs; of 1 now none has more than 0 GPUs and 2 CPUs"),
        ({}, [], "asks for: 1 CPUs; of 0 now none has more than 0 GPUs and 0 CPUs"),
    ],
)
def test_what_lacks_is_told_in_numbers(config: dict[str, float], nodes: list[dict[str, object]], told: str) -> None:
    assert told in str(lack(ClusterConfig(**config), nodes))
