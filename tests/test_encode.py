"""Micro-batches cover every text once under the budget; vectors do not depend on how they were batched."""

from __future__ import annotations

import ast
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines import models
from pipelines.config import EncoderConfig
from pipelines.encode import Encoder, describe_encoder, local_checkpoint, resolve, settle_budget
from pipelines.errors import CheckpointError, ConfigError
from pipelines.models.base import Tokens
from pipelines.models.tokens import flatten, micro_batches, pad
from pipelines.storage import Store
from tests.checkpoints import write_dpr, write_paq, write_sentence_transformer
from tests.checkpoints.sentence import MODELS, write_model
from tests.checkpoints.words import write_word_vectors


@given(lengths=st.lists(st.integers(0, 300), max_size=200), budget=st.integers(1, 1000))
def test_micro_batches_cover_each_text_once_under_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(micro_batches(np.array(lengths, np.int64), budget))
    assert sorted(i for b in batches for i in b.tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        assert longest == lengths[batch[0]]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), data=st.data())
def test_padding_keeps_every_token_in_its_place(lengths: list[int], data: st.DataObject) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    tokens = Tokens(ids, offsets, (ids % 2).astype(np.int8))
    batch = np.array(data.draw(st.permutations(range(len(lengths)))))
    ids_BL, mask_BL, types_BL = pad(tokens, batch, pad_id=0)
    assert types_BL is not None
    for row, text in enumerate(batch):
        n = lengths[text]
        assert ids_BL[row, :n].tolist() == ids[offsets[text] : offsets[text + 1]].tolist()
        assert types_BL[row, :n].tolist() == (ids_BL[row, :n] % 2).tolist()
        assert mask_BL[row].tolist() == [1] * n + [0] * (ids_BL.shape[1] - n)
        assert not ids_BL[row, n:].any()


def test_padding_to_a_fixed_width() -> None:
    tokens = flatten([[5, 6], [], [7]])
    ids_BL, mask_BL, _ = pad(tokens, np.array([2, 0]), pad_id=1, least=4)
    assert ids_BL.tolist() == [[7, 1, 1, 1], [5, 6, 1, 1]]
    assert mask_BL.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert pad(tokens, np.array([0]), pad_id=1, least=1)[0].tolist() == [[5, 6]]
    assert len(flatten([])) == 0


def test_model_families_do_not_import_what_drives_them() -> None:
    below = {"errors", "models", "pixels", "schema"}
    for file in Path(models.__file__).parent.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {str(node.module).split(".")[1] for node in nodes if str(node.module).startswith("pipelines.")}
        assert names <= below, file.name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_sentence_transformer(str(directory))
    return str(directory)


TEXTS = ["a", "the cat sat on the mat " * 5, "", "war and peace", "the cat", "?" * 40]


def test_vectors_do_not_depend_on_batching_or_order(checkpoint: str) -> None:
    spec = resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32"))
    whole = Encoder(spec, "passage").encode_passages([""] * len(TEXTS), TEXTS)
    one_by_one = Encoder(replace(spec, token_budget=1), "passage").encode_passages([""] * len(TEXTS), TEXTS)
    backwards = Encoder(spec, "passage").encode_passages([""] * len(TEXTS), TEXTS[::-1])[::-1]
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5)
    np.testing.assert_allclose(backwards, whole, atol=1e-5)
    assert whole.shape == (len(TEXTS), spec.dim)


@pytest.mark.parametrize("layout", ["sentence-transformers", "dpr", "paq"])
def test_the_large_families_compute_no_padding(layout: str, tmp_path: Path) -> None:
    directory, other = str(tmp_path / "model"), None
    if layout == "dpr":
        write_dpr(directory, "passage")
        other = write_dpr(str(tmp_path / "query"), "query")
    else:
        (write_paq if layout == "paq" else write_sentence_transformer)(directory)
    spec = resolve(EncoderConfig(checkpoint=directory, query_checkpoint=other, compute="fp32"))
    encoder = Encoder(spec, "passage")
    encoder.encode_passages([""] * len(TEXTS), TEXTS)
    num_tokens = encoder.tokeniser.passages([""] * len(TEXTS), TEXTS).lengths.sum()
    assert num_tokens <= encoder.computed_tokens < num_tokens + 16  # the rows of the one micro-batch are rounded up


