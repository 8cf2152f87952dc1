"""Embedding parts: plain Parquet, the same bytes for the same vectors, and nothing damaged is ever used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import embeddings
from pipelines.embeddings import iter_blocks, read_vectors, sample, to_parquet
from pipelines.errors import ArtifactError, InputError
from pipelines.storage import Store


def put(store: Store, name: str, data: bytes, num_rows: int, first_row: int = 0) -> dict[str, Any]:
    store.put(name, data)
    return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "num_rows": num_rows, "first_row": first_row}


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
def test_round_trip_in_plain_types(tmp_path: Path, storage: str) -> None:
    emb_ND = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    data = to_parquet([str(i) for i in range(50)], emb_ND, storage)
    assert data == to_parquet([str(i) for i in range(50)], emb_ND, storage)
    entry = put(Store(str(tmp_path)), "part-00000.parquet", data, 50)
    np.testing.assert_allclose(
        read_vectors(Store(str(tmp_path)), entry, 7), emb_ND, atol=5e-3 if storage == "fp16" else 0
    )
    table = pq.read_table(tmp_path / "part-00000.parquet")
    value = pa.float16() if storage == "fp16" else pa.float32()
    assert table.schema.field("vector").type == pa.list_(pa.field("element", value, nullable=False), 7)
    assert table["id"].to_pylist() == [str(i) for i in range(50)]


def test_values_that_overflow_or_are_not_numbers_are_refused() -> None:
    for value, storage in ((np.nan, "fp32"), (np.inf, "fp32"), (1e5, "fp16")):
        emb_ND = np.ones((2, 3), np.float32)
        emb_ND[1, 2] = value
        with pytest.raises(InputError, match=r"not finite in .*'b'"), np.errstate(over="ignore"):
            to_parquet(["a", "b"], emb_ND, storage)


def test_truncated_tampered_and_wrong_width_parts_are_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    data = to_parquet(["a", "b"], np.eye(2, dtype=np.float32), "fp32")
    entry = put(store, "p.parquet", data, 2)
    with pytest.raises(ArtifactError, match=r"shape \(2, 2\)") as caught:
        read_vectors(store, entry, 3)
    assert "another encoder" in str(caught.value)
    store.put("p.parquet", data[:-4])
    with pytest.raises(ArtifactError, match="damaged"):
        read_vectors(store, entry, 2)
    store.put("p.parquet", data[:60] + bytes([data[60] ^ 1]) + data[61:])
    with pytest.raises(ArtifactError, match="damaged"):
        read_vectors(store, entry, 2)
    with pytest.raises(ArtifactError, match="not an embedding part"):
        read_vectors(store, put(store, "q.parquet", b"no parquet", 2), 2)


def test_sample_is_uniform_seeded_and_in_row_order(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = np.arange(100, dtype=np.float32).reshape(-1, 1)
    entries = [
        put(store, f"{i}", to_parquet(["x"] * 25, rows[i * 25 : i * 25 + 25], "fp32"), 25, i * 25) for i in range(4)
    ]
    picked = sample(store, entries, 1, 40, seed=3)[:, 0]
    assert (np.diff(picked) > 0).all()
    assert len(picked) == 40
    assert all(((picked >= i * 25) & (picked < i * 25 + 25)).any() for i in range(4))  # of the whole corpus
    np.testing.assert_array_equal(picked, sample(store, entries, 1, 40, seed=3)[:, 0])
    assert (picked != sample(store, entries, 1, 40, seed=4)[:, 0]).any()
    for num_threads in (2, 50):
        np.testing.assert_array_equal(picked, sample(store, entries, 1, 40, 3, num_threads)[:, 0])
    assert len(sample(store, entries, 1, 1000, seed=0)) == 100
    blocks = list(iter_blocks(store, entries, 1))
    np.testing.assert_array_equal(np.concatenate([b for b, _ in blocks])[:, 0], np.concatenate([r for _, r in blocks]))


def test_a_damaged_part_ends_a_sample_and_few_parts_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = Store(str(tmp_path)), np.arange(400, dtype=np.float32).reshape(-1, 1)
    entries = [put(store, f"{i}", to_parquet(["x"] * 10, rows[i * 10 : i * 10 + 10], "fp32"), 10, i * 10)
               for i in range(40)]  # fmt: skip
    reading, most, whole = [0], [0], embeddings.read_vectors

    def read(*arguments: Any) -> Any:
        reading[0] += 1
        most[0] = max(most[0], reading[0])
        try:
            return whole(*arguments)
        finally:
            reading[0] -= 1

    monkeypatch.setattr(embeddings, "read_vectors", read)
    assert len(sample(store, entries, 1, 200, 0, num_threads=64)) == 200
    assert most[0] <= 8
    store.put("3", b"no parquet")
    with pytest.raises(ArtifactError, match="damaged"):
        sample(store, entries, 1, 200, 0, num_threads=2)
    assert reading[0] == 0
