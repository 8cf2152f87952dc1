"""Receipts prove completion; a file that does not check is made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.errors import ArtifactError
from pipelines.manifest import ensure, find_done, fingerprint, put_done, read_manifest, write_manifest
from pipelines.storage import Store


def test_fingerprint_ignores_key_order_only() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_done_only_with_receipt_same_inputs_and_same_bytes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    put_done(store, "f", b"content", "inputs", {"num_rows": 3})
    found = find_done(store, "f", "inputs")
    assert found is not None
    assert found.reused
    assert found.as_entry()["num_rows"] == 3
    assert find_done(store, "f", "other inputs") is None
    (tmp_path / "f").write_bytes(b"contenT")  # same length, one bit off
    assert find_done(store, "f", "inputs") is None
    (tmp_path / "f").write_bytes(b"conte")
    assert find_done(store, "f", "inputs") is None
    (tmp_path / "f").unlink()
    assert find_done(store, "f", "inputs") is None


def test_a_file_without_receipt_or_with_a_broken_one_is_made_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.put("f", b"left by a killed writer")
    made = ensure(store, "f", "i", lambda: put_done(store, "f", b"new", "i", {}))
    assert (made.reused, store.read("f")) == (False, b"new")
    (tmp_path / "receipts" / "f.json").write_text("{")
    assert not ensure(store, "f", "i", lambda: put_done(store, "f", b"newer", "i", {})).reused
    assert ensure(store, "f", "i", lambda: pytest.fail("made twice")).reused


def test_the_first_manifest_stands(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert write_manifest(store, "snapshot", {"who": 1})["who"] == 1
    assert write_manifest(store, "snapshot", {"who": 2})["who"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no finished snapshot"),
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        (json.dumps({"kind": "version", "format_version": 1}), "of kind 'version'"),
        (json.dumps({"kind": "snapshot", "format_version": 99}), "newer than this program"),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(Store(str(tmp_path)), "snapshot")