def test_the_fingerprint_follows_what_changes_vectors_and_nothing_else(checkpoint: str, tmp_path: Path) -> None:
    base = EncoderConfig(checkpoint=checkpoint, compute="fp32")
    spec = resolve(base)
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    same = [base.model_copy(update={"token_budget": 64}), base.model_copy(update={"checkpoint": str(copied)})]
    other = [base.model_copy(update=u) for u in ({"compute": "bf16"}, {"storage": "fp32"}, {"max_length": 8})]
    assert {resolve(c).fingerprint for c in same} == {spec.fingerprint}
    assert len({resolve(c).fingerprint for c in [base, *other]}) == 4
    assert spec.fingerprint != spec.query_fingerprint


def test_texts_without_tokens_are_all_padding() -> None:
    """Average word embeddings know no token of some texts: one column at least, nothing marked as a token."""
    some = Tokens(np.array([5, 6], np.int32), np.array([0, 0, 2, 2], np.int64))
    none = Tokens(np.zeros(0, np.int32), np.zeros(3, np.int64), np.zeros(0, np.int8))
    for tokens, longest in ((some, 2), (none, 1)):
        batches = list(micro_batches(tokens.lengths, 1))
        assert sorted(int(i) for batch in batches for i in batch) == list(range(len(tokens)))
        ids_BL, mask_BL, types_BL = pad(tokens, np.arange(len(tokens)), pad_id=9)
        assert ids_BL.shape == mask_BL.shape == (len(tokens), longest)
        assert mask_BL.sum(axis=1).tolist() == tokens.lengths.tolist()
        assert (ids_BL[mask_BL == 0] == 9).all()
        assert types_BL is None or not types_BL.any()


def test_similarity_and_formatting_of_the_config_reach_the_model(checkpoint: str) -> None:
    base = EncoderConfig(checkpoint=checkpoint, compute="fp32")
    pair = resolve(base.model_copy(update={"formatting": "pair"}))
    assert pair.title_format == "pair"
    titled, joined = (Encoder(s, "passage").tokeniser.passages(["war"], ["peace"]) for s in (pair, resolve(base)))
    assert titled.ids.tolist() != joined.ids.tolist()
    assert Encoder(pair, "query").tokeniser.queries(["war"]).ids.tolist() == joined_query(base)
    dot = resolve(base.model_copy(update={"similarity": "dot"}))
    assert (dot.similarity, resolve(base).similarity) == ("dot", "cosine")
    assert len({spec.fingerprint for spec in (pair, dot, resolve(base))}) == 3
    assert len({spec.query_fingerprint for spec in (dot, resolve(base))}) == 2


def joined_query(config: EncoderConfig) -> list[int]:
    return Encoder(resolve(config), "query").tokeniser.queries(["war"]).ids.tolist()


def test_similarity_decides_whether_vectors_are_normalised(tmp_path: Path) -> None:
    bare = write_sentence_transformer(str(tmp_path), extras=())
    base = EncoderConfig(checkpoint=bare, compute="fp32")
    unit, raw = (
        Encoder(resolve(base.model_copy(update={"similarity": s})), "query").encode_queries(TEXTS)
        for s in ("cosine", "dot")
    )
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.01


