"""What all tests share: a quiet environment, one Ray cluster a module, the real data where it is present."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, which wait for clusters: the last one begun decides when all end."""
    tests_of = Counter(item.path for item in items)
    with_cluster = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}

    def rank(item: pytest.Item) -> tuple[bool, bool, int]:
        return "chaos" not in item.path.parts, item.path not in with_cluster, -tests_of[item.path]

    items.sort(key=lambda item: (rank(item), str(item.path)))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real passages and questions; tests that need them are skipped where they are absent."""
    if not DATA.is_dir():
        pytest.skip(f"the real data is not here ({DATA}); it is not part of the repository")
    return DATA


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[str]:
    """One Ray cluster of this module's own, ended by itself (never by `ray stop`); gives its address."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


@pytest.fixture(scope="session")
def local_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with two versions under the alias `cats`, built without Ray; not to be changed."""
    from tests.checkpoints import write_sentence_transformer
    from tests.local_backend import build_root

    folder = tmp_path_factory.mktemp("local")
    checkpoint = write_sentence_transformer(str(folder / "model"))
    build_root(folder, checkpoint)
    return build_root(folder, checkpoint, num_shards=2)
