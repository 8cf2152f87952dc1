"""DPR encoders against transformers' own DPR classes with explicit zero token types."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import describe, dpr, find_family
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
def test_vectors_equal_transformers(tmp_path: Path, projection: int, weights: str) -> None:
    context = write_dpr(str(tmp_path / "c"), "passage", projection=projection, weights=weights)
    question = write_dpr(str(tmp_path / "q"), "query", projection=projection, weights=weights, seed=5)
    tokeniser = dpr.load_tokeniser(context)
    tokens = tokeniser.passages(TITLES, TEXTS)
    tower = dpr.load_tower(context, "passage", "fp32", "cpu")
    assert tower.dim == describe(context).dim == (projection or 32)
    assert close(embed(tower, tokens, tokeniser.pad_id), _oracle(context, "DPRContextEncoder", rows(tokens)))
    tokens = dpr.load_tokeniser(question).queries(QUESTIONS)
    tower = dpr.load_tower(question, "query", "fp32", "cpu")
    assert close(embed(tower, tokens, tokeniser.pad_id), _oracle(question, "DPRQuestionEncoder", rows(tokens)))


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
    with pytest.raises(CheckpointError, match="reader"):
        find_family(write_dpr(str(tmp_path / "r"), "reader"))


def test_config_of_another_class_is_refused(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["DPRContextEncoder"]}))
    with pytest.raises(CheckpointError, match="weights are a question encoder"):
        find_family(directory)


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
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projection_dim": 16}))
    with pytest.raises(CheckpointError, match=r"encode_proj\.weight"):
        dpr.load_tower(directory, "query", "fp32", "cpu")


@pytest.mark.parametrize("length", [3, 513])
def test_impossible_max_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ConfigError, match="max_length"):
        dpr.load_tokeniser(write_dpr(str(tmp_path), "query"), max_length=length)


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        dpr.load_tower(write_dpr(str(tmp_path), "query"), "query", "int8", "cpu")
