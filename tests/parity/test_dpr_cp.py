"""DPR's own `.cp` files: the same vectors as the other layouts of the same weights, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import FAMILIES, describe, dpr_cp, find_family, kind_of
from pipelines.models import sentence_transformers as sentence
from pipelines.models.weights import read_native_file
from tests.checkpoints import write_dpr, write_sentence_transformer
from tests.checkpoints.dpr import cased_vocabulary, omegaconf, write_dpr_cp
from tests.parity.towers import QUESTIONS, TEXTS, TITLES, close, embed, rows

DIM = 64  # one head by BERT's rule; the twins' configs say so


def _oracle(directory: str, name: str, ids: list[list[int]]) -> Any:
    """Return the vectors of transformers' class on the Hugging Face copy of the weights, one text at a time."""
    import torch
    import transformers

    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        batches = [torch.tensor([row]) for row in ids]
        outputs = [model(input_ids=batch, token_type_ids=torch.zeros_like(batch)).pooler_output for batch in batches]
    return torch.cat(outputs).numpy()


def _vectors(family: Any, directory: str, side: Any, texts: list[str], **formatting: Any) -> Any:
    tokeniser = family.load_tokeniser(directory, **formatting)
    tokens = tokeniser.passages(TITLES, texts) if side == "passage" else tokeniser.queries(texts)
    options = {"similarity": "dot"} if formatting else {}
    return embed(family.load_tower(directory, side, "fp32", "cpu", **options), tokens, tokeniser.pad_id)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One pair of towers in every layout; the sentence-transformers copies hold one tower each."""
    root = tmp_path_factory.mktemp("three")
    st: dict[str, Any] = {"modes": ["cls_token"], "extras": [], "max_seq_length": 256}
    written = {
        "hf passage": write_dpr(str(root / "c"), "passage", DIM),
        "hf query": write_dpr(str(root / "q"), "query", DIM, seed=5),
        "2020": write_dpr_cp(str(root / "2020"), DIM, year=2020),
        "2021": write_dpr_cp(str(root / "2021"), DIM, year=2021),
        "2020, old torch": write_dpr_cp(str(root / "20"), DIM, year=2020, legacy=True),
        "2021, old torch": write_dpr_cp(str(root / "21"), DIM, year=2021, legacy=True),
        "st passage": write_sentence_transformer(str(root / "sc"), DIM, **st),
        "st query": write_sentence_transformer(str(root / "sq"), DIM, **st, seed=5),
    }
    for name in ("hf passage", "hf query", "st passage", "st query"):
        path = Path(written[name], "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 1}))
    return written


@pytest.mark.parametrize("layout", ["2020", "2021", "2020, old torch", "2021, old torch"])
def test_vectors_equal_transformers(three: dict[str, str], parity: Callable[..., None], layout: str) -> None:
    directory = three[layout]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family = find_family(directory)
        tokeniser = family.load_tokeniser(directory)
        assert family is dpr_cp
        for side, name, tokens in (
            ("passage", "DPRContextEncoder", tokeniser.passages(TITLES, TEXTS)),
            ("query", "DPRQuestionEncoder", tokeniser.queries(QUESTIONS)),
        ):
            ours = _vectors(family, directory, side, TEXTS if side == "passage" else QUESTIONS)
            theirs = _oracle(three[f"hf {side}"], name, rows(tokens))
            parity("DPR .cp", f"{layout}, {side}", f"transformers {name}", ours, theirs)


@pytest.mark.parametrize("side", ["passage", "query"])
def test_three_layouts_give_the_same_vectors(three: dict[str, str], parity: Callable[..., None], side: str) -> None:
    """Hugging Face, `.cp` and sentence-transformers; the last reads neither DPR's quotes nor its apostrophes apart."""
    texts = [text.strip().strip('"').replace("’", "'") for text in (TEXTS if side == "passage" else QUESTIONS)]
    native = _vectors(dpr_cp, three["2021"], side, texts)
    hugging = _vectors(import_module("pipelines.models.dpr"), three[f"hf {side}"], side, texts)
    st = _vectors(sentence, three[f"st {side}"], side, texts, formatting="title [SEP] text")
    parity("DPR", f"three layouts, {side}", "HF against .cp", hugging, native)
    parity("DPR", f"three layouts, {side}", "sentence-transformers against .cp", st, native)


