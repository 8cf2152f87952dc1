"""Rows that cannot be encoded: found by halving, put into quarantine, and never in the way of all the others.

    an attempt is noted -> encode the whole part -> it fails: halve it, and again, down to the guilty row -> zeros there

A failure is an exception, a vector that is not finite, or, where the encoder runs in a process of its own
(`guard_process`), the death of that process. A part whose attempts ended twice without a word, because their worker
died, is *suspect*, and encoded there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import ArtifactError, InputError, PinakesError
from pipelines.storage import Store

Array = npt.NDArray[Any]

RangeEncoder = Callable[[int, int], Array]
"""(start, stop), rows of a part, to emb_ND (stop - start, D) float32."""

QUARANTINE = "quarantine.parquet"
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # of the snapshot
        pa.field("part", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)

_ATTEMPTS = "attempts"
_SUSPECT_AFTER = 2  # a worker also dies for reasons of its own, so one death says little about a part
_TRIES = 2  # of a row alone, for the same reason
_REASON_CHARACTERS = 300
_HINTS = {
    "fp16": " (which ends at 65,504: storage fp32 may hold it, or compute bf16)",
    "fp32": " (in fp16 a model overflows at 65,504: compute bf16 may do)",
}
_ALIKE = 4  # this many first rows of a part that fail alike say that something else is broken


class WorkerDiedError(Exception):
    """The process that was encoding is gone; the message says how it ended."""


class DeviceLostError(Exception):
    """The device cannot be used any more by this process: nothing is to be learnt from trying other rows in it."""


class RaisedThereError(Exception):
    """What the encoder raised in another process; the message begins with the name of its class."""


class UnusableError(Exception):
    """No encoder runs here, so no row is to blame; `error` says what to do."""

    def __init__(self, error: PinakesError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Guilty:
    """A row that cannot be encoded, counted in its part, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class _Failure:
    """Why rows were not encoded. Two failures of the same `kind` are alike."""

    kind: str
    reason: str


@contextmanager
def attempt(store: Store, name: str) -> Iterator[bool]:
    """Note in the embeddings' `store` that the part `name` is being encoded; give whether it is suspect.

    The note goes when the block ends, also by an exception: what stays behind is the note of a worker that died, or
    that is as good as dead (DeviceLostError).
    """
    notes, note = attempts(store), f"{name.removesuffix('.parquet')}.json"
    try:
        unfinished = int(json.loads(notes.read(note))["attempts"])
    except (ArtifactError, ValueError, KeyError, TypeError):
        unfinished = 0  # there is none, or none that reads
    notes.put(note, json.dumps({"attempts": unfinished + 1}).encode())
    ended = True
    try:
        yield unfinished >= _SUSPECT_AFTER
    except DeviceLostError:
        ended = False
        raise
    finally:
        if ended:
            notes.remove(note)


def attempts(store: Store) -> Store:
    """Return the folder of notes, which goes when the embeddings are finished."""
    return store.child(_ATTEMPTS)


def trace(encode: RangeEncoder, num_rows: int, dim: int, storage: str, allowed: int) -> tuple[Array, list[Guilty]]:
    """Return emb_ND (N, D) float32 of a part's N rows, and its guilty rows, ascending; their vectors are zeros.

    encode: runs once when all is well, and about 2 log2(N) times more for each guilty row. storage: "fp16" or "fp32",
    in which a vector has to be finite. allowed: the most guilty rows. Raises InputError when there are more,
    PinakesError when the first rows all fail alike, and as themselves the errors that no row can cause.
    """
    emb_ND, guilty, kinds = np.zeros((num_rows, dim), np.float32), list[Guilty](), list[str]()
    waiting = [(0, num_rows)]  # a stack, the leftmost range on top: rows are judged in their order
    while waiting:
        start, stop = waiting.pop()
        found = _alone(encode, start, storage) if stop - start == 1 else _try(encode, start, stop)
        if isinstance(found, _Failure) and stop - start == 1:
            guilty.append(Guilty(start, found.reason))
            kinds.append(found.kind)
            _check_guilty(guilty, kinds, num_rows, allowed)
        elif isinstance(found, _Failure):
            middle = (start + stop) // 2
            waiting += [(middle, stop), (start, middle)]
        elif len(bad := _not_finite(found, storage)):
            emb_ND[start:stop] = found
            emb_ND[start + bad] = 0
            # Each again by itself: in a batch, one such row may have spoilt the others.
            waiting += [(row, row + 1) for row in reversed((start + bad).tolist())]
        elif len(found) == num_rows:
            return found, guilty  # the usual case, without a copy
        else:
            emb_ND[start:stop] = found
    return emb_ND, guilty


