"""PAQ's DPR passage retriever against BertModel by hand."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import FAMILIES, describe, find_family, kind_of, paq_passages
from tests.checkpoints import bert_state, linear_state, save_weights, write_cross_encoder
from tests.checkpoints.fid import write_paq_passages
from tests.parity.towers import QUESTIONS, close, embed, rows

_NAME = "PAQ passage retriever"


def _oracle(directory: str, questions: list[str], prefix: str = "") -> Any:
    """Return the CLS vectors of the normalised questions, one at a time."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    state = torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)
    own = {name.removeprefix(prefix): tensor.float() for name, tensor in state.items()}
    del own["embeddings.position_ids"]
    model = BertModel(BertConfig.from_pretrained(directory)).eval()
    model.load_state_dict(own, strict=True)
    tokeniser = BertTokenizer.from_pretrained(directory)
    asked = [question.strip().strip("?").lower().strip() for question in questions]
    with torch.inference_mode():
        inputs = [tokeniser(text, truncation=True, max_length=512, return_tensors="pt") for text in asked]
        return torch.cat([model(**one).last_hidden_state[:, 0] for one in inputs]).numpy()


@pytest.mark.parametrize(("prefix", "dtype"), [("", "float32"), ("bert.", "float32"), ("", "float16")])
def test_vectors_equal_the_oracle(tmp_path: Path, parity: Any, prefix: str, dtype: str) -> None:
    directory = write_paq_passages(str(tmp_path), prefix=prefix, dtype=dtype)
    assert find_family(directory) is paq_passages
    tokeniser = paq_passages.load_tokeniser(directory)
    tower = paq_passages.load_tower(directory, "query", "fp32", "cpu")
    questions = [*QUESTIONS, "??", "cafe\u0301 🙂 Who?", "war " * 700, "who", "Who??"]
    tokens = tokeniser.queries(questions)
    ours = embed(tower, tokens, tokeniser.pad_id)
    assert tower.dim == describe(directory).dim == 32
    parity(_NAME, f"{prefix or 'no prefix,'} {dtype}", "BertModel, CLS", ours, _oracle(directory, questions, prefix))
    assert close(embed(tower, tokeniser.queries(questions[:4]), tokeniser.pad_id, extra=7), ours[:4])
    assert close(ours[-1], ours[-2])


def test_safetensors_give_the_same_vectors(tmp_path: Path) -> None:
    """The released .bin and a converted copy of it."""
    found = []
    for weights in ("bin", "safetensors"):
        directory = write_paq_passages(str(tmp_path / weights), weights=weights)
        tokeniser = paq_passages.load_tokeniser(directory)
        tower = paq_passages.load_tower(directory, "query", "fp32", "cpu")
        found.append(embed(tower, tokeniser.queries(QUESTIONS), tokeniser.pad_id))
    assert close(*found, tolerance=0.0)


def test_fixed_tokens_are_lower_case_without_question_marks(tmp_path: Path) -> None:
    tokeniser = paq_passages.load_tokeniser(write_paq_passages(str(tmp_path)))
    (row,) = rows(tokeniser.queries(["  ??Who wrote 9,787?? "]))
    pieces = [tokeniser.encoder.backend.id_to_token(index) for index in row]
    assert pieces == ["[CLS]", "who", "wrote", "9", ",", "7", "##8", "##7", "[SEP]"]
    assert rows(tokeniser.queries(["??", ""]))[0] == rows(tokeniser.queries([""]))[0]
    assert len(rows(tokeniser.queries(["war " * 700]))[0]) == 512


def test_passages_are_refused(tmp_path: Path) -> None:
    directory = write_paq_passages(str(tmp_path))
    with pytest.raises(ConfigError, match="questions, not passages"):
        paq_passages.load_tokeniser(directory).passages(["t"], ["text"])
    with pytest.raises(CheckpointError, match="no passage encoder"):
        paq_passages.load_tower(directory, "passage", "fp32", "cpu")


def test_what_it_is(tmp_path: Path) -> None:
    directory = write_paq_passages(str(tmp_path))
    described = paq_passages.info(directory)
    assert (described.family, described.similarity, described.max_length) == ("paq_passages", "dot", 512)
    assert described.details["indexes"] == ["dpr_index.hnsw.SQ8.index.dpr"]
    with pytest.raises(ConfigError, match="scored by dot"):
        paq_passages.info(directory, similarity="cosine")
    with pytest.raises(ConfigError, match="one input format"):
        paq_passages.info(directory, formatting="pair")


