"""DPR encoders against transformers' own DPR classes with explicit zero token types."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import describe, dpr, find_family, kind_of
from tests.checkpoints import write_dpr
from tests.parity.towers import QUESTIONS, TEXTS, TITLES, close, embed, rows


def _oracle(directory: str, name: str, ids: list[list[int]]) -> Any:
    """Return the vectors of transformers' class, one text at a time: no padding, explicit zero types."""
    import torch
    import transformers

    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        batches = [torch.tensor([row]) for row in ids]
        outputs = [model(input_ids=batch, token_type_ids=torch.zeros_like(batch)).pooler_output for batch in batches]
    return torch.cat(outputs).numpy()


@pytest.mark.parametrize("projection", [0, 20])
@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_vectors_equal_transformers(tmp_path: Path, parity: Callable[..., None], projection: int, weights: str) -> None:
    context = write_dpr(str(tmp_path / "c"), "passage", projection=projection, weights=weights)
    question = write_dpr(str(tmp_path / "q"), "query", projection=projection, weights=weights, seed=5)
    assert describe(context).dim == describe(question).dim == (projection or 32)
    _compare(parity, "DPR", f"HF .{weights}, {projection or 'no'} projection", context, question)


@pytest.mark.parametrize("data", ["single-nq", "single-trivia"])
def test_rdr_equals_transformers(tmp_path: Path, parity: Callable[..., None], data: str) -> None:
    """RDR's directories are DPR's layout, saved by transformers 4.5: slow tokeniser, one .bin, a named class."""
    context = write_dpr(str(tmp_path / f"rdr-ctx_encoder-{data}-base"), "passage", seed=7)
    question = write_dpr(str(tmp_path / f"rdr-question_encoder-{data}-base"), "query", seed=8)
    for directory in (context, question):
        _edit(Path(directory, "config.json"), transformers_version="4.5.0", gradient_checkpointing=False)
        Path(directory, "special_tokens_map.json").write_text('{"sep_token": "[SEP]", "cls_token": "[CLS]"}')
    assert find_family(context) is find_family(question) is dpr
    _compare(parity, "RDR", f"HF .bin, {data}", context, question)


