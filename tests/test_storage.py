"""A store behaves the same on a disk and on S3: whole writes, conditional writes, clear refusals."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.errors import ArtifactError, ConfigError, StorageError
from pipelines.storage import Store
from tests.s3 import Faults, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[str, Faults]]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "root"))
    url, _ = request.getfixturevalue("s3")
    return Store(f"{url}/{tmp_path.name}")


def test_round_trip_list_and_remove(store: Store) -> None:
    assert store.files() == []
    assert store.folders() == []
    store.put("b.txt", b"two")
    store.put("a.txt", b"one")
    store.child("deep", "er").put("c.txt", b"three")
    assert store.files() == ["a.txt", "b.txt"]
    assert store.files("b") == ["b.txt"]
    assert store.folders() == ["deep"]
    assert (store.read("a.txt"), store.size("b.txt"), store.exists("c.txt")) == (b"one", 3, False)
    assert store.sha256("a.txt") == hashlib.sha256(b"one").hexdigest()
    store.put("a.txt", b"replaced")
    assert store.read("a.txt") == b"replaced"
    store.remove("a.txt")
    store.remove("a.txt")
    assert store.files() == ["b.txt"]
    store.remove_all()
    store.remove_all()
    assert store.files() == []


def test_a_store_takes_a_file_of_another(store: Store) -> None:
    store.put("a", b"same")
    other = store.child("other")
    other.take("a", store)
    store.put("a", b"new")  # a file in place is replaced, never written to, so a link to it stays what it was
    assert (other.read("a"), store.read("a")) == (b"same", b"new")
    with pytest.raises(ArtifactError, match="not there"):
        other.take("b", store)


def test_put_file_and_local_copy(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINAKES_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100_000)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    store.put_file("big", str(source))
    path = store.local("big", digest)
    assert Path(path).read_bytes() == b"x" * 100_000
    assert store.local("big", digest) == path
    with pytest.raises(ArtifactError, match="damaged"):
        store.local("big", "0" * 64)


def test_a_damaged_cached_copy_is_fetched_again(
    s3: tuple[str, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PINAKES_CACHE", str(tmp_path / "cache"))
    store = Store(f"{s3[0]}/{tmp_path.name}")
    store.put("file", b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    Path(store.local("file", digest)).write_bytes(b"contenT")
    assert Path(store.local("file", digest)).read_bytes() == b"content"


def test_create_is_exclusive(store: Store) -> None:
    assert store.create("once", b"first")
    assert not store.create("once", b"second")
    assert store.read("once") == b"first"


def test_swap_refuses_when_somebody_was_faster(store: Store) -> None:
    store.swap("alias", b"1", None)
    with pytest.raises(StorageError, match="somebody else"):
        store.swap("alias", b"2", None)
    store.swap("alias", b"2", b"1")
    with pytest.raises(StorageError, match="somebody else"):
        store.swap("alias", b"3", b"1")
    assert store.read("alias") == b"2"


def test_of_many_concurrent_swaps_one_wins(store: Store) -> None:
    store.put("alias", b"start")
    won: list[int] = []

    def contend(number: int) -> None:
        try:
            Store(store.url).swap("alias", str(number).encode(), b"start")
            won.append(number)
        except StorageError:
            return

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("alias") == str(won[0]).encode()


def test_missing_file_says_what_and_where(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read nothing\.txt: it is not there") as caught:
        store.read("nothing.txt")
    assert store.path("nothing.txt") in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).what == caught.value.what


def test_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot open the store"):
        Store("carrierpigeon://roof")


def test_transient_s3_errors_are_ridden_out(s3: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = s3
    store = Store(f"{url}/{tmp_path.name}")
    faults.every, before = 3, faults.hits
    try:
        for i in range(12):
            store.put(f"{i:02d}", str(i).encode())
        assert [store.read(name) for name in store.files()] == [str(i).encode() for i in range(12)]
    finally:
        faults.every = 0
    assert faults.hits > before


def test_lasting_s3_errors_become_a_storage_error(s3: tuple[str, Faults], tmp_path: Path) -> None:
    url, faults = s3
    faults.every, faults.status = 1, "403 Access Denied"
    try:
        with pytest.raises(StorageError, match="cannot write a"):
            Store(f"{url}/{tmp_path.name}").put("a", b"1")
    finally:
        faults.every, faults.status = 0, "503 Slow Down"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A 1 MiB tmpfs; needs root."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tiny_disk: Path) -> None:
    store = Store(str(tiny_disk))
    store.put("fits", b"x" * 1000)
    with pytest.raises(StorageError, match="the disk is full"):
        store.put("too-big", b"x" * 2_000_000)
    assert os.listdir(tiny_disk) == ["fits"]
    assert store.read("fits") == b"x" * 1000