def test_only_this_family_recognises_it(tmp_path: Path) -> None:
    directory = write_paq_passages(str(tmp_path))
    there = [name for name in FAMILIES if importlib.util.find_spec(f"pipelines.models.{name}")]
    modules = {name: importlib.import_module(f"pipelines.models.{name}") for name in there}
    assert [name for name, module in modules.items() if module.recognises(directory)] == ["paq_passages"]


def test_an_ordinary_bert_stays_unrecognised(tmp_path: Path) -> None:
    directory = write_paq_passages(str(tmp_path), index=False)
    assert kind_of(directory) is None
    with pytest.raises(CheckpointError, match="not supported"):
        find_family(directory)


def test_other_directories_and_files_are_not_recognised(tmp_path: Path) -> None:
    source = write_paq_passages(str(tmp_path / "source"))
    index = Path(source, "dpr_index.hnsw.SQ8.index.dpr")
    state = bert_state(json.loads(Path(source, "config.json").read_text())["vocab_size"], 32)

    def copy(name: str, **files: str) -> str:
        shutil.copytree(source, tmp_path / name)
        for file, text in files.items():
            (tmp_path / name / f"{file}.json").write_text(text)
        return str(tmp_path / name)

    spans = copy("spans")
    save_weights(spans, state | linear_state("start_outputs", 4, 32), "bin")
    reranker = write_cross_encoder(str(tmp_path / "reranker"))
    shutil.copy(index, reranker)
    others = [
        spans,
        reranker,
        str(index),
        str(tmp_path / "absent"),
        copy("modules", modules="[]"),
        copy("damaged", config="{"),
        copy("albert", config='{"model_type": "albert"}'),
        copy("empty", config="{}"),
        copy("classifier", config='{"model_type": "bert", "architectures": ["BertForSequenceClassification"]}'),
    ]
    assert [paq_passages.recognises(other) for other in others] == [False] * len(others)
    assert paq_passages.recognises(source)


# What is refused


def test_missing_and_unexpected_tensors_are_refused(tmp_path: Path) -> None:
    directory = write_paq_passages(str(tmp_path))
    state = bert_state(json.loads((tmp_path / "config.json").read_text())["vocab_size"], 32)
    query = "encoder.layer.1.attention.self.query.weight"
    changed = {
        "lack encoder.layer.1.attention": {name: array for name, array in state.items() if name != query},
        "lack embeddings.word_embeddings": {n: a for n, a in state.items() if "word_embeddings" not in n},
        "unexpected encoder.layer.7": state | {"encoder.layer.7.output.dense.weight": state[query]},
        "do not fit": state | {query: state[query][:, :8]},
    }
    for message, weights in changed.items():
        save_weights(directory, weights, "bin")
        with pytest.raises(CheckpointError, match=message):
            paq_passages.load_tower(directory, "query", "fp32", "cpu")


class _Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("attacked",))


def test_code_in_the_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    directory = write_paq_passages(str(tmp_path / "model"))
    torch.save({"embeddings": _Attack()}, Path(directory, "pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="damaged or holds code"):
        find_family(directory)
    assert not Path("attacked").exists()


def test_the_pickle_beside_the_index_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    directory = write_paq_passages(str(tmp_path / "model"))
    Path(directory, "dpr_index.hnsw.SQ8.index_meta.dpr").write_bytes(pickle.dumps(_Attack()))
    assert find_family(directory) is paq_passages
    paq_passages.load_tower(directory, "query", "fp32", "cpu")
    assert not Path("attacked").exists()


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_damaged_or_absent_weights_are_refused(tmp_path: Path, weights: str) -> None:
    directory = write_paq_passages(str(tmp_path), weights=weights)
    (path,) = (path for path in tmp_path.iterdir() if path.name in ("pytorch_model.bin", "model.safetensors"))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"cut off|damaged"):
        find_family(directory)
    path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        find_family(directory)


def test_no_tokeniser_is_refused(tmp_path: Path) -> None:
    directory = write_paq_passages(str(tmp_path))
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match="no tokeniser"):
        find_family(directory)