def test_projection_and_a_config_beside_the_file(tmp_path: Path, parity: Callable[..., None]) -> None:
    """config.json overrides BERT's rule of 64 dimensions a head."""
    directory = write_dpr_cp(str(tmp_path / "cp"), 32, projection=20, heads=4)
    theirs = write_dpr(str(tmp_path / "hf"), "passage", 32, projection=20)
    tokens = dpr_cp.load_tokeniser(directory).passages(TITLES, TEXTS)
    ours = _vectors(dpr_cp, directory, "passage", TEXTS)
    assert describe(directory).dim == ours.shape[1] == 20
    oracle = _oracle(theirs, "DPRContextEncoder", rows(tokens))
    parity("DPR .cp", "projection, config.json", "transformers DPRContextEncoder", ours, oracle)
    Path(directory, "config.json").unlink()
    assert not close(_vectors(dpr_cp, directory, "passage", TEXTS), ours)


def test_options_come_from_the_file(tmp_path: Path) -> None:
    directory = write_dpr_cp(str(tmp_path), sequence_length=64, do_lower_case=False)
    assert describe(directory).max_length == 64
    assert describe(directory).details["trained_from"] == "bert-base-uncased"
    tokeniser = dpr_cp.load_tokeniser(directory)
    unknown = tokeniser.encoder.backend.token_to_id("[UNK]")
    assert rows(tokeniser.queries(["King"])) == [[2, unknown, 3]]
    assert tokeniser.queries(["war " * 99]).lengths.tolist() == [64]
    with pytest.raises(ConfigError, match="max_length"):
        dpr_cp.load_tokeniser(directory, 513)
    with pytest.raises(ConfigError, match="similarity"):
        dpr_cp.info(directory, similarity="cosine")


def test_fixed_tokens(three: dict[str, str]) -> None:
    tokeniser = dpr_cp.load_tokeniser(three["2021"])
    backend = tokeniser.encoder.backend
    tokens = tokeniser.passages([" Library ", ""], ['"The King"', "café"])
    names = [[backend.id_to_token(index) for index in row] for row in rows(tokens)]
    pair = ["[CLS]", "library", "[SEP]", "the", "king", "[SEP]"]
    assert names == [pair, ["[CLS]", "c", "##a", "##f", "##e", "[SEP]"]]
    assert tokens.type_ids is None


def test_the_tower_does_not_hang_on_the_file(tmp_path: Path) -> None:
    directory = write_dpr_cp(str(tmp_path))
    tokeniser = dpr_cp.load_tokeniser(directory)
    tower = dpr_cp.load_tower(directory, "query", "fp32", "cpu")
    tokens = tokeniser.queries(QUESTIONS)
    before = embed(tower, tokens, tokeniser.pad_id)
    path = tmp_path / "hf_bert_base.cp"
    with open(path, "r+b") as handle:
        handle.write(bytes(path.stat().st_size))
    assert close(embed(tower, tokens, tokeniser.pad_id), before, 0.0)
    assert close(embed(tower, tokens, tokeniser.pad_id, extra=90), before)
    assert (
        str(dpr_cp.load_tower(write_dpr_cp(str(tmp_path)), "query", "bf16", "cpu").backbone.dtype) == "torch.bfloat16"
    )


