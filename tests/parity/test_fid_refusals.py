"""What is recognised as a FiD reader, and what is refused and why."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import FAMILIES, fid, find_family, find_model
from tests.checkpoints import State, save_weights, write_bert_tokeniser, write_dpr
from tests.checkpoints.fid import T5_PIECES, t5_config, t5_state, wrap, write_fid, write_t5_tokeniser


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_t5_tokeniser(str(tmp_path_factory.mktemp("t5")))


# What is recognised


def test_only_one_family_recognises_a_reader(tmp_path: Path) -> None:
    for layout in (True, False):
        directory = write_fid(str(tmp_path / str(layout)), wrapped=layout)
        there = [name for name in FAMILIES if importlib.util.find_spec(f"pipelines.models.{name}")]
        modules = {name: importlib.import_module(f"pipelines.models.{name}") for name in there}
        assert [name for name, module in modules.items() if module.recognises(directory)] == ["fid"]


def test_other_directories_and_files_are_not_recognised(tmp_path: Path) -> None:
    def changed(name: str, config: str, **files: str) -> str:
        directory = write_fid(str(tmp_path / name))
        Path(directory, "config.json").write_text(config)
        for file, text in files.items():
            Path(directory, f"{file}.json").write_text(text)
        return directory

    t5 = json.dumps(t5_config())
    (tmp_path / "reader.cp").write_bytes(b"\x80\x02")
    others = [
        write_dpr(str(tmp_path / "dpr"), "reader"),
        str(tmp_path / "reader.cp"),
        str(tmp_path / "absent"),
        changed("damaged", "{"),
        changed("list", "[]"),
        changed("mt5", json.dumps(t5_config(model_type="mt5"))),
        changed("encoder", json.dumps(t5_config(architectures=["T5EncoderModel"]))),
        changed("classifier", json.dumps(t5_config(architectures=["T5ForSequenceClassification"]))),
        changed("sentence", t5, modules="[]"),
    ]
    assert [fid.recognises(other) for other in others] == [False] * len(others)
    assert fid.recognises(changed("silent", json.dumps(t5_config(architectures=None))))


def test_a_reader_is_not_used_to_embed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="reader"):
        find_family(write_fid(str(tmp_path)))


def test_describing_takes_no_torch(tmp_path: Path) -> None:
    directory = write_fid(str(tmp_path), weights="safetensors")
    code = (
        "import sys; from pipelines.models import fid; "
        f"assert fid.recognises({directory!r}); fid.info({directory!r}); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is refused


def _without(state: State, *names: str) -> State:
    assert set(names) <= set(state)
    return {name: array for name, array in state.items() if name not in names}


def _bad_weights(case: str) -> tuple[State, str]:
    """Return weights that are wrong in one way, and what the refusal must name."""
    config = t5_config()
    plain = t5_state(config)
    state = wrap(plain, config)
    block = "encoder.encoder.block.1.module.layer.0.SelfAttention.q.weight"
    cases: dict[str, tuple[State, str]] = {
        "a tensor is missing": (_without(state, block), "lack encoder.block.1.layer.0.SelfAttention.q.weight"),
        "a norm is missing": (_without(state, "decoder.final_layer_norm.weight"), "lack decoder.final_layer_norm"),
        "a tensor too many": (state | {"decoder.extra.weight": state[block]}, "unexpected decoder.extra"),
        "no embedding": (
            {name: array for name, array in state.items() if "embed" not in name and name not in _TIED},
            "lack shared.weight",
        ),
        "another shape": (state | {block: state[block][:, :8]}, "do not fit"),
        "no decoder": ({n: a for n, a in state.items() if not n.startswith("decoder.")}, "no T5 decoder"),
        "no encoder": ({n: a for n, a in state.items() if not n.startswith("encoder.")}, "no T5 encoder"),
        "two layouts": (state | plain, "mix"),
        "an output layer apart": (state | {"lm_head.weight": state["shared.weight"] + 1}, "lm_head.weight differ"),
        "two embeddings": (
            state | {"decoder.embed_tokens.weight": state["shared.weight"] + 1},
            "decoder.embed_tokens.weight differ",
        ),
    }
    return cases[case]


_TIED = ("shared.weight", "lm_head.weight")


@pytest.mark.parametrize(
    "case",
    [
        "a tensor is missing",
        "a norm is missing",
        "a tensor too many",
        "no embedding",
        "another shape",
        "no decoder",
        "no encoder",
        "two layouts",
        "an output layer apart",
        "two embeddings",
    ],
)
def test_bad_weights_are_refused(tmp_path: Path, t5: str, case: str) -> None:
    directory = write_fid(str(tmp_path))
    state, message = _bad_weights(case)
    save_weights(directory, state, "bin")
    with pytest.raises(CheckpointError, match=message):
        fid.load(directory, tokeniser=t5)


def test_an_untied_model_without_output_layer_is_refused(tmp_path: Path, t5: str) -> None:
    config = t5_config(tie_word_embeddings=False)
    state = _without(t5_state(config, tied=False), "lm_head.weight")
    directory = write_fid(str(tmp_path), config=config, state=state)
    with pytest.raises(CheckpointError, match=r"lack lm_head\.weight"):
        fid.load(directory, tokeniser=t5)


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("attacked",))


def test_code_in_the_weights_is_refused(tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    directory = write_fid(str(tmp_path / "fid"))
    torch.save({"encoder.encoder.block.0": _Attack()}, Path(directory, "pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="damaged or holds code"):
        fid.load(directory, tokeniser=t5)
    assert not Path("attacked").exists()


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_cut_off_weights_are_refused(tmp_path: Path, t5: str, weights: str) -> None:
    directory = write_fid(str(tmp_path), weights=weights)
    (path,) = (path for path in tmp_path.iterdir() if path.name in ("pytorch_model.bin", "model.safetensors"))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"cut off|damaged"):
        fid.load(directory, tokeniser=t5)


def test_absent_weights_are_refused(tmp_path: Path) -> None:
    directory = write_fid(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        find_model(directory, "reader")
    index = {"weight_map": {"shared.weight": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="shards are missing: pytorch_model-00001"):
        find_model(directory, "reader")


def test_no_tokeniser_is_refused_with_the_key_to_set(tmp_path: Path) -> None:
    directory = write_fid(str(tmp_path))
    for tokeniser in (None, str(tmp_path / "absent")):
        with pytest.raises(CheckpointError, match=r"set answer\.tokeniser"):
            fid.load(directory, tokeniser=tokeniser)


def test_another_models_tokeniser_is_refused(tmp_path: Path, t5: str) -> None:
    directory = write_fid(str(tmp_path / "fid"))
    write_bert_tokeniser(str(tmp_path / "bert"))
    with pytest.raises(CheckpointError, match="no </s> with id 1"):
        fid.load(directory, tokeniser=str(tmp_path / "bert"))
    config = t5_config(vocab_size=150)
    small = write_fid(str(tmp_path / "small"), config=config, state=t5_state(config))
    with pytest.raises(CheckpointError, match=f"{T5_PIECES + 100} pieces, the model 150"):
        fid.load(small, tokeniser=t5)


def test_what_cannot_be_meant_is_refused(tmp_path: Path, t5: str) -> None:
    directory = write_fid(str(tmp_path))
    wrong: list[dict[str, Any]] = [{"dtype": "fp16"}, {"dtype": "int8"}, {"answer_length": 1}, {"max_length": 4}]
    for options in wrong:
        with pytest.raises(ConfigError):
            fid.load(directory, tokeniser=t5, **options)
