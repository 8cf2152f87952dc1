"""Import vectors that another tool made as the embedding parts of a snapshot, bound to the encoder that made them.

    sources -> ids and vectors -> a scratch file in row order -> checked against the encoder -> embedding parts

The folder is what `encode` would have written, with the sources named under `imported` in its manifest. The scratch
file takes the disk space of the vectors once more; memory is one block and about 50 bytes a passage.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import corpus, embeddings
from pipelines.encode import EncoderSpec
from pipelines.errors import ArtifactError, ConfigError
from pipelines.interchange.matching import RowLookup, Scatter, read_part_ids
from pipelines.interchange.sample import check_sample
from pipelines.interchange.sources import IdSource, Source, read_blocks
from pipelines.manifest import (
    Receipt,
    drop_receipts,
    ensure,
    find_finished,
    fingerprint,
    has_manifest,
    package_versions,
    put_done,
    read_manifest,
    write_manifest,
)
from pipelines.storage import Store, cache_dir, temporary_file

Array = npt.NDArray[Any]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class ImportPlan:
    """What is imported: the sources and their ids, into which snapshot, as made by which encoder.

    trust: believe that the encoder made them, without encoding a sample again.
    """

    root: str
    snapshot: dict[str, Any]
    spec: EncoderSpec
    sources: tuple[Source, ...]
    ids: IdSource | None
    strip_prefix: str = ""
    trust: bool = False

    @property
    def store(self) -> Store:
        return Store(self.root).child("embeddings", self.snapshot["snapshot"], self.spec.fingerprint)

    @property
    def passages(self) -> Store:
        return corpus.corpus_store(self.root, self.snapshot["corpus"]).child(self.snapshot["snapshot"])

    @property
    def parts(self) -> list[dict[str, Any]]:
        return list(self.snapshot["parts"])

    @property
    def by_position(self) -> bool:
        return self.ids is not None and not self.ids.path

    @property
    def digest(self) -> str:
        """Name what is imported: a part of another import, or of `encode`, is never taken for one of this."""
        files = [source.sha256 for source in self.sources]
        ids = self.ids.sha256 if self.ids else None
        return fingerprint(["import", self.spec.fingerprint, files, ids, self.strip_prefix])


def find_snapshot(root: str, name: str, snapshot: str | None = None) -> dict[str, Any]:
    """Return the manifest of a corpus's snapshot: the one named, or the only one. Raises ConfigError otherwise."""
    store = corpus.corpus_store(root, name)
    found = [folder for folder in store.folders() if folder != "inputs" and has_manifest(store.child(folder))]
    chosen = [folder for folder in found if folder == snapshot or (snapshot is None and len(found) == 1)]
    if not chosen:
        what = f"corpus {name!r} has {len(found)} finished snapshots: which one is not clear"
        expected = f"--snapshot, one of: {', '.join(found)}" if found else "a snapshot, which `pinakes ingest` makes"
        raise ConfigError(what, where=store.path(), expected=expected, hint="`pinakes status` lists them")
    return read_manifest(store.child(chosen[0]), "snapshot")


def import_vectors(plan: ImportPlan, advance: Advance) -> dict[str, Any]:
    """Make the embedding parts of the plan's snapshot from its sources; return the embeddings' manifest.

    advance: told the number of vectors read, block by block. Importing the same files again changes nothing. Raises
    InputError when they do not fit the snapshot or the encoder, ArtifactError when other embeddings are there already.
    """
    if finished := find_finished(plan.store, "embeddings"):
        if finished.get("imported", {}).get("digest") != plan.digest:
            hint = "use them, or remove the folder first"
            what = "the snapshot has embeddings of this encoder already"
            raise ArtifactError(what, where=plan.store.path(), expected="none, or these very vectors", hint=hint)
        return finished
    started = time.monotonic()
    folder = plan.store.path() if plan.store.is_local else cache_dir("import")
    with _scratch(folder) as path:
        scatter = Scatter(path, plan.snapshot["num_rows"], plan.spec.dim, plan.spec.storage,
                          plan.spec.similarity == "cosine")  # fmt: skip
        lookup = None if plan.by_position else RowLookup(plan.passages, plan.parts)
        for where, (ids, vectors_ND) in read_blocks(plan.sources, plan.ids, plan.strip_prefix):
            scatter.add(ids, vectors_ND, lookup, where)
            advance(len(vectors_ND))
        scatter.check((part["first_row"], read_part_ids(plan.passages, part)) for part in plan.parts)
        checked = None if plan.trust else _check(plan, scatter.vectors_ND)
        receipts = [_put_part(plan, part, scatter.vectors_ND) for part in plan.parts]
    return _finish(plan, receipts, checked, time.monotonic() - started)


def _check(plan: ImportPlan, vectors_ND: Array) -> dict[str, Any]:
    return check_sample(plan.snapshot, plan.passages, plan.spec, lambda rows: np.asarray(vectors_ND[rows], np.float32))


@contextlib.contextmanager
def _scratch(folder: str) -> Iterator[str]:
    os.makedirs(folder, exist_ok=True)
    with temporary_file(folder) as path:
        yield path


def _put_part(plan: ImportPlan, part: dict[str, Any], vectors_ND: Array) -> Receipt:
    made_from, rows = fingerprint([plan.digest, part["name"], part["num_rows"]]), part["num_rows"]

    def make() -> Receipt:
        ids = read_part_ids(plan.passages, part)
        block = np.asarray(vectors_ND[part["first_row"] : part["first_row"] + rows])
        data = embeddings.to_parquet(ids, block, plan.spec.storage)
        facts = {"num_rows": rows, "num_tokens": 0, "encode_seconds": 0.0}
        return put_done(plan.store, part["name"], data, made_from, facts)

    return ensure(plan.store, part["name"], made_from, make)


def _finish(plan: ImportPlan, receipts: Sequence[Receipt], checked: Any, seconds: float) -> dict[str, Any]:
    entries = [{**r.as_entry(), "first_row": part["first_row"]} for r, part in zip(receipts, plan.parts, strict=True)]
    content = {
        "snapshot": plan.snapshot["snapshot"],
        "corpus": plan.snapshot["corpus"],
        "encoder": plan.spec.as_dict(),
        "dim": plan.spec.dim,
        "num_rows": plan.snapshot["num_rows"],
        "num_quarantined": 0,
        "quarantined": [],
        "parts": entries,
        "seconds": round(seconds, 3),
        "packages": package_versions(),
        "imported": {
            "digest": plan.digest,
            "sources": [source.as_entry() for source in plan.sources],
            "ids_sha256": plan.ids.sha256 if plan.ids and plan.ids.path else None,
            "by_position": plan.by_position,
            "checked": checked,
        },
    }
    manifest = write_manifest(plan.store, "embeddings", content)
    drop_receipts(plan.store)
    return manifest
