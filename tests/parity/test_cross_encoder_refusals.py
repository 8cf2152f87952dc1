"""Which directories are cross-encoders, and which of those are refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError
from pipelines.models import cross_encoder, find_family
from tests.checkpoints import (
    save_weights,
    write_cross_encoder,
    write_dpr,
    write_paq,
    write_sentence_transformer,
)
from tests.checkpoints.rerankers import (
    write_bert_cat,
    write_capreolus,
    write_classifier,
    write_google_bert,
    write_paq_reranker,
)


def _state(directory: str) -> dict[str, Any]:
    import torch

    return torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)


# Recognition


def test_only_classifiers_are_recognised(tmp_path: Path) -> None:
    bi_encoder = write_sentence_transformer(str(tmp_path / "st"))
    _edit(tmp_path / "st" / "config.json", architectures=["BertForSequenceClassification"])
    others = [
        bi_encoder,
        write_dpr(str(tmp_path / "dpr"), "query"),
        write_paq(str(tmp_path / "paq")),
        write_paq_reranker(str(tmp_path / "reranker")),
        str(tmp_path / "absent"),
        str(tmp_path),
        str(tmp_path / "dpr" / "vocab.txt"),
    ]
    for name, content in (("list", "[1]"), ("bad", "{"), ("number", '{"architectures": 3, "model_type": "bert"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        others.append(str(tmp_path / name))
    tagger = write_classifier(str(tmp_path / "tags"), "bert")
    _edit(tmp_path / "tags" / "config.json", architectures=["BertForTokenClassification"])
    plain = write_google_bert(str(tmp_path / "plain"), named=True)
    state = {name: t.numpy() for name, t in _state(plain).items() if not name.startswith("classifier")}
    save_weights(plain, state, "bin")
    assert [other for other in [*others, tagger, plain] if cross_encoder.recognises(other)] == []


def test_it_is_no_bi_encoder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="to rerank, not to embed"):
        find_family(write_cross_encoder(str(tmp_path)))


def test_describing_needs_no_torch(tmp_path: Path) -> None:
    directory = write_cross_encoder(str(tmp_path), labels=2)
    code = (
        f"import sys; from pipelines.models.cross_encoder import info\nprint(info({directory!r}).details['labels'], "
        "[m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


# Refusals


def _edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def _drop(directory: str, prefix: str) -> None:
    state = {name: tensor.numpy() for name, tensor in _state(directory).items()}
    kept = {name: array for name, array in state.items() if not name.startswith(prefix)}
    assert len(kept) < len(state)
    save_weights(directory, kept, "bin")


@pytest.mark.parametrize(
    ("kind", "lost", "words"),
    [
        ("bert", "bert.pooler.", r"lack bert\.pooler"),
        ("bert", "classifier.", "no classification head"),
        ("bert", "classifier.bias", r"lack classifier\.bias"),
        ("bert", "bert.encoder.layer.1.", r"lack bert\.encoder\.layer\.1"),
        ("electra", "classifier.dense.bias", r"lack classifier\.dense\.bias"),
        ("electra", "classifier.dense.weight", r"unexpected classifier\.dense\.bias"),
        ("electra", "electra.embeddings_project.bias", "embeddings_project"),
        ("distilbert", "pre_classifier.", "lack pre_classifier"),
        ("deberta-v2", "pooler.", r"lack pooler\.dense"),
        ("roberta", "classifier.dense.", r"lack classifier\.dense"),
    ],
)
def test_nothing_is_ever_random(tmp_path: Path, kind: str, lost: str, words: str) -> None:
    directory = write_classifier(str(tmp_path), kind)
    _drop(directory, lost)
    with pytest.raises(CheckpointError, match=words):
        cross_encoder.load(directory)


@pytest.mark.parametrize(
    ("write", "lost", "words"),
    [
        (write_capreolus, "electra.encoder.layer.0.output.dense.bias", r"lack encoder\.layer\.0"),
        (write_capreolus, "classifier.out_proj.bias", r"lack classifier\.out_proj\.bias"),
        (write_bert_cat, "_classification_layer.bias", r"lack _classification_layer\.bias"),
        (write_bert_cat, "_classification_layer.", "no classification head"),
        (write_bert_cat, "bert_model.transformer.layer.1.attention.q_lin.bias", "q_lin"),
        (write_bert_cat, "bert_model.transformer.", "no BERT_Cat"),
    ],
)
def test_nothing_is_random_behind_a_bare_head(
    tmp_path: Path, write: Callable[[str], str], lost: str, words: str
) -> None:
    directory = write(str(tmp_path))
    _drop(directory, lost)
    with pytest.raises(CheckpointError, match=words):
        cross_encoder.load(directory)


def test_bert_cat_without_a_tokeniser_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokeniser") as caught:
        cross_encoder.load(write_bert_cat(str(tmp_path), tokeniser=False))
    assert "distilbert-base-uncased" in caught.value.hint


def test_unexpected_tensors_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    directory = write_classifier(str(tmp_path / "a"), "bert")
    arrays = {name: tensor.numpy() for name, tensor in _state(directory).items()}
    save_weights(directory, arrays | {"adapter.weight": np.zeros((2, 2), np.float32)}, "bin")
    with pytest.raises(CheckpointError, match=r"unexpected adapter\.weight"):
        cross_encoder.load(directory)
    directory = write_classifier(str(tmp_path / "b"), "bert")
    _edit(tmp_path / "b" / "config.json", hidden_size=64)
    with pytest.raises(CheckpointError, match="do not fit"):
        cross_encoder.load(directory)
    with pytest.raises(CheckpointError, match="3 labels"):
        cross_encoder.load(write_cross_encoder(str(tmp_path / "c"), labels=3))


def test_another_kind_is_refused(tmp_path: Path) -> None:
    directory = write_cross_encoder(str(tmp_path))
    _edit(tmp_path / "config.json", architectures=["AlbertForMultipleChoice"])
    with pytest.raises(CheckpointError, match="no cross-encoder"):
        cross_encoder.load(directory)


@pytest.mark.parametrize(
    ("modules", "settings", "words"),
    [
        (["Transformer", "Dense"], {}, "lists Transformer, Dense"),
        ([], {}, "lists nothing"),
        (["Transformer"], {"default_prompt_name": "query"}, "prompt"),
    ],
)
def test_richer_cross_encoders_are_refused(
    tmp_path: Path, modules: list[str], settings: dict[str, str], words: str
) -> None:
    directory = write_cross_encoder(str(tmp_path))
    rows = [{"idx": i, "path": "", "type": f"sentence_transformers.x.{kind}"} for i, kind in enumerate(modules)]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"model_type": "CrossEncoder"} | settings))
    with pytest.raises(CheckpointError, match=words):
        cross_encoder.load(directory)


class _Evil:
    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("damage", ["truncated", "old pickle", "zipped pickle", "absent"])
def test_damaged_weights_are_refused(tmp_path: Path, damage: str) -> None:
    import torch

    directory, proof = write_classifier(str(tmp_path / "model"), "bert"), tmp_path / "proof"
    path = tmp_path / "model" / "pytorch_model.bin"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "absent":
        path.unlink()
    elif damage == "old pickle":
        path.write_bytes(pickle.dumps({"classifier.weight": _Evil(str(proof))}, protocol=2))
    else:
        torch.save({"classifier.weight": _Evil(str(proof))}, path)
    words = {"truncated": "damaged", "absent": "no weights"}.get(damage, "holds code")
    with pytest.raises(CheckpointError, match=words):
        cross_encoder.load(directory)
    assert not proof.exists()