def _compare(parity: Callable[..., None], family: str, layout: str, context: str, question: str) -> None:
    tokeniser = dpr.load_tokeniser(context)
    tokens = tokeniser.passages(TITLES, TEXTS)
    tower = dpr.load_tower(context, "passage", "fp32", "cpu")
    ours = embed(tower, tokens, tokeniser.pad_id)
    assert ours.shape[1] == tower.dim
    theirs = _oracle(context, "DPRContextEncoder", rows(tokens))
    parity(family, f"{layout}, context", "transformers DPRContextEncoder", ours, theirs)
    tokeniser = dpr.load_tokeniser(question)
    tokens = tokeniser.queries(QUESTIONS)
    ours = embed(dpr.load_tower(question, "query", "fp32", "cpu"), tokens, tokeniser.pad_id)
    theirs = _oracle(question, "DPRQuestionEncoder", rows(tokens))
    parity(family, f"{layout}, question", "transformers DPRQuestionEncoder", ours, theirs)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_passage_tokens_are_the_pair(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    directory = write_dpr(str(tmp_path), "passage")
    theirs = BertTokenizer.from_pretrained(directory)
    bodies = [text.strip().strip('"') for text in TEXTS]
    options = {"truncation": "longest_first", "max_length": 256}
    expected = [
        theirs(title, body, **options)["input_ids"] if title else theirs(body, **options)["input_ids"]
        for title, body in zip(TITLES, bodies, strict=True)
    ]
    tokens = dpr.load_tokeniser(directory).passages(TITLES, TEXTS)
    assert rows(tokens) == expected
    assert tokens.type_ids is None
    assert tokens.lengths.max() == 256


def test_fixed_question_tokens(tmp_path: Path) -> None:
    tokeniser = dpr.load_tokeniser(write_dpr(str(tmp_path), "query"))
    backend = tokeniser.encoder.backend
    (row,) = rows(tokeniser.queries([" What’s a Scroll? "]))
    assert [backend.id_to_token(index) for index in row] == ["[CLS]", "what", "'", "s", "a", "scroll", "?", "[SEP]"]
    assert row[0] == 2
    assert row[-1] == 3
    assert len(tokeniser.queries([])) == 0


def test_padding_batching_and_order_do_not_matter(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "passage")
    tokeniser, tower = dpr.load_tokeniser(directory), dpr.load_tower(directory, "passage", "fp32", "cpu")
    together = embed(tower, tokeniser.passages(TITLES, TEXTS), tokeniser.pad_id)
    padded = embed(tower, tokeniser.passages(TITLES[:4], TEXTS[:4]), tokeniser.pad_id, extra=100)
    backwards = embed(tower, tokeniser.passages(TITLES[::-1], TEXTS[::-1]), tokeniser.pad_id)
    alone = [
        embed(tower, tokeniser.passages([title], [text]), tokeniser.pad_id)[0]
        for title, text in zip(TITLES, TEXTS, strict=True)
    ]
    assert close(padded, together[:4])
    assert close(backwards[::-1], together)
    assert close(np.stack(alone), together)


def test_fp16_file_loads_as_asked(tmp_path: Path) -> None:
    full = write_dpr(str(tmp_path / "32"), "passage")
    half = write_dpr(str(tmp_path / "16"), "passage", dtype="float16")
    tokeniser = dpr.load_tokeniser(half)
    tokens = tokeniser.passages(TITLES, TEXTS)
    tower = dpr.load_tower(half, "passage", "fp32", "cpu")
    assert str(tower.backbone.dtype) == "torch.float32"
    assert not tower.training
    expected = embed(dpr.load_tower(full, "passage", "fp32", "cpu"), tokens, tokeniser.pad_id)
    assert close(embed(tower, tokens, tokeniser.pad_id), expected, 2e-2)
    low = dpr.load_tower(full, "passage", "bf16", "cpu")
    assert str(low.backbone.dtype) == "torch.bfloat16"
    assert np.sum(embed(low, tokens, 0) * expected) / np.sum(expected**2) == pytest.approx(1.0, abs=0.02)


def test_cased_vocabulary_stays_cased(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query")
    pieces = (tmp_path / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces, "Who", "Ray"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    tokeniser = dpr.load_tokeniser(directory)
    assert rows(tokeniser.queries(["Who"])) == [[2, len(pieces), 3]]


def test_tokeniser_pickles_without_its_directory(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query")
    tokeniser = dpr.load_tokeniser(directory, max_length=16)
    copy = pickle.loads(pickle.dumps(tokeniser))
    (tmp_path / "vocab.txt").unlink()
    assert rows(copy.queries(["war " * 50])) == rows(tokeniser.queries(["war " * 50]))
    assert copy.queries(["war " * 50]).lengths.tolist() == [16]


def test_the_other_side_is_refused(tmp_path: Path) -> None:
    question = write_dpr(str(tmp_path / "q"), "query")
    context = write_dpr(str(tmp_path / "c"), "passage")
    with pytest.raises(CheckpointError, match="question encoder"):
        dpr.load_tower(question, "passage", "fp32", "cpu")
    with pytest.raises(CheckpointError, match="context encoder"):
        dpr.load_tower(context, "query", "fp32", "cpu")
    with pytest.raises(CheckpointError, match="this is a reader"):
        find_family(write_dpr(str(tmp_path / "r"), "reader"))


def test_config_of_another_class_is_refused(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path / "q"), "query")
    _edit(tmp_path / "q" / "config.json", architectures=["DPRContextEncoder"])
    with pytest.raises(CheckpointError, match="weights are a question encoder"):
        find_family(directory)
    directory = write_dpr(str(tmp_path / "r"), "reader")
    _edit(tmp_path / "r" / "config.json", architectures=["DPRContextEncoder"])
    with pytest.raises(CheckpointError, match="DPRContextEncoder but the weights are a reader's"):
        find_family(directory)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_without_architectures_the_tensors_decide(tmp_path: Path, weights: str) -> None:
    for side, kind in (("passage", ("dpr", "encoder")), ("reader", ("dpr_reader", "reader"))):
        directory = write_dpr(str(tmp_path / side), side, weights=weights)
        _edit(tmp_path / side / "config.json", architectures=None)
        assert kind_of(directory) == kind


@pytest.mark.parametrize("content", ["{", "[1]", '"dpr"', "{}", '{"model_type": "bert"}', '{"model_type": 3}'])
def test_anything_else_is_not_recognised(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert not dpr.recognises(str(tmp_path))
    assert not dpr.recognises(str(tmp_path / "config.json"))
    assert not dpr.recognises(str(tmp_path / "lost"))


def test_other_similarity_and_formatting_are_refused(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query")
    assert dpr.info(directory, similarity="dot").similarity == "dot"
    with pytest.raises(ConfigError, match="similarity"):
        dpr.info(directory, similarity="cosine")
    with pytest.raises(ConfigError, match="formatting"):
        dpr.info(directory, formatting="pair")


def test_edge_rows_have_vectors(tmp_path: Path) -> None:
    """Empty, decomposed, emoji, quotes only, very long: all encoded; equal rows give equal vectors."""
    directory = write_dpr(str(tmp_path), "passage")
    tokeniser, tower = dpr.load_tokeniser(directory), dpr.load_tower(directory, "passage", "fp32", "cpu")
    texts = ["", '""', "??", "cafe\u0301", "caf\u00e9", "\U0001f4da", "king", "king", "war " * 250_000]
    tokens = tokeniser.passages([""] * len(texts), texts)
    assert tokens.lengths.tolist()[-1] == 256
    assert rows(tokens)[0] == rows(tokens)[1] == [2, 3]
    vectors = embed(tower, tokens, tokeniser.pad_id)
    assert np.isfinite(vectors).all()
    assert close(vectors[3], vectors[4])
    assert close(vectors[6], vectors[7])


@pytest.mark.parametrize("lost", ["encoder.layer.1.output.dense.bias", "embeddings.LayerNorm.weight"])
def test_missing_tensor_is_refused(tmp_path: Path, lost: str) -> None:
    import torch

    directory = write_dpr(str(tmp_path), "query")
    path = tmp_path / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    del state[f"question_encoder.bert_model.{lost}"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"lack .*{lost}"):
        dpr.load_tower(directory, "query", "fp32", "cpu")


@pytest.mark.parametrize("name", ["question_encoder.bert_model.encoder.layer.7.output.dense.bias", "other.weight"])
def test_unexpected_tensor_is_refused(tmp_path: Path, name: str) -> None:
    import torch

    directory = write_dpr(str(tmp_path), "query")
    path = tmp_path / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True) | {name: torch.zeros(32)}, path)
    with pytest.raises(CheckpointError, match="unexpected"):
        dpr.load_tower(directory, "query", "fp32", "cpu")


def test_declared_projection_must_be_there(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query")
    _edit(tmp_path / "config.json", projection_dim=16)
    with pytest.raises(CheckpointError, match=r"encode_proj\.weight"):
        dpr.load_tower(directory, "query", "fp32", "cpu")


@pytest.mark.parametrize("length", [3, 513])
def test_impossible_max_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        dpr.load_tokeniser(write_dpr(str(tmp_path), "query"), max_length=length)


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        dpr.load_tower(write_dpr(str(tmp_path), "query"), "query", "int8", "cpu")
