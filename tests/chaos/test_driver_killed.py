"""SIGKILL the driver at random moments of every stage: nothing is lost or doubled, and the result is the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipelines.manifest import find_done
from pipelines.storage import Store
from tests.chaos.conftest import NUM_ROWS, Undisturbed
from tests.chaos.driver import STAGES, content_of, run, run_and_kill, start, wait_for_parts, wait_for_quiet


def ids_of(root: Path) -> list[str]:
    import pyarrow as pa

    tables = [pa.ipc.open_file(pa.memory_map(str(p))).read_all() for p in sorted(root.rglob("passages-*.arrow"))]
    return [i for table in tables for i in table["id"].to_pylist()]


def check_same(folder: Path, undisturbed: Undisturbed, result: dict[str, Any]) -> None:
    assert ids_of(folder / "root") == [f"p{i}" for i in range(NUM_ROWS)]
    assert content_of(folder / "root") == undisturbed.content
    assert result["version"]["version"] == undisturbed.result["version"]["version"]
    measured, expected = ({**told["version"]["recall"], "ms": 0.0} for told in (result, undisturbed.result))
    assert measured == expected
    assert not list((folder / "root").rglob("receipts"))
    assert not list((folder / "root").rglob(".staging-*"))


def done_parts(folder: Path) -> int:
    """Count the embedding parts that are in place and whole, as the next run will judge them."""
    found = 0
    for receipt in (folder / "root" / "embeddings").rglob("receipts/*.json"):
        store = Store(str(receipt.parents[1]))
        made_from = json.loads(receipt.read_text())["made_from"]
        found += find_done(store, receipt.name.removesuffix(".json"), made_from) is not None
    return found


def test_a_few_kills(undisturbed: Undisturbed, tmp_path: Path) -> None:
    rng = random.Random(1)
    told = [run_and_kill(undisturbed.config(tmp_path), stage, rng) for stage in ("ingest", "encode", "add")]
    assert any("killed" in line for line in told), told
    check_same(tmp_path, undisturbed, run(undisturbed.config(tmp_path)))


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_a_kill_in_every_stage(undisturbed: Undisturbed, tmp_path: Path, seed: int) -> None:
    """Nine stages, three times: 27 drivers, each killed at a seeded random moment unless it got through first."""
    rng = random.Random(100 + seed)
    told = [run_and_kill(undisturbed.config(tmp_path), stage, rng) for stage in STAGES]
    print("\n".join(told))
    assert sum("killed" in line for line in told) >= 7, told
    check_same(tmp_path, undisturbed, run(undisturbed.config(tmp_path)))


@pytest.mark.chaos
def test_a_resumed_encode_makes_exactly_what_is_missing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    total = -(-NUM_ROWS // 64)
    process = start(undisturbed.config(tmp_path))
    wait_for_parts(tmp_path / "root", 4, process)
    process.kill()
    process.communicate()
    wait_for_quiet(tmp_path / "root")
    assert 0 < (done := done_parts(tmp_path)) < total
    result = run(undisturbed.config(tmp_path))
    assert result["stages"]["encode"]["reused"] == done
    assert result["stages"]["encode"]["made"] == total - done
    check_same(tmp_path, undisturbed, result)


@pytest.mark.chaos
def test_two_drivers_at_once(undisturbed: Undisturbed, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    config = undisturbed.config(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run(config), range(2))
    assert first["version"]["version"] == second["version"]["version"]
    check_same(tmp_path, undisturbed, run(config))
