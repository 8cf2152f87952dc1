"""SIGKILL the driver inside train, add, merge, tune and publish: the same files, and no finished task is done again.

PINAKES_INDEX_KILLS=20 sets how many kills the chaos suite makes (five a chain: one in each of these stages).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.manifest import find_done
from pipelines.storage import Store
from tests.chaos.conftest import Undisturbed
from tests.chaos.driver import content_of, run, run_and_kill, wait_for_quiet, write_config

STAGES = ("train", "add", "merge", "tune", "publish")
NUM_KILLS = int(os.environ.get("PINAKES_INDEX_KILLS", "20"))
# Shares of 150 rows in k-means, groups of 150 in shards of 500, a tuned search: many small tasks in every stage.
INDEX: dict[str, Any] = {"train": "distributed", "search_params": {}, "min_recall": 0.5, "recall_queries": 60}


class Watch(threading.Thread):
    """Looks at a folder many times a second: which files were ever put in place under each name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.seen, self.stopped = folder, {}, threading.Event()  # type: ignore[var-annotated]

    def run(self) -> None:
        while not self.stopped.wait(0.004):
            for name, inode in inodes(self.folder).items():
                self.seen.setdefault(name, set()).add(inode)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()


def inodes(folder: Path) -> dict[str, int]:
    """Return {path: inode} of the files below a folder that changes meanwhile; a file put in place anew has another."""
    found = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            if not name.startswith(".tmp-") and not directory.endswith("receipts"):
                try:
                    path = os.path.join(directory, name)
                    found[path] = os.stat(path).st_ino
                except FileNotFoundError:
                    continue
    return found


def finished(folder: Path) -> dict[str, int]:
    """Return {path: inode} of the files of an unpublished version that are in place and whole."""
    found = {}
    for receipt in folder.rglob("receipts/*.json"):
        store = Store(str(receipt.parents[1]))
        name, made_from = receipt.name.removesuffix(".json"), json.loads(receipt.read_text())["made_from"]
        if find_done(store, name, made_from):
            found[store.path(name)] = os.stat(store.path(name)).st_ino
    return found


@pytest.fixture(scope="module")
def encoded(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A root whose corpus is encoded and nothing more, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("encoded")
    root = folder / "root"
    shutil.copytree(Path(undisturbed.corpus).parent / "root", root)
    for made in ("indexes", "aliases"):
        shutil.rmtree(root / made, ignore_errors=True)
    whole = tmp_path_factory.mktemp("whole")
    result = run(prepare(root, undisturbed, whole))
    return root, {"content": content_of(whole / "root"), "version": settled(result)}


def prepare(root: Path, undisturbed: Undisturbed, folder: Path) -> str:
    shutil.copytree(root, folder / "root", copy_function=os.link)
    return write_config(folder / "c.yaml", undisturbed.corpus, undisturbed.checkpoint, str(folder / "root"), **INDEX)


def settled(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a run decided of its version, without what it measured in seconds."""
    version = result["version"]
    curve = [(tried["params"], tried["recall"]) for tried in version["recall"]["curve"]]
    return {"version": version["version"], "params": version["search_params"], "curve": curve,
            "recall": version["recall"]["value"]}  # fmt: skip


def kill_in(
    stages: tuple[str, ...], encoded: tuple[Path, dict[str, Any]], undisturbed: Undisturbed, folder: Path, seed: int
) -> list[str]:
    """Kill runs of one index, each in a later stage, then let one end; return what happened to each."""
    root, expected = encoded
    config, rng = prepare(root, undisturbed, folder), random.Random(seed)
    indexes, told = folder / "root" / "indexes", []
    for stage in (*stages, ""):
        wait_for_quiet(indexes, 0.3)
        before = finished(indexes)
        with Watch(indexes) as watch:
            if stage:
                told.append(run_and_kill(config, stage, rng) + f", {len(before)} files were done")
            else:
                result = run(config)
        again = {path for path, inode in before.items() if watch.seen.get(path, set()) - {inode}}
        assert not again, (again, told)
    assert content_of(folder / "root") == expected["content"], told
    assert settled(result) == expected["version"], told
    assert not [*indexes.rglob("work"), *indexes.rglob("receipts")], told
    return told


def test_a_few_kills_inside_the_index(
    encoded: tuple[Path, dict[str, Any]], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    told = kill_in(("train", "add", "tune"), encoded, undisturbed, tmp_path, seed=1)
    assert any("killed" in line for line in told), told


@pytest.mark.chaos
@pytest.mark.parametrize("chain", range(-(-NUM_KILLS // len(STAGES))))
def test_kills_in_every_stage_of_the_index(
    encoded: tuple[Path, dict[str, Any]], undisturbed: Undisturbed, tmp_path: Path, chain: int
) -> None:
    told = kill_in(STAGES, encoded, undisturbed, tmp_path, seed=100 + chain)
    print("\n".join(told))
    assert sum("killed" in line for line in told) >= 3, told
