"""Guilty rows are found exactly, the others keep their vectors, and no row is blamed for what is not its fault."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import embeddings
from pipelines.config import EncoderConfig
from pipelines.encode import Encoder, ImageEncoder, resolve
from pipelines.errors import CheckpointError, InputError, PinakesError
from pipelines.guard import (
    DeviceLostError,
    Guilty,
    WorkerDiedError,
    attempt,
    attempts,
    collect,
    num_allowed,
    trace,
    write_quarantine,
)
from pipelines.guard_process import ChildEncoder, device_lost, encode_guarded, range_encoder
from pipelines.index.build import add, train
from pipelines.index.spec import parse_spec
from pipelines.models.base import Tokens
from pipelines.storage import Store
from tests.checkpoints import write_sentence_transformer
from tests.checkpoints.clip import write_hub_clip
from tests.deadly import TOKEN, WORD, write_sitecustomize
from tests.test_images import picture

DIM = 4
FAILURES: dict[str, Callable[[], Exception]] = {
    "died": lambda: WorkerDiedError("process died (signal 11, SIGSEGV)"),
    "RuntimeError": lambda: RuntimeError("a kernel refused"),
    "MemoryError": lambda: MemoryError(),
    "ours": lambda: PinakesError("a text of 512 tokens does not fit the memory of cuda, even alone"),
}


class Rows:
    """Vectors of N rows, some of which fail; counts the calls."""

    def __init__(self, num_rows: int, guilty: set[int], failure: str = "died", spoilt: set[int] | None = None) -> None:
        self.emb_ND = np.random.default_rng(num_rows).standard_normal((num_rows, DIM)).astype(np.float32)
        self.guilty, self.failure, self.spoilt, self.calls = guilty, failure, spoilt or set(), 0

    def __call__(self, start: int, stop: int) -> Any:
        self.calls += 1
        inside = range(start, stop)
        if self.guilty.intersection(inside):
            raise FAILURES[self.failure]()
        emb_ND = self.emb_ND[start:stop].copy()
        if spoilt := [row - start for row in self.spoilt if row in inside]:
            emb_ND[max(0, min(spoilt) - 1) :] = np.nan  # a batch whose rows are not independent
        return emb_ND

    def trace(self, allowed: int = 10**6, storage: str = "fp16") -> tuple[Any, list[Guilty]]:
        return trace(self, len(self.emb_ND), DIM, storage, allowed)


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, set[int]]:
    num_rows = draw(st.integers(1, 300))
    return num_rows, draw(st.sets(st.integers(0, num_rows - 1), max_size=8).filter(lambda g: not {0, 1, 2, 3} <= g))


@given(part=parts(), failure=st.sampled_from(sorted(FAILURES)))
def test_exactly_the_guilty_rows_are_found(part: tuple[int, set[int]], failure: str) -> None:
    num_rows, guilty = part
    rows = Rows(num_rows, guilty, failure)
    emb_ND, found = rows.trace()
    assert [g.row for g in found] == sorted(guilty)
    healthy = np.setdiff1d(np.arange(num_rows), sorted(guilty))
    np.testing.assert_array_equal(emb_ND[healthy], rows.emb_ND[healthy])
    assert not emb_ND[sorted(guilty)].any()
    assert rows.calls <= 1 + len(guilty) * (2 * math.ceil(math.log2(max(2, num_rows))) + 1)


@given(part=parts(), spoilt=st.sets(st.integers(0, 299), min_size=1, max_size=3))
def test_vectors_that_are_not_finite_are_traced_to_their_rows(part: tuple[int, set[int]], spoilt: set[int]) -> None:
    num_rows, guilty = part
    spoilt = {row % num_rows for row in spoilt} - guilty
    rows = Rows(num_rows, guilty, spoilt=spoilt)
    if {0, 1, 2, 3} <= guilty | spoilt:
        return
    emb_ND, found = rows.trace()
    assert [g.row for g in found] == sorted(guilty | spoilt)
    assert {g.row for g in found if "not finite in fp16" in g.reason} == spoilt
    healthy = np.setdiff1d(np.arange(num_rows), sorted(guilty | spoilt))
    np.testing.assert_array_equal(emb_ND[healthy], rows.emb_ND[healthy])
    assert np.isfinite(emb_ND).all()


@pytest.mark.parametrize(("storage", "expected"), [("fp16", [3]), ("fp32", [])])
def test_a_vector_must_be_finite_as_it_is_stored(storage: str, expected: list[int]) -> None:
    rows = Rows(20, set())
    rows.emb_ND[3, 0] = 70_000
    rows.emb_ND[5, 1] = -65_510  # rounds to the largest fp16
    emb_ND, found = rows.trace(storage=storage)
    assert [g.row for g in found] == expected
    embeddings.to_parquet([str(i) for i in range(20)], emb_ND, storage)


def test_a_row_that_fails_only_once_is_not_guilty() -> None:
    rows = Rows(64, {9})

    def encode(start: int, stop: int) -> Any:
        try:
            return rows(start, stop)
        finally:
            rows.guilty = set() if stop - start == 1 and start == 9 else rows.guilty

    emb_ND, found = trace(encode, 64, DIM, "fp16", 0)
    assert found == []
    np.testing.assert_array_equal(emb_ND, rows.emb_ND)


def test_reasons_say_what_happened() -> None:
    reasons = {failure: Rows(8, {5}, failure).trace()[1][0].reason for failure in FAILURES}
    assert reasons == {
        "died": "the encoder process died (signal 11, SIGSEGV), 2 times on this row alone",
        "RuntimeError": "RuntimeError: a kernel refused",
        "MemoryError": "MemoryError:",
        "ours": "a text of 512 tokens does not fit the memory of cuda, even alone",
    }


@pytest.mark.parametrize("failure", sorted(FAILURES))
def test_a_broken_machine_puts_nothing_into_quarantine(failure: str) -> None:
    rows = Rows(16_384, set(range(16_384)), failure)
    with pytest.raises(PinakesError, match="the first 4 passages of a part all fail alike"):
        rows.trace()
    assert rows.calls < 40


def test_more_guilty_rows_than_allowed_stop_the_run() -> None:
    assert num_allowed(1000, 0.01) == 10
    assert num_allowed(99, 0.01) == 0
    with pytest.raises(InputError, match=r"(?s)3 passages cannot be encoded: 3 x the encoder process died.*at most 2"):
        Rows(100, {10, 20, 30, 40}).trace(allowed=2)
    assert len(Rows(100, {10, 20}).trace(allowed=2)[1]) == 2


@pytest.mark.parametrize("error", [CheckpointError("gone"), DeviceLostError("gone"), KeyboardInterrupt()])
def test_what_no_row_can_cause_ends_the_search(error: BaseException) -> None:
    calls = []

    def encode(start: int, stop: int) -> Any:
        calls.append((start, stop))
        raise error

    with pytest.raises(type(error)):
        trace(encode, 100, DIM, "fp16", 100)
    assert calls == [(0, 100)]


# Attempts


def die_in_an_attempt(store: Store, name: str) -> bool:
    """Let a process of our own die while it encodes; return whether the part was suspect."""
    if not (pid := os.fork()):
        with attempt(store, name) as suspect:
            os._exit(10 + suspect)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 11


def test_a_part_is_suspect_after_two_attempts_that_never_ended(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for expected in (False, False, True, True):
        assert die_in_an_attempt(store, "part-00012.parquet") is expected
        assert attempts(store).files() == ["part-00012.json"]
    with attempt(store, "part-00012.parquet") as suspect:
        assert suspect
    assert attempts(store).files() == []
    with pytest.raises(InputError), attempt(store, "part-00012.parquet"):
        raise InputError("an error is not a death")
    assert attempts(store).files() == []
    with pytest.raises(DeviceLostError), attempt(store, "part-00012.parquet"):
        raise DeviceLostError("as good as dead")
    assert attempts(store).files() == ["part-00012.json"]
    attempts(store).put("part-00012.json", b"{")
    with attempt(store, "part-00012.parquet") as suspect:
        assert not suspect


# A process of its own


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    checkpoint = write_sentence_transformer(str(tmp_path_factory.mktemp("model")))
    return Encoder(resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32")), "passage", num_threads=1)


def tokens_of(encoder: Encoder, guilty: set[int], num_rows: int = 50) -> Tokens:
    texts = [f"the library of book {'world ' * (i % 7)}{WORD if i in guilty else ''}" for i in range(num_rows)]
    tokens = encoder.tokeniser.passages([""] * num_rows, texts)
    assert {row for row in range(num_rows) if TOKEN in tokens.rows(row, row + 1).ids} == guilty
    return tokens


def test_rows_of_tokens_are_those_of_the_whole(encoder: Encoder) -> None:
    tokens = tokens_of(encoder, set())
    tokens = replace(tokens, type_ids=(tokens.ids % 2).astype(np.int8))
    for start, stop in ((0, 50), (7, 19), (49, 50), (3, 3)):
        some, taken = tokens.rows(start, stop), tokens.take(np.arange(start, stop))
        for field in ("ids", "offsets", "type_ids"):
            np.testing.assert_array_equal(getattr(some, field), getattr(taken, field))


def test_a_suspect_part_without_a_guilty_row_gives_the_same_bytes(encoder: Encoder) -> None:
    tokens = tokens_of(encoder, set())
    encoder.engine.budget = 96  # the child cuts micro-batches under the budget that was found here
    with range_encoder(encoder, tokens, "cpu", suspect=True) as encode:
        emb_ND, found = trace(encode, len(tokens), encoder.spec.dim, "fp16", 0)
    assert found == []
    np.testing.assert_array_equal(emb_ND, encoder.encode_tokens(tokens))


def test_a_row_that_kills_its_process_is_found(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_sitecustomize(tmp_path, "segfault"))
    tokens = tokens_of(encoder, {3})
    store = Store(str(tmp_path / "store"))
    for _ in range(2):
        die_in_an_attempt(store, "part-00000.parquet")
    emb_ND, found = encode_guarded(store, "part-00000.parquet", encoder, tokens.rows(0, 8), "cpu", 1)
    assert found == [Guilty(3, "the encoder process died (signal 11, SIGSEGV), 2 times on this row alone")]
    healthy = np.delete(np.arange(8), 3)
    np.testing.assert_allclose(emb_ND[healthy], encoder.encode_tokens(tokens.take(healthy)), atol=1e-6)
    assert not emb_ND[3].any()
    assert attempts(store).files() == []


@pytest.mark.parametrize(("death", "ending"), [("killed", "signal 9, SIGKILL"), ("exit", "exit code 3")])
def test_a_death_says_how_it_came(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str, ending: str
) -> None:
    monkeypatch.syspath_prepend(write_sitecustomize(tmp_path, death))
    child = ChildEncoder(encoder, tokens_of(encoder, {1}), "cpu")
    with pytest.raises(WorkerDiedError, match=f"process died .{ending}."):
        child(0, 2)
    child.close()


def test_a_process_that_hangs_is_killed(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.syspath_prepend(write_sitecustomize(tmp_path, "hung"))
    child = ChildEncoder(encoder, tokens_of(encoder, {1}), "cpu", least_seconds=1.0)
    with pytest.raises(WorkerDiedError, match="process hung"):
        child(1, 2)
    assert child._process is None
    assert "no answer in" in caplog.text
    child._least_seconds = 600.0  # what is left of the part is encoded by the next child
    np.testing.assert_allclose(child(2, 4), encoder.encode_tokens(tokens_of(encoder, {1}).rows(2, 4)), atol=1e-6)
    child.close()


def test_a_range_may_take_longer_the_more_tokens_it_has(encoder: Encoder) -> None:
    child = ChildEncoder(encoder, tokens_of(encoder, set()), "cpu", least_seconds=10.0)
    child._token_seconds = 0.5
    num_tokens = int(tokens_of(encoder, set()).rows(3, 9).offsets[-1])
    assert child._allowed_seconds(3, 9) == 10.0 + 20 * 0.5 * num_tokens
    assert child._allowed_seconds(3, 3) == 10.0
    assert ChildEncoder(encoder, [b"x"] * 3, "cpu", 1.0)._allowed_seconds(1, 3) == 61.0


def test_an_error_in_the_process_is_told_and_the_process_lives(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_sitecustomize(tmp_path, "error"))
    child = ChildEncoder(encoder, tokens_of(encoder, {20}), "cpu")
    try:
        child(0, 1)
        process = child._process
        assert process is not None
        found = trace(child, 50, encoder.spec.dim, "fp16", 1)[1]
        assert found == [Guilty(20, "RuntimeError: a kernel refused")]
        assert child._process is process
    finally:
        child.close()
    assert process.poll() is not None


def test_a_checkpoint_that_is_gone_is_nobodys_fault(encoder: Encoder, tmp_path: Path) -> None:
    gone = Encoder.__new__(Encoder)
    gone.spec, gone.engine = replace(encoder.spec, checkpoint=str(tmp_path / "nowhere")), encoder.engine
    with (
        range_encoder(gone, tokens_of(encoder, set()), "cpu", suspect=True) as encode,
        pytest.raises(CheckpointError, match="nowhere"),
    ):
        trace(encode, 50, encoder.spec.dim, "fp16", 50)


def test_a_lost_device_is_told_from_a_full_one() -> None:
    import torch

    assert device_lost(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert not device_lost(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device_lost(RuntimeError("shapes do not match"))


def test_images_are_guarded_too(tmp_path: Path) -> None:
    """An image that no longer decodes is one guilty row, here and in a process of its own."""
    model = ImageEncoder(resolve(EncoderConfig(checkpoint=write_hub_clip(str(tmp_path)), compute="fp32")))
    images = [picture(seed) for seed in range(6)]
    plain = model.encode_images(images)
    for suspect in (False, True):
        with range_encoder(model, images, "cpu", suspect=suspect) as encode:
            emb_ND, found = trace(encode, 6, model.spec.dim, "fp16", 0)
        assert found == []
        np.testing.assert_array_equal(emb_ND, plain)
    images[4] = b"not a picture"
    with range_encoder(model, images, "cpu", suspect=False) as encode:
        assert [g.row for g in trace(encode, 6, model.spec.dim, "fp16", 1)[1]] == [4]


# Quarantine


def test_the_quarantine_is_written_with_rows_of_the_snapshot(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    entries = [{"name": f"part-{i:05d}.parquet", "first_row": 10 * i} for i in range(3)]
    rows = collect(entries, [[], [{"id": "p14", "row": 4, "reason": "a"}], [{"id": "p20", "row": 0, "reason": "b"}]])
    write_quarantine(store, rows, allowed=2)
    assert pq.read_table(tmp_path / "quarantine.parquet").to_pylist() == rows == [
        {"id": "p14", "row": 14, "part": "part-00001.parquet", "reason": "a"},
        {"id": "p20", "row": 20, "part": "part-00002.parquet", "reason": "b"},
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"(?s)2 passages cannot be encoded: 1 x a, 1 x b.*quarantine.parquet"):
        write_quarantine(store, rows, allowed=1)
    write_quarantine(store, [], allowed=1)
    assert not store.exists("quarantine.parquet")


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8", "HNSW8"])
def test_an_index_takes_the_zeros_and_finds_them_last(factory: str) -> None:
    rng = np.random.default_rng(0)
    emb_ND = np.abs(rng.standard_normal((400, 16))).astype(np.float32)
    emb_ND[7] = 0
    spec = parse_spec(factory, 16, "ip")
    index = train(spec, emb_ND, seed=0)
    add(index, emb_ND, np.arange(400))
    score_BK, row_BK = index.search(np.abs(rng.standard_normal((20, 16))).astype(np.float32), 50)
    assert np.isfinite(score_BK).all()
    assert 7 not in row_BK
    assert isinstance(index, faiss.Index)
