"""Fingerprints, receipts and manifests: how a run knows what is done.

A *fingerprint* names content. A *receipt* is the small JSON put beside a finished file: its size, its sha256 and the
fingerprint of what it was made from. A *manifest* folds the receipts of a whole folder into one file and is written
last: a folder with a manifest is complete, a folder without one is resumed from its receipts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.errors import ArtifactError
from pipelines.schema import FORMAT_VERSION
from pipelines.storage import Store

MANIFEST = "manifest.json"
_RECEIPTS = "receipts"


def fingerprint(content: Any) -> str:
    """Return 16 hex digits that name a JSON-able `content`; key order does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Receipt:
    """Proof that the file `name` is complete. `made_from` fingerprints its inputs, `facts` are its counts."""

    name: str
    num_bytes: int
    sha256: str
    made_from: str
    facts: dict[str, Any] = field(default_factory=dict)
    reused: bool = False

    def as_entry(self) -> dict[str, Any]:
        """Return the file's entry in a manifest."""
        return {"name": self.name, "num_bytes": self.num_bytes, "sha256": self.sha256, **self.facts}


def find_receipt(store: Store, name: str, made_from: str) -> Receipt | None:
    """Return the receipt of `name` if it is in place, made from the same inputs, and as large as it was; else None."""
    receipts = store.child(_RECEIPTS)
    if not receipts.exists(f"{name}.json") or not store.exists(name):
        return None
    try:
        receipt = Receipt(**json.loads(receipts.read(f"{name}.json")))
    except (ValueError, TypeError):
        return None  # a receipt that does not read is no receipt: the file is made again
    fits = receipt.made_from == made_from and store.size(name) == receipt.num_bytes
    return replace(receipt, reused=True) if fits else None


def find_done(store: Store, name: str, made_from: str) -> Receipt | None:
    """Return the receipt of `name` if it is in place, made from the same inputs, and its bytes check; else None."""
    receipt = find_receipt(store, name, made_from)
    return receipt if receipt and store.sha256(name) == receipt.sha256 else None


def put_done(store: Store, name: str, content: bytes | str, made_from: str, facts: dict[str, Any]) -> Receipt:
    """Put `content` (bytes, or the path of a local file) in place as `name`, then its receipt."""
    if isinstance(content, bytes):
        num_bytes, sha256 = len(content), hashlib.sha256(content).hexdigest()
        store.put(name, content)
    else:
        num_bytes = os.path.getsize(content)
        with open(content, "rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        store.put_file(name, content)
    receipt = Receipt(name, num_bytes, sha256, made_from, facts)
    put_receipt(store, receipt)
    return receipt


def put_receipt(store: Store, receipt: Receipt) -> None:
    """Put the receipt of a file that is in place beside it."""
    store.child(_RECEIPTS).put(f"{receipt.name}.json", _json(asdict(receipt)))


def ensure(store: Store, name: str, made_from: str, make: Callable[[], Receipt]) -> Receipt:
    """Return the receipt of `name`, making the file only if it is not already in place and whole."""
    return find_done(store, name, made_from) or make()


def drop_receipts(store: Store) -> None:
    """Remove the receipts of a folder whose manifest has been written."""
    store.child(_RECEIPTS).remove_all()


def write_manifest(store: Store, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a finished folder, unless another driver has just written it; return what stands."""
    manifest = {"format_version": FORMAT_VERSION, "kind": kind, **content}
    store.create(MANIFEST, _json(manifest))
    store.sweep_temporaries()
    return read_manifest(store, kind)


def has_manifest(store: Store) -> bool:
    return store.exists(MANIFEST)


def find_finished(store: Store, kind: str, *scratch: Store) -> dict[str, Any] | None:
    """Return the manifest of a folder that is finished, else None.

    Receipts and the `scratch` folders are swept from a finished one: of two drivers on the same work, the slower may
    still have been writing them when the faster cleaned up.
    """
    if not has_manifest(store):
        return None
    drop_receipts(store)
    for folder in scratch:
        folder.remove_all()
    return read_manifest(store, kind)


def read_manifest(store: Store, kind: str) -> dict[str, Any]:
    """Return the manifest of a finished folder. Raises ArtifactError when it is absent, damaged or of another kind."""
    where = store.path(MANIFEST)
    if not store.exists(MANIFEST):
        raise ArtifactError(
            f"no finished {kind} here",
            where=where,
            expected="a manifest.json, which is written last",
            hint=f"the {kind} was never made or was interrupted: run its step again",
        )
    try:
        manifest: dict[str, Any] = json.loads(store.read(MANIFEST))
    except ValueError as error:
        raise ArtifactError(f"the manifest is not JSON: {error}", where=where, hint="restore it or rebuild") from error
    if not isinstance(manifest, dict):
        raise ArtifactError("the manifest is no JSON object", where=where, hint="restore it or rebuild")
    if manifest.get("kind") != kind:
        raise ArtifactError(f"the manifest is of kind {manifest.get('kind')!r}", where=where, expected=kind)
    if manifest.get("format_version", 0) > FORMAT_VERSION:
        version = manifest["format_version"]
        hint = "use the version of Pinakes that wrote it, or a newer one"
        raise ArtifactError(f"format version {version} is newer than this program", where=where, hint=hint)
    return manifest


def package_versions() -> dict[str, str]:
    """Return the versions of the packages whose arithmetic or formats an artifact depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("pinakes", "ray", "torch", "transformers", "tokenizers", "faiss-cpu", "faiss-gpu", "pyarrow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
