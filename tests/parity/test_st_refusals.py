"""Bad sentence-transformers directories, of transformers and of word vectors: each refused with its reason."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError
from pipelines.models import describe, find_family
from pipelines.models import sentence_transformers as family
from pipelines.models import word_embeddings as words_family
from tests.checkpoints import save_weights, write_cross_encoder, write_sentence_transformer
from tests.checkpoints.words import write_word_vectors

VOCABULARY = ["PADDING_TOKEN", "Paris", "paris", "king", "war"]


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sentence_transformers.models.LSTM", "unknown module type"),
        ("sentence_transformers.models.WKPooling", "unknown module type"),
        ("sentence_transformers.models.Asym", "unknown module type"),
        ("os.system", "unknown module type 'os.system'"),
        ("evil.Transformer", "unknown module type"),
    ],
)
def test_modules_come_from_the_table(tmp_path: Path, kind: str, words: str) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["type"] = kind
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=words):
        find_family(directory)


@pytest.mark.parametrize("kind", ["BERT", "RoBERTa", "DistilBERT", "XLMRoBERTa", "ALBERT"])
def test_legacy_module_names_load(tmp_path: Path, kind: str) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["type"] = f"sentence_transformers.models.{kind}"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert family.info(directory).dim == 32


def test_a_path_outside_is_refused(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[1]["path"] = "../1_Pooling"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match="outside"):
        find_family(directory)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation 'os.system'"),
        ("2_Dense/config.json", {"in_features": 7}, "width 7"),
        ("2_Dense/config.json", {"use_residual": True}, "residual"),
        ("2_Dense/config.json", {"out_features": 9}, "shape"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling mode median"),
        ("1_Pooling/config.json", {"word_embedding_dimension": 31}, "width"),
        ("2_Dense/config.json", {"out_features": None}, "lacks out_features"),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}, "no table of texts"),
        ("config.json", {"model_type": "xlnet"}, "xlnet backbone"),
        ("config.json", {"model_type": "t5"}, "t5 backbone"),
        ("config.json", {"model_type": "nonsense"}, "config.json cannot be used"),
        ("config.json", {"num_hidden_layers": 3}, r"lack encoder\.layer\.2"),
        ("config.json", {"num_hidden_layers": 1}, r"unexpected encoder\.layer\.1"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "SparseEncoder"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "fill-mask"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, file: str, change: dict[str, Any], words: str) -> None:
    directory = write_sentence_transformer(str(tmp_path), extras=("Dense",))
    _edit(tmp_path / file, **change)
    with pytest.raises(CheckpointError, match=words):
        family.load_tower(directory, "passage", "fp32", "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors"])
def test_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    directory = write_sentence_transformer(str(tmp_path), extras=("Dense",))
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"weights|missing"):
        family.load_tower(directory, "passage", "fp32", "cpu")


def test_prompt_excluded_from_pooling_is_refused(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path), settings={"prompts": {"query": "question: "}})
    _edit(tmp_path / "1_Pooling" / "config.json", include_prompt=False)
    with pytest.raises(CheckpointError, match="include_prompt"):
        find_family(directory)


# Files


def _load_sentences(directory: str) -> None:
    find_family(directory)
    family.load_tower(directory, "query", "fp32", "cpu")


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("layout", ["hub", "v0.2"])
def test_cut_off_weights_of_a_transformer(tmp_path: Path, layout: str, weights: str) -> None:
    directory = write_sentence_transformer(str(tmp_path), layout=layout, weights=weights)
    folder = tmp_path if layout == "hub" else tmp_path / "0_Transformer"
    path = folder / ("pytorch_model.bin" if weights == "bin" else "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut off"):
        describe(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "2_Dense/model.safetensors"])
def test_git_lfs_pointers(tmp_path: Path, name: str) -> None:
    directory = write_sentence_transformer(str(tmp_path), extras=("Dense",))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(CheckpointError, match="LFS"):
        describe(directory)
    (tmp_path / name).rename(tmp_path / name.replace("model.safetensors", "pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="LFS pointer"):
        describe(directory)


@pytest.mark.parametrize("folder", ["", "2_Dense"])
def test_a_malicious_pickle_in_any_module_does_not_run(tmp_path: Path, folder: str) -> None:
    directory, proof = write_sentence_transformer(str(tmp_path), extras=("Dense",)), tmp_path / "proof"
    (tmp_path / folder / "model.safetensors").unlink()
    content = pickle.dumps({"linear.weight": _Evil(proof)}, protocol=2)
    (tmp_path / folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds code"):
        _load_sentences(directory)
    assert not proof.exists()


@pytest.mark.parametrize("content", ["{", "{}", "[1]", "[]"])
def test_a_damaged_list_of_modules(tmp_path: Path, content: str) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        find_family(directory)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"linear.weight": np.ones((24, 32), np.float32)}, "lack linear.bias"),
        ({"linear.weight": np.ones((24, 32), np.float32), "linear.bias": np.ones(9, np.float32)}, "shape"),
        ({"weight": np.ones((24, 32), np.float32)}, "lack linear"),
    ],
)
def test_a_dense_layer_of_other_tensors(tmp_path: Path, state: dict[str, Any], words: str) -> None:
    directory = write_sentence_transformer(str(tmp_path), extras=("Dense",))
    save_weights(str(tmp_path / "2_Dense"), state)
    with pytest.raises(CheckpointError, match=words):
        _load_sentences(directory)


def test_a_transformer_of_another_kind_than_its_config_says(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    _edit(tmp_path / "config.json", model_type="distilbert", dim=32, n_heads=4, n_layers=2)
    with pytest.raises(CheckpointError, match="lack transformer"):
        _load_sentences(directory)


def test_a_tokeniser_without_separator(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"] = {f"{piece}x": index for piece, index in content["model"]["vocab"].items()}
    content["model"]["unk_token"] = "[UNK]x"
    content |= {"added_tokens": [], "post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no separator"):
        family.load_tokeniser(directory, formatting="title[SEP]text")


def test_it_recognises_nothing_else(tmp_path: Path) -> None:
    """A cross-encoder that sentence-transformers 5 or later saved has a modules.json too."""
    cross = write_cross_encoder(str(tmp_path / "cross"))
    assert not family.recognises(cross)
    rows = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    (tmp_path / "cross" / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "cross" / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "modules.json").write_text('[{"type": "sentence_transformers.models.CLIPModel", "path": "0_CLIPModel"}]')
    file = tmp_path / "file.cp"
    file.write_bytes(b"\x00")
    for checkpoint in (cross, str(clip), str(file), str(tmp_path), str(tmp_path / "lost")):
        assert not family.recognises(checkpoint)


# Word vectors


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            "0_WordEmbeddings/wordembedding_config.json",
            {"tokenizer_class": "sentence_transformers.models.tokenizer.PhraseTokenizer.PhraseTokenizer"},
            "tokeniser PhraseTokenizer",
        ),
        ("0_WordEmbeddings/wordembedding_config.json", {"tokenizer_class": "evil.WhitespaceTokenizer"}, "tokeniser"),
        ("0_WordEmbeddings/wordembedding_config.json", {"max_seq_length": -1}, "max_seq_length"),
        ("0_WordEmbeddings/whitespacetokenizer_config.json", {"vocab": VOCABULARY[:-1]}, "4 words, the weights 5"),
        ("0_WordEmbeddings/whitespacetokenizer_config.json", {"stop_words": None}, "stop_words"),
        ("1_WordWeights/config.json", {"vocab": VOCABULARY[:-1]}, "weights for 4 words"),
        ("1_WordWeights/config.json", {"word_weights": None}, "word_weights"),
        ("2_Pooling/config.json", {"pooling_mode_cls_token": True}, "cannot be pooled by cls"),
        ("3_Dense/config.json", {"in_features": 31}, "width 31"),
    ],
)
def test_word_configs_that_do_not_fit(tmp_path: Path, file: str, change: dict[str, Any], words: str) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, word_weights={"war": 0.5}, extras=("Dense",))
    _edit(tmp_path / file, **change)
    with pytest.raises(CheckpointError, match=words):
        _load(directory)


def _load(directory: str) -> None:
    find_family(directory)
    words_family.load_tokeniser(directory)
    words_family.load_tower(directory, "query", "fp32", "cpu")


@pytest.mark.parametrize("name", ["wordembedding_config.json", "whitespacetokenizer_config.json", "pytorch_model.bin"])
def test_missing_word_files(tmp_path: Path, name: str) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY)
    (tmp_path / "0_WordEmbeddings" / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        find_family(directory)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_cut_off_weights(tmp_path: Path, weights: str) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, weights=weights)
    name = "pytorch_model.bin" if weights == "bin" else "model.safetensors"
    path = tmp_path / "0_WordEmbeddings" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cut off"):
        find_family(directory)


class _Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.proof,)


def test_a_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    directory, proof = write_word_vectors(str(tmp_path), VOCABULARY), tmp_path / "proof"
    (tmp_path / "0_WordEmbeddings" / "pytorch_model.bin").write_bytes(
        pickle.dumps({"emb_layer.weight": _Evil(proof)}, protocol=2)
    )
    with pytest.raises(CheckpointError, match="holds code"):
        _load(directory)
    assert not proof.exists()


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, weights="safetensors")
    vector = np.ones((5, 32), np.float32)
    for state in ({"embeddings.weight": vector}, {"emb_layer.weight": vector, "more": vector}):
        save_weights(str(tmp_path / "0_WordEmbeddings"), state)
        with pytest.raises(CheckpointError, match="weights hold"):
            _load(directory)


def test_a_pooling_of_another_width_than_the_words(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY)
    _edit(tmp_path / "1_Pooling" / "config.json", word_embedding_dimension=31)
    with pytest.raises(CheckpointError, match="31 wide, the word vectors 32"):
        _load(directory)