def test_each_side_is_cut_at_its_own_length(tmp_path: Path) -> None:
    long = write_sentence_transformer(str(tmp_path / "long"), max_seq_length=128)
    short = write_sentence_transformer(str(tmp_path / "short"), max_seq_length=32)
    both = resolve(EncoderConfig(checkpoint=long, query_checkpoint=short, compute="fp32"))
    assert Encoder(both, "query").tokeniser.queries(["war " * 300]).lengths.tolist() == [32]
    assert Encoder(both, "passage").tokeniser.passages([""], ["war " * 300]).lengths.tolist() == [128]
    one = resolve(EncoderConfig(checkpoint=long, query_checkpoint=short, compute="fp32", max_length=16))
    assert (one.length("passage"), one.length("query"), one.query_max_length) == (16, 16, None)


def test_a_checkpoint_that_changed_under_its_embeddings_is_refused(checkpoint: str, tmp_path: Path) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    spec = resolve(EncoderConfig(checkpoint=str(copied), compute="fp32"))
    with pytest.raises(CheckpointError, match="not those that made these embeddings"):
        Encoder(replace(spec, query_digest="0" * 64), "query")


def test_weights_replaced_while_the_process_lives_are_found_out(checkpoint: str, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    other = Path(write_sentence_transformer(str(tmp_path / "other"), seed=3))
    config = EncoderConfig(checkpoint=str(copied), compute="fp32")
    before, weights = resolve(config), copied / "model.safetensors"
    Encoder(before, "query")
    stat = weights.stat()
    weights.write_bytes((other / "model.safetensors").read_bytes())
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as copies do that keep the times
    assert weights.stat().st_size == stat.st_size
    for side in ("query", "passage"):
        with pytest.raises(CheckpointError, match="not those that made these embeddings"):
            local_checkpoint(before, side)
    after = resolve(config)
    assert after.digest != before.digest
    assert local_checkpoint(after, "query") == str(copied)


def test_two_sides_of_different_similarity_are_refused(tmp_path: Path) -> None:
    write_dpr(str(tmp_path / "ctx"), "passage", dim=32)
    write_sentence_transformer(str(tmp_path / "q"), dim=32)
    with pytest.raises(CheckpointError, match="trained for cosine, the passage encoder for dot"):
        resolve(EncoderConfig(checkpoint=str(tmp_path / "ctx"), query_checkpoint=str(tmp_path / "q")))


@pytest.mark.parametrize(
    ("passage", "query", "words"),
    [("passage", None, "encodes the passage side"), ("query", "query", "encodes the query side"),
     ("query", "passage", "encodes the query side")],
)  # fmt: skip
def test_an_encoder_of_the_other_side_is_refused_at_once(tmp_path: Path, passage: Any, query: Any, words: str) -> None:
    first = write_dpr(str(tmp_path / "p"), passage)
    second = write_dpr(str(tmp_path / "q"), query) if query else None
    with pytest.raises(CheckpointError, match=words):
        resolve(EncoderConfig(checkpoint=first, query_checkpoint=second))


def test_a_released_name_says_what_old_files_do_not(tmp_path: Path) -> None:
    """TAS-B is a dot-product model, and its files are older than the key that says so; the config comes first."""
    tas_b = write_sentence_transformer(str(tmp_path / "msmarco-distilbert-base-tas-b"), extras=())
    specter = write_sentence_transformer(str(tmp_path / "allenai-specter"))
    assert resolve(EncoderConfig(checkpoint=tas_b)).similarity == "dot"
    assert resolve(EncoderConfig(checkpoint=tas_b, similarity="cosine")).similarity == "cosine"
    assert resolve(EncoderConfig(checkpoint=specter)).title_format == "title[SEP]text"
    settings = {"similarity_fn_name": "cosine"}
    told = write_sentence_transformer(str(tmp_path / "new" / "msmarco-distilbert-base-tas-b"), settings=settings)
    assert resolve(EncoderConfig(checkpoint=told)).similarity == "cosine"
    other = write_dpr(str(tmp_path / "d" / "allenai-specter"), "passage")  # the files decide what it is
    assert describe_encoder(other, other)[0].family == "dpr"


def test_two_sides_of_different_width_are_refused(tmp_path: Path) -> None:
    write_dpr(str(tmp_path / "ctx"), "passage", dim=32)
    write_dpr(str(tmp_path / "q"), "query", dim=16)
    with pytest.raises(CheckpointError, match="gives 16 values, the passage encoder 32"):
        resolve(EncoderConfig(checkpoint=str(tmp_path / "ctx"), query_checkpoint=str(tmp_path / "q")))


def test_a_gpu_that_is_not_there_is_a_clear_refusal(checkpoint: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="no CUDA device"):
        Encoder(resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32")), "passage", "cuda")


def test_one_worker_measures_the_budget_and_the_others_take_it(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, notes = resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32")), Store(str(tmp_path / "notes"))
    first, second, told = (
        Encoder(spec, "passage"),
        Encoder(spec, "passage"),
        Encoder(replace(spec, token_budget=77), "passage"),
    )
    assert first.engine.budget == second.engine.budget
    settle_budget(first, notes)
    assert first.engine.budget in (2048, 4096, 8192)

    def measured_again(_: Any, __: Any) -> int:
        raise AssertionError("measured twice")

    monkeypatch.setattr(type(first.engine), "measure_budget", measured_again)
    settle_budget(second, notes)
    settle_budget(told, notes)
    assert (second.engine.budget, told.engine.budget) == (first.engine.budget, 77)


def test_a_measurement_that_fails_leaves_the_usual_budget(checkpoint: str, tmp_path: Path) -> None:
    spec, notes = resolve(EncoderConfig(checkpoint=checkpoint, compute="fp32")), Store(str(tmp_path / "notes"))
    encoder = Encoder(spec, "passage")
    encoder.engine.forward = lambda *_: 1 / 0
    settle_budget(encoder, notes)
    other = Encoder(spec, "passage")
    settle_budget(other, notes)
    assert other.engine.budget == encoder.engine.budget


def test_embeddings_in_place_take_the_query_encoder_of_now(checkpoint: str, tmp_path: Path) -> None:
    """The folder's name covers the passage side: another query encoder must not be bound to the old one's word."""
    from cluster.encode import embedding_store, encode
    from cluster.progress import Progress
    from pipelines.config import ClusterConfig
    from pipelines.manifest import write_manifest

    before = resolve(EncoderConfig(checkpoint=checkpoint))
    now = replace(before, query_checkpoint="another", query_digest="0" * 64)
    assert (now.fingerprint, now.query_fingerprint != before.query_fingerprint) == (before.fingerprint, True)
    snapshot = {"snapshot": "s", "corpus": "c", "parts": [], "num_rows": 0}
    write_manifest(embedding_store(str(tmp_path), "s", before), "embeddings", {"encoder": before.as_dict()})
    found = encode(str(tmp_path), snapshot, now, ClusterConfig(), Progress(quiet=True))
    assert found["encoder"] == now.as_dict()


@pytest.fixture
def other_default() -> Iterator[None]:
    """What a thread sees while another loads a model in bf16: transformers changes torch's default for all of them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["with a head", "word vectors"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_another_thread_that_loads_changes_no_vector(
    kind: str, compute: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "with a head":
        ance = next(model for model in MODELS if "LayerNorm" in model.extras)
        checkpoint = write_model(str(tmp_path / "model"), ance)
    else:
        modes = ("max_tokens", "mean_tokens")
        checkpoint = write_word_vectors(str(tmp_path / "model"), ["the", *TEXTS[0].split()], modes=modes, dim=8)
    spec = resolve(EncoderConfig(checkpoint=checkpoint, compute=compute))  # type: ignore[arg-type]
    usual = Encoder(spec, "query").encode_queries(TEXTS)
    request.getfixturevalue("other_default")
    found = Encoder(spec, "query").encode_queries(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, usual)
