"""Every checkpoint is one family's, is described, and is refused where it does not belong or is damaged."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from pipelines.errors import CheckpointError
from pipelines.models import FAMILIES, describe, find_family, find_model, kind_of
from pipelines.models.released import find, rows
from tests.checkpoints import write_cross_encoder
from tests.checkpoints.zoo import ZOO, write_all


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_all(tmp_path_factory.mktemp("zoo"))


def recognisers(checkpoint: str) -> list[str]:
    return [name for name in FAMILIES if importlib.import_module(f"pipelines.models.{name}").recognises(checkpoint)]


@pytest.mark.parametrize("name", ZOO)
def test_exactly_one_family_recognises_a_checkpoint(zoo: dict[str, str], name: str) -> None:
    family, _ = ZOO[name]
    assert recognisers(zoo[name]) == [family]
    assert kind_of(zoo[name]) == (family, FAMILIES[family].kind)
    told = describe(zoo[name])
    assert (told.family, told.kind) == (family, FAMILIES[family].kind)
    json.dumps(asdict(told))  # what `pinakes inspect --json` prints


def test_every_family_is_in_the_zoo() -> None:
    assert {family for family, _ in ZOO.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_another_kind_is_refused_with_its_use(zoo: dict[str, str], name: str) -> None:
    kind = FAMILIES[ZOO[name][0]].kind
    with pytest.raises(CheckpointError) as caught:
        find_model(zoo[name], "reader") if kind == "encoder" else find_family(zoo[name])
    assert caught.value.hint
    assert caught.value.expected
    assert "not" in caught.value.what


@pytest.mark.parametrize("name", ["notes.txt", "weights.bin", "a.cp", "empty"])
def test_what_is_no_checkpoint_is_nobodys(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    else:
        path.write_bytes(b"\x80 not a model")
    assert recognisers(str(path)) == []
    with pytest.raises(CheckpointError):
        find_family(str(path))


def test_released_names_lead_to_families() -> None:
    assert {row.family for row in rows()} == set(FAMILIES) - {"dpr_cp"}
    names = [row.name for row in rows()]
    assert len(names) == len(set(names))
    tas_b = find("sentence-transformers/msmarco-distilbert-base-tas-b")
    assert tas_b is not None
    assert tas_b.similarity == "dot"
    for spelled in (
        "models/allenai-specter/",
        "/c/models--sentence-transformers--allenai-specter/snapshots/0f3c",
        "/c/sentence-transformers_allenai-specter",
        "/c/sbert.net_models_allenai-specter",
        "allenai-specter.zip",
    ):
        row = find(spelled)
        assert row is not None, spelled
        assert row.formatting == "title[SEP]text"
    assert find("somebody/else") is None


def test_the_way_shown_to_an_encoder_of_a_plain_transformer_works(tmp_path: Path) -> None:
    """The refusal of a directory without pooling says which two files to write; written, they load."""
    directory = tmp_path / "plain"
    write_cross_encoder(str(directory))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    state = {name: array for name, array in load_file(directory / "model.safetensors").items() if "classif" not in name}
    save_file(state, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        find_family(str(directory))
    modules, pooling = re.findall(r": ([\[{].*?[\]}])(?= and|$)", caught.value.hint)
    (directory / "modules.json").write_text(modules)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(pooling)
    family = find_family(str(directory))
    assert family.info(str(directory)).dim == config["hidden_size"]
    assert family.load_tower(str(directory), "query", "fp32", "cpu").dim == config["hidden_size"]


# Damage. Each way is tried on every layout it makes sense for; nothing loads, and the message says what and where.


def load(checkpoint: str, folder: str) -> Any:
    """Load the model (both towers of an encoder), as its user would."""
    found = kind_of(checkpoint)
    if found is None:
        return find_family(checkpoint)  # refuses
    name, kind = found
    if kind != "encoder":
        options = {"tokeniser": folder} if name == "fid" else {}
        return find_model(checkpoint, kind).load(checkpoint, "fp32", "cpu", **options)
    family = find_family(checkpoint)
    family.load_tokeniser(checkpoint)
    sides: Any = {"dpr": [family.info(checkpoint).details.get("side")], "paq_passages": ["query"]}
    return [family.load_tower(checkpoint, side, "fp32", "cpu") for side in sides.get(name, ["passage", "query"])]


def weights_of(directory: Path) -> Path:
    """Return the largest file that holds weights."""
    found = [p for p in directory.rglob("*") if p.suffix in (".bin", ".safetensors", ".cp", ".pt")]
    return max(found, key=lambda p: p.stat().st_size)


def cut(directory: Path) -> None:
    path = weights_of(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(directory: Path) -> None:
    weights_of(directory).write_bytes(b"")


def lfs_pointer(directory: Path) -> None:
    weights_of(directory).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def without_weights(directory: Path) -> None:
    weights_of(directory).unlink()


class _Evil:
    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.proof,)


def malicious(directory: Path) -> None:
    import torch

    path = weights_of(directory)
    evil = {"weight": torch.zeros(1), "evil": _Evil(str(directory / "proof"))}
    if path.suffix == ".safetensors":
        path.unlink()
        path = path.with_name("pytorch_model.bin")
    torch.save({"model_dict": evil, **evil} if path.suffix == ".cp" else evil, path)


def without_a_tensor(directory: Path) -> None:
    """Take out one weight of the first layer (or the word vectors)."""
    _edit(directory, lambda state: state.pop(_some_layer(state)))


def with_a_foreign_tensor(directory: Path) -> None:
    import torch

    _edit(directory, lambda state: state.update({"adapter.down.weight": torch.zeros(2, 2)}))


def with_a_wrong_shape(directory: Path) -> None:
    import torch

    _edit(directory, lambda state: state.update({_some_layer(state): torch.zeros(3, 3)}))


def _some_layer(state: dict[str, Any]) -> str:
    wanted = ("attention.self.query.weight", "attention.query.weight", "q_proj.weight", "in_proj_weight", ".q.weight")
    wanted += ("q_lin.weight", "emb_layer.weight")
    return next(name for end in wanted for name in sorted(state) if name.endswith(end))


def _edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    path = weights_of(directory)
    if path.suffix == ".safetensors":
        state = load_file(path)
        change(state)
        save_file(state, path)
        return
    content = torch.load(path, weights_only=False)  # the test's own file; a .cp holds more than tensors
    change(content["model_dict"] if path.suffix == ".cp" else content)
    torch.save(content, path)


def config_is_no_json(directory: Path) -> None:
    for path in directory.rglob("*config*.json"):
        path.write_text("{")
    for path in directory.rglob("modules.json"):
        path.write_text("{")


def another_class(directory: Path) -> None:
    """Say in config.json that this is a model which the weights are not."""
    path = next(p for p in sorted(directory.rglob("config.json")) if "model_type" in p.read_text())
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt2", "architectures": ["GPT2Model"]}))


def without_a_tokeniser(directory: Path) -> None:
    for pattern in ("vocab.*", "tokenizer.json", "spiece.model", "merges.txt", "bpe_simple*", "whitespacetokenizer*"):
        for path in directory.rglob(pattern):
            path.unlink()


WAYS: list[Callable[[Path], None]] = [
    *(cut, empty, lfs_pointer, without_weights, malicious, without_a_tensor, with_a_foreign_tensor),
    *(with_a_wrong_shape, config_is_no_json, another_class, without_a_tokeniser),
]
_NOT_FOR = {
    "spaCy": set(WAYS),  # no tensors of ours
    "DPR .cp": {config_is_no_json, another_class},  # has no config.json
    "DPR reader .cp": {config_is_no_json, another_class},
    "FiD": {without_a_tokeniser},  # comes without one
    "CLIP, OpenAI": {another_class},  # its config.json names no class
    "word embeddings": {another_class},
}
CASES = [
    pytest.param(name, way, id=f"{name}: {way.__name__}")
    for name in ZOO
    for way in WAYS
    if way not in _NOT_FOR.get(name, ())
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_bad_checkpoint_is_refused(
    zoo: dict[str, str], tmp_path: Path, name: str, way: Callable[[Path], None]
) -> None:
    from tests.checkpoints.fid import write_t5_tokeniser

    tokeniser = write_t5_tokeniser(str(tmp_path / "t5"))
    whole, damaged = shutil.copytree(zoo[name], tmp_path / "whole"), shutil.copytree(zoo[name], tmp_path / "damaged")
    assert load(str(whole), tokeniser) is not None
    way(damaged)
    with pytest.raises(CheckpointError) as caught:
        load(str(damaged), tokeniser)
    assert caught.value.what
    assert str(tmp_path) in caught.value.where
    assert not (damaged / "proof").exists()
