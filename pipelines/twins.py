"""Versions that share their files: those that differ only in how they are searched, or how well they must be.

Another recall target is another version, with the same trained index, shards and passages. Files in place are never
written to, so a version takes those of its twin by a link (a copy where there are no links).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.build import TRAINED, BuildPlan, passages_key, passages_names, shard_key
from pipelines.manifest import Receipt, find_receipt, has_manifest, put_receipt, read_manifest
from pipelines.storage import Store


def adopt(plan: BuildPlan) -> int:
    """Bring in what another version of the same build has in place already; return the number of files.

    The steps that would make a file compare its checksum, as with any file that they find.
    """
    versions, taken = Store(plan.root).child("indexes", plan.config.name), 0
    for other in versions.folders():
        if other == plan.version:
            continue
        for receipt in _files_of(plan, versions.child(other)):
            if not plan.store.exists(receipt.name):
                plan.store.take(receipt.name, versions.child(other))
                put_receipt(plan.store, receipt)
                taken += 1
    return taken


def _files_of(plan: BuildPlan, twin: Store) -> Iterator[Receipt]:
    """Yield the receipts of the twin's files that are what the plan would make; none where it is no twin."""
    published = read_manifest(twin, "version") if has_manifest(twin) else None
    if published is not None and published.get("build") != plan.build:
        return
    trained = _receipt(twin, published, TRAINED, plan.build)
    if trained is None:
        return
    yield trained
    for shard in plan.shards:
        wanted = {shard.name: shard_key(plan, trained, shard.name)}
        wanted |= dict.fromkeys(passages_names(shard), passages_key(plan, shard))
        found = (_receipt(twin, published, name, key) for name, key in wanted.items())
        yield from (receipt for receipt in found if receipt is not None)


def _receipt(twin: Store, published: dict[str, Any] | None, name: str, made_from: str) -> Receipt | None:
    if published is None:  # interrupted, or refused for its recall
        return find_receipt(twin, name, made_from)
    entry = dict(published["files"].get(name) or {})
    if not entry or not twin.exists(name):
        return None
    return Receipt(name, entry.pop("num_bytes"), entry.pop("sha256"), made_from, entry)
