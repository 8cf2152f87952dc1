"""PAQ retrievers against AlbertModel and a Linear by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import CheckpointError
from pipelines.models import describe, find_family, paq
from tests.checkpoints import linear_state, save_weights, write_paq
from tests.parity.towers import QUESTIONS, TITLES, close, embed, rows


def _oracle(directory: str, prefix: str, ids: list[list[int]]) -> Any:
    """Return CLS, then the projection where there is one, without padding."""
    import torch
    from transformers import AlbertConfig, AlbertModel

    state = torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)
    state = {name: tensor.float() for name, tensor in state.items()}
    own = {name.removeprefix(prefix): t for name, t in state.items() if "encode_proj" not in name}
    del own["embeddings.position_ids"]
    model = AlbertModel(AlbertConfig.from_pretrained(directory)).eval()
    model.load_state_dict(own, strict=True)
    with torch.inference_mode():
        cls = torch.cat([model(torch.tensor([row])).last_hidden_state[:, 0] for row in ids])
    if "encode_proj.weight" not in state:
        return cls.numpy()
    return torch.nn.functional.linear(cls, state["encode_proj.weight"], state["encode_proj.bias"]).numpy()


@pytest.mark.parametrize("projection", [256, 728, 768, 0])
@pytest.mark.parametrize("prefix", ["albert.", ""])
def test_vectors_equal_the_oracle(tmp_path: Path, projection: int, prefix: str) -> None:
    directory = write_paq(str(tmp_path), projection, prefix=prefix)
    assert find_family(directory) is paq
    tokeniser, tower = paq.load_tokeniser(directory), paq.load_tower(directory, "query", "fp32", "cpu")
    tokens = tokeniser.queries(QUESTIONS)
    assert tower.dim == describe(directory).dim == (projection or 32)
    assert close(embed(tower, tokens, tokeniser.pad_id), _oracle(directory, prefix, rows(tokens)))
    assert close(embed(tower, tokens, tokeniser.pad_id, extra=50), embed(tower, tokens, tokeniser.pad_id))


def test_both_sides_are_the_question_alone(tmp_path: Path) -> None:
    directory = write_paq(str(tmp_path))
    tokeniser = paq.load_tokeniser(directory)
    assert rows(tokeniser.passages(TITLES[:4], QUESTIONS)) == rows(tokeniser.queries(QUESTIONS))


def test_fixed_tokens_from_spiece(tmp_path: Path) -> None:
    """Numbers split at the comma, as ALBERT's own tokeniser does, although "9," is a likely piece."""
    tokeniser = paq.load_tokeniser(write_paq(str(tmp_path)))
    (row,) = rows(tokeniser.queries(["  ??Who wrote 9,787?? "]))
    pieces = [tokeniser.encoder.backend.id_to_token(index) for index in row]
    assert pieces == ["[CLS]", "▁who", "▁wrote", "▁", "9", ",", "78", "7", "[SEP]"]


def test_tokens_equal_transformers_where_no_comma_follows_a_digit(tmp_path: Path) -> None:
    from transformers import AlbertTokenizer

    directory = write_paq(str(tmp_path))
    theirs = AlbertTokenizer.from_pretrained(directory)
    questions = ["who wrote, the book", "café in 78 rivers", "", "war " * 600]
    expected = theirs(questions, truncation=True, max_length=512)["input_ids"]
    assert rows(paq.load_tokeniser(directory).queries(questions)) == expected


@given(st.text(st.characters(exclude_characters="?")))
def test_outer_question_marks_and_case_do_not_matter(text: str) -> None:
    assert paq.normalise_question(f" ??{text}?? ") == text.lower().strip()


def test_half_a_projection_is_refused(tmp_path: Path) -> None:
    import torch

    directory = write_paq(str(tmp_path))
    path = tmp_path / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    del state["encode_proj.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="projection is incomplete"):
        find_family(directory)


@pytest.mark.parametrize(("head", "word"), [("classifier", "reranker"), ("predictions.dense", "language model")])
def test_other_alberts_are_refused(tmp_path: Path, head: str, word: str) -> None:
    import torch

    directory = write_paq(str(tmp_path))
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    save_weights(directory, arrays | linear_state(head, 1, 32), "bin")
    with pytest.raises(CheckpointError, match=word):
        find_family(directory)


def test_missing_tensor_is_refused(tmp_path: Path) -> None:
    import torch

    directory = write_paq(str(tmp_path))
    path = tmp_path / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    del state["albert.encoder.embedding_hidden_mapping_in.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="embedding_hidden_mapping_in"):
        paq.load_tower(directory, "passage", "fp32", "cpu")


def test_wrong_width_is_refused(tmp_path: Path) -> None:
    directory = write_paq(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match="do not fit"):
        paq.load_tower(directory, "passage", "fp32", "cpu")
