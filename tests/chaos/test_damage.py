"""Damage done between and during runs: found, named, redone or refused, and never silently used."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.embeddings import to_parquet
from tests.chaos.conftest import Undisturbed
from tests.chaos.driver import PINAKES, run, start, wait_for_parts, wait_for_quiet, write_config
from tests.chaos.test_driver_killed import check_same

pytestmark = pytest.mark.chaos


def test_damaged_parts_of_an_interrupted_run_are_redone(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """One part cut short, one of another width, one with a flipped bit, one gone: exactly these are made again."""
    config = undisturbed.config(tmp_path)
    process = start(config)
    wait_for_parts(tmp_path / "root", 8, process)
    process.kill()
    process.communicate()
    wait_for_quiet(tmp_path / "root")
    folder = next((tmp_path / "root").glob("embeddings/*/*"))
    done = sorted(r.name.removesuffix(".json") for r in (folder / "receipts").glob("part-*"))
    cut, wide, flipped, gone = (folder / name for name in done[:4])
    cut.write_bytes(cut.read_bytes()[:-100])
    wide.write_bytes(to_parquet([str(i) for i in range(64)], np.ones((64, 3), np.float32), "fp16"))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    gone.unlink()
    result = run(config)
    assert result["stages"]["encode"]["reused"] == len(done) - 4
    check_same(tmp_path, undisturbed, result)


def test_a_damaged_part_of_finished_embeddings_is_refused_by_name(undisturbed: Undisturbed, tmp_path: Path) -> None:
    run(undisturbed.config(tmp_path))
    part = next((tmp_path / "root").glob("embeddings/*/*/part-00003.parquet"))
    data = bytearray(part.read_bytes())
    data[200] ^= 1
    part.write_bytes(data)
    config = write_config(
        tmp_path / "d.yaml", undisturbed.corpus, undisturbed.checkpoint, str(tmp_path / "root"), seed=9
    )
    result = run(config, check=False)
    assert result["code"] == 5
    assert "damaged" in result["stderr"]
    assert part.name in result["stderr"]


def test_ctrl_c_says_how_to_go_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    config = undisturbed.config(tmp_path)
    process = start(config)
    wait_for_parts(tmp_path / "root", 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "run the same command to go on" in err
    check_same(tmp_path, undisturbed, run(config))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that the job outgrows; needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_a_larger_one_lets_it_go_on(undisturbed: Undisturbed, small_disk: Path) -> None:
    config = write_config(
        small_disk.parent / "c.yaml", undisturbed.corpus, undisturbed.checkpoint, str(small_disk / "root")
    )
    result = run(config, check=False)
    assert result["code"] == 6, result["stderr"]
    assert "the disk is full" in result["stderr"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    check_same(small_disk, undisturbed, run(config))


def test_no_permission_is_named(undisturbed: Undisturbed, tmp_path: Path) -> None:
    read_only = tmp_path / "ro"
    read_only.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(read_only)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a read-only tmpfs: {mounted.stderr.strip()}")
    try:
        config = write_config(tmp_path / "c.yaml", undisturbed.corpus, undisturbed.checkpoint, str(read_only / "root"))
        result = run(config, check=False)
        assert result["code"] == 6, result["stderr"]
        assert "read-only" in result["stderr"]
    finally:
        subprocess.run(["umount", "-l", str(read_only)], check=True)


def test_a_moved_root_still_works(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Nothing in a root remembers where it was."""
    run(undisturbed.config(tmp_path))
    shutil.move(tmp_path / "root", tmp_path / "elsewhere")
    found = subprocess.run(
        [PINAKES, "search", "the cat", "--root", str(tmp_path / "elsewhere"), "-k", "3"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
