"""Recognise, digest and refuse checkpoint directories."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import CheckpointError
from pipelines.models import FAMILIES, checkpoint_digest, describe, find_family, find_model, kind_of, paq
from pipelines.models import sentence_transformers as sentence
from pipelines.models.files import native_files, relevant_names, weight_files
from tests.checkpoints import write_cross_encoder, write_dpr, write_paq, write_sentence_transformer


def test_the_directory_decides_and_not_its_name(tmp_path: Path) -> None:
    directory = write_paq(str(tmp_path / "dpr-ctx_encoder-sentence-transformers"))
    assert find_family(directory) is paq
    assert describe(write_dpr(str(tmp_path / "paq"), "query")).details["side"] == "query"


def test_describing_needs_no_torch(tmp_path: Path) -> None:
    """Configs, safetensors headers and a tokenizer.json are read without the heavy libraries."""
    directory = write_sentence_transformer(str(tmp_path))
    code = (
        "import sys; from pipelines.models import describe, find_family\n"
        f"find_family({directory!r}).load_tokeniser({directory!r}).queries(['king'])\n"
        f"print(describe({directory!r}).dim, [m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "32 []"


# Digest


def test_digest_follows_content_and_not_place(tmp_path: Path) -> None:
    first = write_sentence_transformer(str(tmp_path / "a"))
    shutil.copytree(first, tmp_path / "elsewhere" / "b")
    other = str(tmp_path / "elsewhere" / "b")
    digest = checkpoint_digest(first)
    assert checkpoint_digest(other) == digest
    for name in (
        "README.md",
        "onnx/model.onnx",
        "onnx/config.json",
        ".git/config",
        "openvino/x.bin",
        "data_config.json",
    ):
        path = Path(other) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("noise")
    assert checkpoint_digest(other) == digest
    assert checkpoint_digest(write_sentence_transformer(str(tmp_path / "c"), seed=1)) != digest


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json", "modules.json"])
def test_digest_sees_every_file_that_matters(tmp_path: Path, name: str) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    before = checkpoint_digest(directory)
    with open(tmp_path / name, "ab") as handle:
        handle.write(b" ")
    assert checkpoint_digest(directory) != before


def test_digest_ignores_weights_that_are_not_loaded() -> None:
    names = ["pytorch_model.bin", "model.safetensors", "2_Dense/pytorch_model.bin", "config.json"]
    assert relevant_names(names) == ["2_Dense/pytorch_model.bin", "config.json", "model.safetensors"]
    assert relevant_names(["pytorch_model.bin", "hf_bert_base.cp"]) == ["pytorch_model.bin"]
    assert relevant_names(["modules.json", "hf_bert_base.cp"]) == ["modules.json"]


def _write_weights(directory: Path, name: str, shard: str) -> None:
    is_index = name.endswith(".index.json")
    (directory / name).write_text(json.dumps({"weight_map": {"x": shard}}) if is_index else "x")


_FORMS = {"model.safetensors": "model-1.safetensors", "pytorch_model.bin": "pytorch_model-1.bin"}
_WEIGHTS = [name for whole, shard in _FORMS.items() for name in (whole, f"{whole}.index.json", shard)]
_OTHERS = ["adapter_model.safetensors", "adapter_model.bin", "hf_bert_base.cp", "training_args.bin"]


@pytest.mark.parametrize("present", range(1 << len(_WEIGHTS)))
def test_digest_sees_what_is_loaded_whatever_lies_beside_it(tmp_path: Path, present: int) -> None:
    """Every set of weight files, beside others: what is loaded counts; what is not does not, but for unknown shards."""
    names = [name for index, name in enumerate(_WEIGHTS) if present >> index & 1] + _OTHERS
    for name in names:
        _write_weights(tmp_path, name, _FORMS.get(name.removesuffix(".index.json"), ""))
    paths = [*weight_files(str(tmp_path)), *native_files(str(tmp_path))]
    loaded = {os.path.basename(path) for path in paths} & set(names)  # a shard may be missing
    counted = set(relevant_names(names))
    assert loaded <= counted
    if not any(name.endswith(".index.json") for name in counted):
        assert loaded == counted


@pytest.mark.parametrize("beside", ["adapter_model.safetensors", "open_clip.safetensors"])
def test_other_weights_under_the_same_adapter_have_another_digest(tmp_path: Path, beside: str) -> None:
    digests = set()
    for seed in range(2):
        directory = write_dpr(str(tmp_path), "query", seed=seed)
        (tmp_path / beside).write_text("x")
        digests.add(checkpoint_digest(directory))
    assert len(digests) == 2


@pytest.mark.parametrize("shard", ["model.dat", "pytorch_model.bin", ".hidden.safetensors", "training_args.bin"])
def test_shards_that_the_digest_leaves_out_are_refused(tmp_path: Path, shard: str) -> None:
    for name in ("model.safetensors.index.json", shard):
        _write_weights(tmp_path, name, shard)
    with pytest.raises(CheckpointError, match=f"digest leaves out {re.escape(shard)}") as caught:
        weight_files(str(tmp_path))
    assert "the format of model.safetensors" in caught.value.expected


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["x"]}'])
def test_an_index_that_names_nothing_is_refused(tmp_path: Path, content: str) -> None:
    """The format is chosen by names alone, so the older weights beside the index are not taken instead."""
    directory = write_dpr(str(tmp_path), "query")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json names no weight files"):
        find_family(directory)


def test_digest_sees_files_of_every_layout() -> None:
    """DPR's .cp, CLIP's old weights and vocabulary; not the optimizer, nor a .cp that a newer format replaces."""
    names = ["hf_bert_base.cp", "vocab.txt", "0_CLIPModel/CLIPModel.pt", "0_CLIPModel/bpe_simple_vocab_16e6.txt.gz"]
    assert relevant_names([*names, "optimizer.pt", "scheduler.pt", "x.txt.gz", "notes.md"]) == sorted(names)
    assert relevant_names(["model.safetensors", "hf_bert_base.cp", "CLIPModel.pt"]) == [
        "CLIPModel.pt",
        "model.safetensors",
    ]


def test_digest_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model files"):
        checkpoint_digest(str(tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint_digest(str(tmp_path / "lost"))


# Refusals


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "bert", "architectures": ["BertModel"]},
            r"a bert model \(BertModel\)(.|\n)*add modules\.json",
        ),
        ({"model_type": "gpt2"}, r"a gpt2 model \(no architecture named\)(.|\n)*add modules\.json"),
        (
            {"model_type": "albert", "architectures": ["AlbertForSequenceClassification"]},
            r"not an encoder(.|\n)*rerank",
        ),
        ({"model_type": "dpr", "architectures": ["DPRReader"]}, r"this is a reader \(dpr reader\)(.|\n)*it answers"),
    ],
)
def test_unknown_kinds_name_the_nearest_layout(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        find_family(str(tmp_path))
    assert "sentence-transformers directory" in caught.value.expected


def test_another_kind_is_refused_by_what_it_is(tmp_path: Path) -> None:
    directory = write_cross_encoder(str(tmp_path))
    with pytest.raises(CheckpointError, match="not an encoder") as caught:
        find_family(directory)
    assert "rerank" in caught.value.hint
    with pytest.raises(CheckpointError, match="not a reader") as caught:
        find_model(directory, "reader")
    assert "DPR reader" in caught.value.expected


def test_empty_and_absent_directories(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="empty"):
        find_family(str(tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):
        find_family(str(tmp_path / "lost"))
    assert kind_of(str(tmp_path)) is kind_of(str(tmp_path / "lost")) is None
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(CheckpointError, match=r"neither config\.json nor modules\.json"):
        find_family(str(tmp_path))
    with pytest.raises(CheckpointError, match="a file of no known kind"):
        find_family(str(tmp_path / "notes.md"))


@pytest.mark.parametrize("side", ["passage", "query", "reader"])
def test_one_family_recognises_each_checkpoint(tmp_path: Path, side: str) -> None:
    written = {
        "dpr_reader" if side == "reader" else "dpr": write_dpr(str(tmp_path / "dpr"), side),
        "paq": write_paq(str(tmp_path / "paq")),
        "cross_encoder": write_cross_encoder(str(tmp_path / "ce"), labels=1 if side == "reader" else 2),
        "sentence_transformers": write_sentence_transformer(str(tmp_path / "st")),
    }
    modules = {name: importlib.import_module(f"pipelines.models.{name}") for name in FAMILIES}
    for family, directory in written.items():
        assert [name for name, module in modules.items() if module.recognises(directory)] == [family]


@pytest.mark.parametrize("content", ["{", "[1]", '"text"'])
def test_damaged_json_is_refused(tmp_path: Path, content: str) -> None:
    directory = write_dpr(str(tmp_path), "query")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_family(directory)


def test_no_tokeniser(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query")
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="no tokeniser"):
        find_family(directory)


def test_damaged_tokeniser(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        sentence.load_tokeniser(directory)


class _Evil:
    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, old_format: bool) -> None:
    import torch

    directory, proof = write_paq(str(tmp_path / "model")), tmp_path / "proof"
    path = tmp_path / "model" / "pytorch_model.bin"
    if old_format:
        path.write_bytes(pickle.dumps({"albert.pooler.weight": _Evil(str(proof))}, protocol=2))
    else:
        torch.save({"albert.pooler.weight": _Evil(str(proof))}, path)
    with pytest.raises(CheckpointError, match=r"holds code: \w+\.mkdir"):
        find_family(directory)
    assert not proof.exists()


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_weights_are_refused(tmp_path: Path, weights: str, share: float) -> None:
    directory = write_dpr(str(tmp_path), "query", weights=weights)
    path = tmp_path / ("pytorch_model.bin" if weights == "bin" else "model.safetensors")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="weights"):
        find_family(directory)


def test_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query", weights="safetensors")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match="LFS"):
        find_family(directory)


def test_weights_that_are_no_state_dict(tmp_path: Path) -> None:
    import torch

    directory = write_dpr(str(tmp_path), "query")
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no state dict"):
        find_family(directory)


def test_sharded_weights(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from tests.parity.towers import close, passages

    directory = write_sentence_transformer(str(tmp_path))
    expected = passages(sentence, directory)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(state)}
    for file in set(shards.values()):
        save_file({name: array for name, array in state.items() if shards[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert close(passages(sentence, directory), expected)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        find_family(directory)
