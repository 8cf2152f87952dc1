"""Do the embeddings still belong to the version? What `verify` looks at in their manifest and parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import embeddings
from pipelines.errors import ArtifactError
from pipelines.manifest import MANIFEST
from pipelines.storage import Store
from pipelines.verify import RE_ENCODE, Finding, compared

# The encoder's fields that its passages' vectors hang on: the query side and the path may differ where it is shared.
_OF_PASSAGES = (
    "fingerprint",
    "family",
    "digest",
    "dim",
    "similarity",
    "max_length",
    "compute",
    "storage",
    "formatting",
)


def vectors_of(root: str, manifest: dict[str, Any]) -> Store:
    """Return the folder of the embeddings that a version was made from."""
    return Store(root).child("embeddings", manifest["snapshot"], manifest["embeddings"])


def check_embeddings(
    root: str, manifest: dict[str, Any], embedded: dict[str, Any], snapshot: dict[str, Any] | None
) -> list[Finding]:
    """Compare the manifest of the embeddings with the version's encoder and rows, and with the snapshot's parts."""
    where = vectors_of(root, manifest).path(MANIFEST)
    facts = [(key, manifest[key], embedded.get(key)) for key in ("snapshot", "dim", "num_rows")]
    mine, theirs = manifest["encoder"], embedded.get("encoder") or {}
    facts += [(f"encoder's {key}", mine.get(key), theirs.get(key)) for key in _OF_PASSAGES]
    facts.append(("parts' rows", manifest["num_rows"], sum(part["num_rows"] for part in embedded["parts"])))
    if snapshot is not None:
        cut = [(part["first_row"], part["num_rows"]) for part in snapshot["parts"]]
        facts.append(("parts", cut, [(part["first_row"], part["num_rows"]) for part in embedded["parts"]]))
    wrong = [
        Finding("embeddings", "failed", f"the {what} of the embeddings is not the version's", where, str(expected),
                str(found), RE_ENCODE)
        for what, expected, found in facts if expected != found
    ]  # fmt: skip
    return wrong or [Finding("embeddings", "ok", "they are of the version's encoder and snapshot", where)]


def check_part(entry: dict[str, Any], root: str, manifest: dict[str, Any], deep: bool) -> list[Finding]:
    """Check one embedding part: there, as long as recorded, of its rows and width; `deep`: also its checksum."""
    store, check, dim = vectors_of(root, manifest), "embeddings", manifest["dim"]
    first = compared(check, store, entry, deep, RE_ENCODE)
    if first.state == "failed":
        return [first]
    where, wanted = first.where, f"{entry['num_rows']} rows of width {dim}"
    try:
        if deep and not np.isfinite(embeddings.read_vectors(store, entry, dim)).all():
            return [Finding(check, "failed", "a vector is not finite", where, "finite values", "", RE_ENCODE)]
        with store.open(entry["name"]) as handle:
            parquet = pq.ParquetFile(handle)
            field = parquet.schema_arrow.field("vector")
            found = f"{parquet.metadata.num_rows} rows of width {getattr(field.type, 'list_size', 'unknown')}"
    except ArtifactError as error:
        return [Finding.of(check, error)]
    except (pa.ArrowException, KeyError, OSError) as error:
        return [Finding(check, "failed", f"not an embedding part: {error}", where, wanted, "", RE_ENCODE)]
    if found != wanted:
        return [Finding(check, "failed", "the embedding part is another one", where, wanted, found, RE_ENCODE)]
    return [first]