def test_at_most_one_family_recognises(three: dict[str, str], tmp_path: Path) -> None:
    reader = write_dpr_cp(str(tmp_path / "reader"), reader=True)
    both = shutil.copytree(three["hf query"], tmp_path / "both")
    shutil.copy(Path(three["2021"], "hf_bert_base.cp"), both)
    typed = write_dpr_cp(str(tmp_path / "typed"), 32, heads=4)
    config = json.loads(Path(typed, "config.json").read_text())
    Path(typed, "config.json").write_text(json.dumps(config | {"model_type": "dpr"}))
    families = {name: import_module(f"pipelines.models.{name}") for name in FAMILIES}
    expected = {three["2021"]: "dpr_cp", three["2020, old torch"]: "dpr_cp", reader: "dpr_reader", str(both): "dpr"}
    for directory, family in (expected | {typed: "dpr_cp", three["st query"]: "sentence_transformers"}).items():
        assert [name for name, module in families.items() if module.recognises(directory)] == [family]
    assert kind_of(reader) == ("dpr_reader", "reader")
    assert not dpr_cp.recognises(str(tmp_path))
    assert not dpr_cp.recognises(str(tmp_path / "lost"))
    assert not dpr_cp.recognises(str(Path(reader, "vocab.txt")))


# Refusals


class _Evil:
    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.proof,)


def _content(directory: str) -> dict[str, Any]:
    """Return the file's content, OmegaConf options left out."""
    import torch

    return {"model_dict": torch.load(Path(directory, "hf_bert_base.cp"), weights_only=False)["model_dict"]}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["optimizer_dict", "encoder_params", "model_dict"])
def test_code_is_refused_by_its_name(tmp_path: Path, legacy: bool, place: str) -> None:
    import torch

    directory, proof = write_dpr_cp(str(tmp_path / "model"), 64, year=2020), tmp_path / "proof"
    content = _content(directory) | {place: {"evil": _Evil(str(proof))}}
    path = Path(directory, "hf_bert_base.cp")
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert dpr_cp.recognises(directory)
    with pytest.raises(CheckpointError, match=r"holds code: \w+\.mkdir"):
        find_family(directory)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["builtins eval", "omegaconf.omegaconf OmegaConf", "typing get_type_hints"])
def test_only_known_names_have_stand_ins(tmp_path: Path, name: str) -> None:
    """A bare pickle that calls something by name, as a hostile file would."""
    path = tmp_path / "x.cp"
    path.write_bytes(b"\x80\x02c" + "\n".join(name.split()).encode() + b"\nX\x03\x00\x00\x001+1\x85R.")
    with pytest.raises(CheckpointError, match=f"holds code: .*{name.split()[1]}"):
        read_native_file(str(path))


def test_stand_ins_are_gone_afterwards_and_do_nothing(three: dict[str, str], tmp_path: Path) -> None:
    import torch

    read_native_file(str(Path(three["2021"], "hf_bert_base.cp")))
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
        torch.load(Path(three["2021"], "hf_bert_base.cp"), weights_only=True)
    with omegaconf() as make:
        torch.save(
            {"model_dict": {}, "encoder_params": make({"encoder": {"deep": [1, {"x": 2.5}]}})}, tmp_path / "x.cp"
        )
    assert read_native_file(str(tmp_path / "x.cp")).params == {"deep": [1, {"x": 2.5}]}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, legacy: bool, share: float) -> None:
    directory = write_dpr_cp(str(tmp_path), 64, legacy=legacy)
    path = tmp_path / "hf_bert_base.cp"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"weights file is damaged|\.cp file"):
        find_family(directory)


