"""Put vectors that come in any order, under ids, into the rows of a snapshot; account for all that do not fit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import ArtifactError, InputError, StorageError
from pipelines.storage import Store

Array = npt.NDArray[Any]

_EXAMPLES = 5
_DPR_PREFIX = "wiki:"
_STORED = {"fp16": np.float16, "fp32": np.float32}


def read_part_ids(passages: Store, entry: dict[str, Any]) -> list[str]:
    """Return the ids of the snapshot's part that manifest `entry` names. Raises ArtifactError when it is damaged."""
    try:
        with passages.open(entry["name"]) as handle:
            ids = pq.read_table(handle, columns=["id"], page_checksum_verification=True)["id"].to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        where, hint = passages.path(entry["name"]), "run `pinakes ingest` again"
        raise ArtifactError(f"the part cannot be read: {error}", where=where, hint=hint) from error
    if len(ids) != entry["num_rows"]:
        raise ArtifactError(f"the part holds {len(ids)} passages", where=passages.path(entry["name"]),
                            expected=str(entry["num_rows"]), hint="run `pinakes ingest` again")  # fmt: skip
    return list(ids)


class RowLookup:
    """The rows of a snapshot by id: 24 bytes of memory a passage, twice that while it is built, whatever the ids."""

    def __init__(self, passages: Store, parts: Sequence[dict[str, Any]]) -> None:
        digests = np.concatenate([_digests(read_part_ids(passages, part)) for part in parts])
        self.row_N = np.lexsort((digests[:, 1], digests[:, 0]))
        self.digest_N2 = digests[self.row_N]

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return (N,) int64: the row of each id, -1 where the snapshot has no such passage."""
        wanted, known = _digests(ids), self.digest_N2
        at = np.searchsorted(known[:, 0], wanted[:, 0])
        row_N, open_ = np.full(len(wanted), -1, np.int64), at < len(known)
        while open_.any():  # once, unless two passages share the first half of their digests
            place = np.where(open_, at, 0)
            open_ &= known[place, 0] == wanted[:, 0]
            found = open_ & (known[place, 1] == wanted[:, 1])
            row_N[found] = self.row_N[place[found]]
            at += 1
            open_ &= ~found & (at < len(known))
        return row_N


def _digests(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Return (N, 2) uint64: 16 bytes of BLAKE2b of each id, which no two ids of any corpus share by chance."""
    # An id from elsewhere may hold what is no text; it is then one that no passage has.
    joined = b"".join(hashlib.blake2b(i.encode(errors="surrogatepass"), digest_size=16).digest() for i in ids)
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


@dataclass
class Count:
    """How many vectors were wrong in one way, with the first few."""

    total: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, names: Sequence[Any] | Array) -> None:
        self.total += len(names)
        self.examples += [str(name) for name in names[: _EXAMPLES - len(self.examples)]]

    def __str__(self) -> str:
        more = " …" if self.total > len(self.examples) else ""
        return f"{self.total:,} ({', '.join(map(repr, self.examples))}{more})"


class Scatter:
    """A file of num_rows vectors (width dim, in the storage type) that are put into it by row."""

    def __init__(self, path: str, num_rows: int, dim: int, storage: str, unit_length: bool) -> None:
        self.dim, self.storage, self.unit_length = dim, storage, unit_length
        stored = np.dtype(_STORED[storage])
        _reserve(path, num_rows * dim * stored.itemsize)
        self.vectors_ND: Array = np.memmap(path, stored, "r+", shape=(num_rows, dim))
        self.seen_N = np.zeros(num_rows, bool)
        self.unknown, self.doubled, self.not_finite = Count(), Count(), Count()
        self.position = 0

    def add(self, ids: Sequence[str] | None, vectors_ND: Array, lookup: RowLookup | None, where: str) -> None:
        """Put a block of vectors in their rows; without ids, in the next ones. Raises InputError for another width."""
        if vectors_ND.shape[1] != self.dim:
            raise InputError(f"the vectors have width {vectors_ND.shape[1]}", where=where, expected=f"{self.dim}, the "
                             "encoder's", hint="import them with the encoder that made them")  # fmt: skip
        names: Array = np.array(range(self.position, self.position + len(vectors_ND)) if ids is None else ids, object)
        rows = self._next_rows(len(vectors_ND)) if ids is None or lookup is None else lookup.rows(ids)
        known = rows >= 0
        self.unknown.add(names[~known])
        with np.errstate(over="ignore", invalid="ignore"):
            stored = self._unit(vectors_ND[known]).astype(self.vectors_ND.dtype)
        rows, names = rows[known], names[known]
        self.not_finite.add(names[~np.isfinite(stored).all(axis=1)])
        first = np.zeros(len(rows), bool)
        first[np.unique(rows, return_index=True)[1]] = True
        fresh = first & ~self.seen_N[rows]
        self.doubled.add(names[~fresh])
        self.vectors_ND[rows[fresh]] = stored[fresh]
        self.seen_N[rows] = True

    def _next_rows(self, count: int) -> npt.NDArray[np.int64]:
        rows = np.arange(self.position, self.position + count, dtype=np.int64)
        self.position += count
        return np.where(rows < len(self.seen_N), rows, -1)

    def _unit(self, vectors_ND: Array) -> Array:
        """Return the vectors at length 1 where the encoder's are; a zero vector stays one."""
        if not self.unit_length:
            return vectors_ND
        wide = vectors_ND.astype(np.float32)
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        return wide / np.where(length > 0, length, 1)

    def check(self, missing: Iterator[tuple[int, list[str]]]) -> None:
        """Raise InputError, with counts and examples, unless every row has exactly one vector, which is finite.

        missing: (first row, ids) of every part of the snapshot.
        """
        absent = Count()
        for start, ids in missing:
            absent.add([ids[i] for i in np.flatnonzero(~self.seen_N[start : start + len(ids)])])
        counts = {
            "passages without a vector": absent,
            "vectors of unknown passages": self.unknown,
            "passages with more than one vector": self.doubled,
            f"vectors that are not finite in {self.storage}": self.not_finite,
        }
        refuse_misfits(counts, self.unknown, self.not_finite)


def refuse_misfits(counts: Mapping[str, Count], unknown: Count, not_finite: Count | None = None) -> None:
    """Raise InputError, with counts and examples, unless every count is zero."""
    wrong = [f"{count} {what}" for what, count in counts.items() if count.total]
    if not wrong:
        return
    hint = "are they of another snapshot, or is a file left out, or given twice?"
    if any(name.startswith(_DPR_PREFIX) for name in unknown.examples):
        hint = f"DPR puts {_DPR_PREFIX!r} before ids: try --strip-prefix {_DPR_PREFIX}"
    if not_finite and not_finite.total:
        hint = "fp16 ends at 65,504: import with storage fp32 if they are finite there"
    raise InputError("the vectors do not fit the snapshot\n" + "\n".join(f"  - {w}" for w in wrong),
                     expected="one finite vector for each passage", hint=hint)  # fmt: skip


def _reserve(path: str, num_bytes: int) -> None:
    """Make a file of this size whose blocks are on the disk: a full one is told here, not by a signal at a write."""
    try:
        with open(path, "xb") as handle:
            os.posix_fallocate(handle.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        what = f"cannot reserve {num_bytes / 1e9:.1f} GB for the vectors: {error}"
        raise StorageError(what, where=path, hint="free some space, then run again") from error
