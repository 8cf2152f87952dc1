"""Cross-encoders against AutoModelForSequenceClassification's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError
from pipelines.models import find_family
from pipelines.models.cross_encoder import load_cross_encoder
from tests.checkpoints import write_cross_encoder
from tests.parity.towers import TEXTS, TITLES, close

QUERY = " Who built the library? "


def _oracle(directory: str) -> Any:
    """Return (N, labels) logits of each pair alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokeniser = BertTokenizer.from_pretrained(directory)
    joined = [f"{t}. {x.strip()}" if t else x.strip() for t, x in zip(TITLES, TEXTS, strict=True)]
    options = {"truncation": "longest_first", "max_length": 512, "return_tensors": "pt"}
    with torch.inference_mode():
        return torch.cat([model(**tokeniser(QUERY.strip(), text, **options)).logits for text in joined])


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_one_label_gives_the_logit(tmp_path: Path, batch_size: int) -> None:
    directory = write_cross_encoder(str(tmp_path))
    scores = load_cross_encoder(directory, "fp32", "cpu", batch_size=batch_size).score(QUERY, TITLES, TEXTS)
    assert scores.dtype == np.float32
    assert close(scores, _oracle(directory)[:, 0])


def test_two_labels_order_like_softmax(tmp_path: Path) -> None:
    directory = write_cross_encoder(str(tmp_path), labels=2)
    scores = load_cross_encoder(directory, "fp32", "cpu").score(QUERY, TITLES, TEXTS)
    logits = _oracle(directory)
    assert close(scores, logits[:, 1] - logits[:, 0])
    assert np.argsort(scores).tolist() == logits.softmax(dim=1)[:, 1].argsort().tolist()


def test_order_of_passages_does_not_matter(tmp_path: Path) -> None:
    scorer = load_cross_encoder(write_cross_encoder(str(tmp_path)), "fp32", "cpu")
    scores = scorer.score(QUERY, TITLES, TEXTS)
    assert close(scorer.score(QUERY, TITLES[::-1], TEXTS[::-1])[::-1], scores)
    assert scorer.score(QUERY, [], []).shape == (0,)


def test_the_weights_decide_the_labels(tmp_path: Path) -> None:
    """An old config.json may name two labels where the head has one."""
    directory = write_cross_encoder(str(tmp_path))
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    expected = load_cross_encoder(directory, "fp32", "cpu").score(QUERY, TITLES, TEXTS)
    path.write_text(json.dumps(config | {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}))
    assert close(load_cross_encoder(directory, "fp32", "cpu").score(QUERY, TITLES, TEXTS), expected)


def _drop(directory: Path, prefix: str) -> None:
    from safetensors.numpy import load_file, save_file

    path = directory / "model.safetensors"
    save_file({n: a for n, a in load_file(path).items() if not n.startswith(prefix)}, path)


@pytest.mark.parametrize(
    ("lost", "words"), [("bert.pooler.", "lack bert.pooler"), ("classifier.", "no classification")]
)
def test_a_head_is_never_random(tmp_path: Path, lost: str, words: str) -> None:
    directory = write_cross_encoder(str(tmp_path))
    _drop(tmp_path, lost)
    with pytest.raises(CheckpointError, match=words):
        load_cross_encoder(directory, "fp32", "cpu")


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="3 labels"):
        load_cross_encoder(write_cross_encoder(str(tmp_path / "3"), labels=3), "fp32", "cpu")
    directory = write_cross_encoder(str(tmp_path / "m"))
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["AlbertForMultipleChoice"]}))
    with pytest.raises(CheckpointError, match="no cross-encoder"):
        load_cross_encoder(directory, "fp32", "cpu")


def test_it_is_no_bi_encoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rerank, not to embed"):
        find_family(write_cross_encoder(str(tmp_path)))
