"""The file of API keys: hashes only, whole or not at all; the ring that follows it; the command that writes it."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.access_keys import KeyFile, KeyRing
from pipelines.errors import ArtifactError, ConfigError
from tests.s3 import s3_server
from tests.test_pipeline import pinakes, pinakes_json


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(str(tmp_path / "keys.json"))


def test_a_key_is_shown_once_and_kept_as_a_hash(file: KeyFile) -> None:
    key, record = file.create("reading room", ["search"], days=2)
    text = Path(file.path).read_text()
    assert key not in text
    assert key.split("_", 2)[2] not in text
    assert key.split("_")[1] == record.id
    assert file.read() == [record]
    assert KeyRing(file).find(key) == record
    assert datetime.fromisoformat(record.expires or "") - datetime.now(UTC) < timedelta(days=2)


def test_a_wrong_key_is_nobodys(file: KeyFile) -> None:
    key, record = file.create("one")
    other, _ = file.create("two")
    ring = KeyRing(file)
    swapped = f"pk_{record.id}_{other.split('_', 2)[2]}"
    wrong = [swapped, key[:-1], key + "A", key.upper(), "", "pk_", record.sha256, f"{key}\n", "é" * 55, "\udc80"]
    assert [ring.find(k) for k in wrong] == [None] * len(wrong)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_no_text_is_a_key(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    ring = KeyRing(KeyFile(str(tmp_path_factory.getbasetemp() / "absent.json")))
    assert ring.find(text) is None


@pytest.mark.parametrize(
    ("name", "scopes", "days"),
    [("x", ["root"], None), ("x", [], None), (" ", ["search"], None), ("x\n", ["search"], None), ("x", ["admin"], 0)],
)
def test_senseless_keys_are_not_made(file: KeyFile, name: str, scopes: list[str], days: float | None) -> None:
    with pytest.raises(ConfigError):
        file.create(name, scopes, days)
    assert file.read() == []


def test_keys_made_at_the_same_moment_are_all_kept(file: KeyFile) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = [record.id for _, record in pool.map(lambda i: file.create(f"key {i}"), range(12))]
    assert sorted(record.id for record in file.read()) == sorted(made)


def test_revoking_takes_one_key_away(file: KeyFile) -> None:
    (kept, _), (gone, record) = file.create("a"), file.create("b", ["admin", "search"])
    assert record.scopes == ("search", "admin")
    assert file.revoke(record.id) == record
    ring = KeyRing(file)
    assert (ring.find(gone), ring.find(kept) is not None) == (None, True)
    with pytest.raises(ConfigError, match="no key"):
        file.revoke(record.id)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"format_version": 99, "keys": []}',
        b'{"format_version": 1, "keys": [{"id": "x"}]}',
        b'{"format_version": 1, "keys": [{"id": "x", "name": "x", "scopes": [], "sha256": "x", "created": ""}]}',
    ],
)
def test_a_damaged_file_is_refused(file: KeyFile, content: bytes) -> None:
    Path(file.path).write_bytes(content)
    with pytest.raises(ArtifactError, match="API keys"):
        KeyRing(file)


def test_a_ring_follows_its_file_and_outlives_its_damage(file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    key, record = file.create("a")
    ring = KeyRing(file, refresh_seconds=0.0)
    assert ring.stale
    Path(file.path).write_bytes(b"{")
    logging.getLogger("pinakes.access").propagate = True
    ring.refresh()
    assert ring.find(key) == record
    assert "can't be read" in caplog.text
    Path(file.path).unlink()
    ring.refresh()
    assert ring.find(key) is None


def test_keys_may_lie_on_an_object_store() -> None:
    with s3_server() as (url, _):
        file = KeyFile(f"{url}/keys.json")
        key, record = file.create("a")
        file.create("b")
        assert KeyRing(file).find(key) == record
        assert len(file.read()) == 2


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    made = pinakes_json("keys", "create", "reading room", "--scope", "admin", "--days", "1", "--root", str(tmp_path))
    assert KeyRing(KeyFile(str(tmp_path / "keys.json"))).find(made["key"]) is not None
    listed = pinakes("keys", "list", "--root", str(tmp_path))
    assert made["id"] in listed
    assert made["key"] not in listed
    assert "revoked" in pinakes("keys", "revoke", made["id"], "--root", str(tmp_path))
    assert "no keys" in pinakes("keys", "list", "--root", str(tmp_path))
    assert "no key" in pinakes("keys", "revoke", made["id"], "--root", str(tmp_path), code=2)
    assert "no scopes" in pinakes("keys", "create", "x", "--scope", "root", "--root", str(tmp_path), code=2)
