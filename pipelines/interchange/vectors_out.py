"""Export the vectors of a version: one `.npy` with `ids.txt`, or Parquet parts; for any tool that reads those.

Each part is checked against its checksum as it is read; only one is in memory. The manifest is written last: a folder
without one is unfinished, and exporting again makes it whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import corpus, embeddings
from pipelines.errors import ArtifactError, ConfigError, InputError, StorageError
from pipelines.manifest import Receipt, drop_receipts, has_manifest, put_done, read_manifest, write_manifest
from pipelines.schema import embedding_schema
from pipelines.storage import Store, damaged, temporary_file

Array = npt.NDArray[Any]
Advance = Callable[[int], None]
Format = Literal["npy", "parquet"]

KIND = "vectors"
VECTORS, IDS = "vectors.npy", "ids.txt"
_DTYPES = {"fp16": "<f2", "fp32": "<f4"}


@dataclass(frozen=True)
class Export:
    """What is exported (the embeddings' manifest) from which root to which folder (a path or URL)."""

    root: str
    embeddings: dict[str, Any]
    to: str
    format: Format
    titles: bool = False

    @property
    def target(self) -> Store:
        return Store(self.to)

    @property
    def storage(self) -> str:
        return str(self.embeddings["encoder"]["storage"])

    def parts(self) -> Iterator[tuple[dict[str, Any], list[str], Array]]:
        """Yield (entry, ids, vectors (N, D)) of each embedding part, checked."""
        encoder, snapshot = self.embeddings["encoder"]["fingerprint"], self.embeddings["snapshot"]
        store = Store(self.root).child("embeddings", snapshot, encoder)
        for entry in self.embeddings["parts"]:
            yield entry, *_read_part(store, entry, int(self.embeddings["dim"]))


def embeddings_of(root: str, version: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of the embeddings that a version was built from. Raises ArtifactError when they are gone."""
    return read_manifest(Store(root).child("embeddings", version["snapshot"], version["embeddings"]), "embeddings")


def export_vectors(export: Export, advance: Advance) -> dict[str, Any]:
    """Write the vectors and then a manifest to the target; return the manifest.

    advance: told the number of vectors written, part by part. Raises ConfigError when the target holds an export
    already, InputError for an id that a line of text cannot hold, StorageError when the target is full.
    """
    if has_manifest(export.target):
        hint = "choose another folder, or remove this one first"
        raise ConfigError("the folder holds a finished export", where=export.target.path(), hint=hint)
    if export.titles and export.format == "npy":
        raise ConfigError("titles go into Parquet only", expected="--format parquet")
    write = _write_npy if export.format == "npy" else _write_parquet
    receipts = write(export, advance)
    content = {
        "snapshot": export.embeddings["snapshot"],
        "corpus": export.embeddings["corpus"],
        "encoder": export.embeddings["encoder"],
        "dim": export.embeddings["dim"],
        "num_rows": export.embeddings["num_rows"],
        "quarantined": export.embeddings.get("quarantined", []),
        "format": export.format,
        "parts": [receipt.as_entry() for receipt in receipts],
    }
    manifest = write_manifest(export.target, KIND, content)
    drop_receipts(export.target)
    return manifest


def _read_part(store: Store, entry: dict[str, Any], dim: int) -> tuple[list[str], Array]:
    data, where = store.read(entry["name"]), store.path(entry["name"])
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise damaged(where, found, entry["sha256"])
    vectors = embeddings.decode_vectors(data, where)
    ids = pq.read_table(pa.BufferReader(data), columns=["id"])["id"].to_pylist()
    if vectors.shape != (entry["num_rows"], dim):
        expected = f"({entry['num_rows']}, {dim})"
        raise ArtifactError(f"the part holds vectors of shape {vectors.shape}", where=where, expected=expected)
    return ids, vectors


def _write_npy(export: Export, advance: Advance) -> list[Receipt]:
    """Write (N, D) vectors as one array, a part at a time behind the header, and the ids as lines."""
    dtype, rows, dim = np.dtype(_DTYPES[export.storage]), export.embeddings["num_rows"], export.embeddings["dim"]
    header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, dim)}
    with temporary_file(_folder(export.target)) as array, temporary_file(_folder(export.target)) as lines:
        try:
            with open(array, "wb") as vectors_out, open(lines, "w", encoding="utf-8", newline="") as ids_out:
                np.lib.format.write_array_header_1_0(vectors_out, header)
                for _, ids, vectors_ND in export.parts():
                    vectors_out.write(np.ascontiguousarray(vectors_ND, dtype).tobytes())
                    ids_out.writelines(f"{_one_line(identity)}\n" for identity in ids)
                    advance(len(ids))
        except OSError as error:
            hint = "free some space or choose another folder, then run again"
            raise StorageError(f"cannot write the vectors: {error}", where=export.target.path(), hint=hint) from error
        facts = {"num_rows": rows}
        return [
            put_done(export.target, IDS, lines, KIND, facts),
            put_done(export.target, VECTORS, array, KIND, facts),
        ]


def _folder(target: Store) -> str | None:
    """Return (and make) the folder that temporary files go to: the target's own, so that a rename puts them there."""
    if not target.is_local:
        return None
    try:
        os.makedirs(target.path(), exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder: {error}", where=target.path()) from error
    return target.path()


def _one_line(identity: str) -> str:
    if not identity or "\n" in identity or "\r" in identity:
        raise InputError(f"the id {identity!r} is no line of text", expected="ids without line ends",
                         hint="export with --format parquet")  # fmt: skip
    return identity


def _write_parquet(export: Export, advance: Advance) -> list[Receipt]:
    """Write one Parquet file a part: id, title where asked for, vector."""
    titles = _titles(export) if export.titles else None
    receipts = []
    for entry, ids, vectors_ND in export.parts():
        schema = embedding_schema(vectors_ND.shape[1], export.storage)
        kind = schema.field("vector").type
        columns = [pa.array(ids, pa.string()), _vectors(vectors_ND, kind)]
        if titles is not None:
            schema = schema.insert(1, pa.field("title", pa.string(), nullable=False))
            columns.insert(1, next(titles))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=schema), sink, compression="none", write_page_checksum=True)
        facts = {"num_rows": len(ids)}
        receipts.append(put_done(export.target, entry["name"], bytes(sink.getvalue()), KIND, facts))
        advance(len(ids))
    return receipts


def _vectors(vectors_ND: Array, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1), type=kind.value_type), type=kind)


def _titles(export: Export) -> Iterator[pa.Array]:
    """Yield the titles of each part of the snapshot; its parts are those of the embeddings."""
    store = corpus.corpus_store(export.root, export.embeddings["corpus"]).child(export.embeddings["snapshot"])
    for entry in read_manifest(store, "snapshot")["parts"]:
        yield corpus.read_part(store, entry)["title"].combine_chunks()
