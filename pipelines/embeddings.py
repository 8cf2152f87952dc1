"""The embedding part: the vectors of one part by one encoder, as plain Parquet.

`id` and `vector` (fixed_size_list<halffloat|float>[D]), uncompressed (vectors do not compress), with page checksums.
Any Parquet reader opens it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import ArtifactError, InputError
from pipelines.schema import embedding_schema
from pipelines.storage import Store, damaged

Array = npt.NDArray[Any]
MOST_READERS = 8
"""Threads that read parts for a sample at most: each holds one, whose size is the corpus's own."""
_NUMPY = {"fp16": np.float16, "fp32": np.float32}


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def to_parquet(ids: Sequence[str] | pa.Array, emb_ND: Array, storage: str) -> bytes:
    """Return the bytes of an embedding part: the same input gives the same bytes.

    emb_ND: (N, D) float. storage: "fp16" or "fp32". Raises InputError for a vector that is not finite, also after
    rounding to the storage type.
    """
    stored = emb_ND.astype(_NUMPY[storage])
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    if len(bad):
        raise InputError(
            f"{len(bad)} vectors are not finite in {storage}, the first for passage {str(ids[int(bad[0])])!r}",
            hint="fp16 ends at 65,504: use storage fp32, compute fp32 or bf16; else the checkpoint is broken",
        )
    schema = embedding_schema(stored.shape[1], storage)
    flat = pa.array(stored.reshape(-1), type=schema.field("vector").type.value_type)
    vectors = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("vector").type)
    table = pa.table([pa.array(ids, pa.string()), vectors], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
        row_group_size=max(1, len(ids)),
    )
    return bytes(sink.getvalue())


def read_vectors(store: Store, entry: dict[str, Any], dim: int) -> Array:
    """Return the vectors (N, D) of the part that manifest `entry` names, in their storage type.

    Raises ArtifactError when the part is absent, damaged, or has another width or row count than recorded.
    """
    import hashlib

    name, where = entry["name"], store.path(entry["name"])
    data = store.read(name)
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        raise damaged(where, found, entry["sha256"])
    vectors = decode_vectors(data, where)
    if vectors.shape != (entry["num_rows"], dim):
        raise ArtifactError(
            f"the embedding part holds vectors of shape {vectors.shape}",
            where=where,
            expected=f"({entry['num_rows']}, {dim})",
            hint="another encoder wrote it: delete it and the folder's manifest.json, then run `pinakes encode` again",
        )
    return vectors


def decode_vectors(data: bytes, where: str) -> Array:
    """Return the (N, D) vectors of an embedding part's bytes. Raises ArtifactError when they are no such part."""
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["vector"], page_checksum_verification=True)
        column = table.column("vector").combine_chunks()
        chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        width = chunk.type.list_size
        return np.asarray(chunk.flatten().to_numpy(zero_copy_only=False)).reshape(len(chunk), width)
    except (pa.ArrowException, AttributeError, KeyError, OSError) as error:
        raise ArtifactError(
            f"not an embedding part: {error}",
            where=where,
            expected="Parquet with a `vector` column of fixed_size_list",
            hint="delete it and the folder's manifest.json, then run `pinakes encode` again",
        ) from error


def iter_blocks(store: Store, entries: Sequence[dict[str, Any]], dim: int) -> Iterator[tuple[Array, Array]]:
    """Yield (vectors (N, D) in their storage type, rows (N,) int64) part by part; each entry carries `first_row`."""
    for entry in entries:
        vectors = read_vectors(store, entry, dim)
        yield vectors, np.arange(len(vectors), dtype=np.int64) + entry["first_row"]


def sample_counts(entries: Sequence[dict[str, Any]], num_rows: int) -> list[int]:
    """Return how many rows of each part a sample of `num_rows` takes: its share of the corpus, to the nearest row."""
    ends = list(accumulate(entry["num_rows"] for entry in entries))
    total = max([1, *ends])
    bounds = [0, *(end * min(num_rows, total) // total for end in ends)]
    return [last - first for first, last in pairwise(bounds)]


def sample_part(store: Store, entry: dict[str, Any], dim: int, num_rows: int, seed: int) -> Array:
    """Return (num_rows, D) in the storage type: rows of one part, drawn without replacement, in their order."""
    rng = np.random.default_rng([seed, entry["first_row"]])
    rows = np.sort(rng.choice(entry["num_rows"], size=num_rows, replace=False))
    return read_vectors(store, entry, dim)[rows]


def sample(
    store: Store, entries: Sequence[dict[str, Any]], dim: int, num_rows: int, seed: int, num_threads: int = 1
) -> Array:
    """Return (num_rows, D) float32: a random sample of the whole corpus, without replacement, in row order.

    Every part gives its share, so that a sample is drawn part by part, anywhere, with memory for one part for each of
    num_threads, of which at most 8 read: how many does not change the sample.
    """
    bounds = [0, *accumulate(sample_counts(entries, num_rows))]
    result = np.empty((bounds[-1], dim), np.float32)

    def draw(place: int) -> None:
        first, stop = bounds[place : place + 2]
        if first < stop:
            result[first:stop] = sample_part(store, entries[place], dim, stop - first, seed)

    with ThreadPoolExecutor(min(num_threads, MOST_READERS)) as pool:
        for _ in pool.map(draw, range(len(entries))):
            pass  # raises what a thread raised; those that wait are then cancelled
    return result


def take(store: Store, entries: Sequence[dict[str, Any]], dim: int, rows_N: npt.NDArray[np.int64]) -> Array:
    """Return (N, D) float32: the vectors of these rows, which are sorted and of the parts in `entries`."""
    result = np.empty((len(rows_N), dim), np.float32)
    for entry in entries:
        low, high = np.searchsorted(rows_N, [entry["first_row"], entry["first_row"] + entry["num_rows"]])
        if low < high:
            result[low:high] = read_vectors(store, entry, dim)[rows_N[low:high] - entry["first_row"]]
    return result