def _alone(encode: RangeEncoder, row: int, storage: str) -> Array | _Failure:
    """Return the vector (1, D) of one row, which may try more than once, or its last failure."""
    found: Array | _Failure
    for _ in range(_TRIES):
        found = _try(encode, row, row + 1)
        if not isinstance(found, _Failure):
            if not len(_not_finite(found, storage)):
                break
            found = _Failure("not finite", f"its vector is not finite in {storage}{_HINTS[storage]}")
    return found


def _try(encode: RangeEncoder, start: int, stop: int) -> Array | _Failure:
    """Return the vectors of rows `start:stop`, or why there are none. Raises what has nothing to do with rows."""
    try:
        return encode(start, stop)
    except WorkerDiedError as error:
        return _Failure(str(error), f"the encoder {error}, {_TRIES} times on this row alone")
    except UnusableError as unusable:
        raise unusable.error from unusable
    except DeviceLostError:
        raise
    except Exception as error:
        # Two of ours speak of rows: a text that does not fit the memory, an image that cannot be decoded.
        if isinstance(error, PinakesError) and type(error) not in (PinakesError, InputError):
            raise
        reason = _reason(error)
        return _Failure("ours" if isinstance(error, PinakesError) else reason.partition(":")[0], reason)


def _reason(error: Exception) -> str:
    """Return an error on one line: ours as it says itself, others behind the name of their class."""
    if isinstance(error, PinakesError):
        told = error.what
    else:
        told = str(error) if isinstance(error, RaisedThereError) else f"{type(error).__name__}: {error}"
    return " ".join(told.split())[:_REASON_CHARACTERS]


def _not_finite(emb_ND: Array, storage: str) -> Array:
    """Return the ascending indexes of the vectors that are not finite once rounded to `storage`."""
    dtype = np.float16 if storage == "fp16" else np.float32
    limit = float(np.finfo(dtype).max)
    # Comparisons with NaN are false. This looks at the whole array without a copy, which is all that is ever needed.
    if emb_ND.size == 0 or (emb_ND.max() <= limit and emb_ND.min() >= -limit):
        return np.empty(0, np.int64)
    with np.errstate(over="ignore"):
        return np.flatnonzero(~np.isfinite(emb_ND.astype(dtype)).all(axis=1))


def _check_guilty(guilty: Sequence[Guilty], kinds: Sequence[str], num_rows: int, allowed: int) -> None:
    """Raise when it is not the rows: their first few all fail alike, or more than are `allowed`."""
    first = len(guilty) == _ALIKE < num_rows and guilty[-1].row == _ALIKE - 1
    if first and len(set(kinds)) == 1:
        raise PinakesError(
            f"the first {_ALIKE} passages of a part all fail alike, the last with: {guilty[-1].reason}",
            expected="an encoder that works on this machine",
            hint="look at the worker's log, its memory and its device; nothing was put into quarantine",
        )
    if len(guilty) > allowed:
        raise _too_many(len(guilty), [g.reason for g in guilty], f"at most {allowed}")


def collect(parts: Sequence[Mapping[str, Any]], found: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return every guilty row of a snapshot as {"id", "row", "part", "reason"}, `row` counted in the snapshot.

    parts: the snapshot's entries. found: of each part, its guilty rows as {"id", "row", "reason"}, counted in the part.
    """
    return [
        {"id": g["id"], "row": part["first_row"] + g["row"], "part": part["name"], "reason": g["reason"]}
        for part, rows in zip(parts, found, strict=True)
        for g in rows
    ]


def num_allowed(num_rows: int, max_quarantined_share: float) -> int:
    """Return how many of a snapshot's rows may be guilty."""
    return int(num_rows * max_quarantined_share)


def write_quarantine(store: Store, quarantined: Sequence[Mapping[str, Any]], allowed: int) -> None:
    """Write quarantine.parquet (id, row, part, reason) beside the embedding parts, or none when no row is guilty.

    Raises InputError, once it is written, when there are more rows than `allowed`.
    """
    if not quarantined:
        store.remove(QUARANTINE)  # of an earlier run, whose parts were damaged since and made again
        return
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([dict(row) for row in quarantined], schema=_SCHEMA)
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    store.put(QUARANTINE, bytes(sink.getvalue()))
    if len(quarantined) > allowed:
        raise _too_many(
            len(quarantined), [row["reason"] for row in quarantined], f"at most {allowed}", store.path(QUARANTINE)
        )


def _too_many(count: int, reasons: Sequence[str], expected: str, where: str = "") -> InputError:
    told = ", ".join(f"{number} x {reason}" for reason, number in Counter(reasons).most_common(3))
    return InputError(
        f"{count} passages cannot be encoded: {told}",
        where=where,
        expected=f"{expected} (corpus.max_quarantined_share of the snapshot)",
        hint="look at the worker's log; if it is the passages, raise the share and run the command again",
    )