@pytest.mark.parametrize(
    "content",
    [[1], {}, {"model_dict": [1]}, {"model_dict": {"a": 1}}, {"model_dict": {}, "encoder_params": [1]}, "text"],
)
def test_what_is_no_dpr_checkpoint(tmp_path: Path, content: Any) -> None:
    import torch

    directory = write_dpr_cp(str(tmp_path), 64)
    torch.save(content, tmp_path / "hf_bert_base.cp")
    with pytest.raises(CheckpointError, match=r"\.cp file"):
        find_family(directory)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("ctx_model.", "no context encoder"),
        ("question_model.", "no question encoder"),
        ("ctx_model.encoder.layer.1.output.dense.bias", "lack encoder.layer.1.output.dense.bias"),
        ("ctx_model.embeddings.word_embeddings", r"lack embeddings\.word_embeddings"),
        ("ctx_model.embeddings.position_embeddings", r"lack embeddings\.position_embeddings"),
        ("ctx_model.encoder.layer.0.", "lack encoder.layer.0"),
        ("ctx_model.encode_proj.bias", "lack encode_proj.bias"),
    ],
)
def test_missing_tensors_are_refused(tmp_path: Path, lost: str, words: str) -> None:
    import torch

    directory = write_dpr_cp(str(tmp_path), 64, year=2020, projection=8)
    model = {name: tensor for name, tensor in _content(directory)["model_dict"].items() if not name.startswith(lost)}
    torch.save({"model_dict": model}, tmp_path / "hf_bert_base.cp")
    with pytest.raises(CheckpointError, match=words):
        dpr_cp.load_tower(directory, "passage" if "ctx" in lost else "query", "fp32", "cpu")
    if lost.endswith("_model."):
        with pytest.raises(CheckpointError, match=words):
            find_family(directory)


@pytest.mark.parametrize(
    "name", ["ctx_model.other.weight", "ctx_model.encode_proj.weight", "ctx_model.encoder.layer.0.x"]
)
def test_unexpected_tensors_are_refused(tmp_path: Path, name: str) -> None:
    import torch

    directory = write_dpr_cp(str(tmp_path), 64, year=2020)
    torch.save(
        {"model_dict": _content(directory)["model_dict"] | {name: torch.zeros(64, 64)}}, tmp_path / "hf_bert_base.cp"
    )
    with pytest.raises(CheckpointError, match=r"unexpected|lack encode_proj\.bias"):
        dpr_cp.load_tower(directory, "passage", "fp32", "cpu")


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    directory = write_dpr_cp(str(tmp_path), 64)
    shutil.copy(tmp_path / "hf_bert_base.cp", tmp_path / "other.cp")
    with pytest.raises(CheckpointError, match=r"2 \.cp files: hf_bert_base\.cp, other\.cp"):
        find_family(directory)
    (tmp_path / "other.cp").unlink()
    pieces = (tmp_path / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces, "more"]) + "\n")
    with pytest.raises(CheckpointError, match=r"the vocabulary has .* pieces, the model"):
        find_family(directory)
    (tmp_path / "vocab.txt").write_text("\n".join(cased_vocabulary()) + "\n")
    with pytest.raises(CheckpointError, match="the vocabulary is cased"):
        find_family(directory)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="no tokeniser") as caught:
        find_family(directory)
    assert "bert-base-uncased" in caught.value.hint


def test_other_encoders_and_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fairseq_roberta"):
        find_family(write_dpr_cp(str(tmp_path / "f"), 64, encoder_model_type="fairseq_roberta"))
    directory = write_dpr_cp(str(tmp_path / "h"), 64, heads=7)
    with pytest.raises(CheckpointError, match=r"do not fit|cannot be used"):
        dpr_cp.load_tower(directory, "query", "fp32", "cpu")
    Path(directory, "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        dpr_cp.load_tower(directory, "query", "fp32", "cpu")
    lfs = write_dpr_cp(str(tmp_path / "lfs"), 64)
    Path(lfs, "hf_bert_base.cp").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(CheckpointError, match="damaged"):
        find_family(lfs)


def test_numpy_numbers_stay_outside(three: dict[str, str]) -> None:
    """Schedules hold numpy scalars; they are read past, and only tensors and options remain."""
    native = read_native_file(str(Path(three["2021"], "hf_bert_base.cp")))
    assert {name.split(".")[0] for name in native.tensors} == {"ctx_model", "question_model"}
    assert not any("position_ids" in name for name in native.tensors)
    assert native.params["sequence_length"] == 256
    assert not any(isinstance(value, np.generic) for value in native.params.values())
