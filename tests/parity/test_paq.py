"""PAQ retrievers against AlbertModel and a Linear by hand."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import describe, find_family, paq
from pipelines.models.tokens import load_backend
from tests.checkpoints import linear_state, save_weights, write_paq, write_spiece
from tests.parity.towers import QUESTIONS, TITLES, close, embed, rows


def _state(directory: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    path = Path(directory) / "model.safetensors"
    if path.is_file():
        return load_file(path)
    return torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)


def _oracle(directory: str, prefix: str, ids: list[list[int]]) -> Any:
    """Return CLS, then the projection where there is one, without padding."""
    import torch
    from transformers import AlbertConfig, AlbertModel

    state = {name: tensor.float() for name, tensor in _state(directory).items()}
    own = {name.removeprefix(prefix): t for name, t in state.items() if "encode_proj" not in name}
    del own["embeddings.position_ids"]
    model = AlbertModel(AlbertConfig.from_pretrained(directory)).eval()
    model.load_state_dict(own, strict=True)
    with torch.inference_mode():
        cls = torch.cat([model(torch.tensor([row])).last_hidden_state[:, 0] for row in ids])
    if "encode_proj.weight" not in state:
        return cls.numpy()
    return torch.nn.functional.linear(cls, state["encode_proj.weight"], state["encode_proj.bias"]).numpy()


# The released retrievers' shapes. hidden, heads, layers in the proportions of base, large and xlarge.
SHAPES = {
    "multi_base_256": (32, 4, 2, 256),
    "base, no projection": (32, 4, 2, 0),
    "base": (32, 4, 2, 768),
    "large": (48, 4, 3, 768),
    "xlarge": (64, 4, 3, 768),
    "the README's 728": (32, 4, 2, 728),
}


def _write(directory: Path, shape: str, **options: Any) -> str:
    dim, heads, layers, projection = SHAPES[shape]
    written = write_paq(str(directory), projection, dim, **options)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {"num_attention_heads": heads, "num_hidden_layers": layers}
    path.write_text(json.dumps(config))
    return written


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("prefix", "weights", "dtype"),
    [("albert.", "bin", "float32"), ("", "bin", "float16"), ("albert.", "safetensors", "float32")],
)
def test_vectors_equal_the_oracle(
    tmp_path: Path, parity: Callable[..., None], shape: str, prefix: str, weights: str, dtype: str
) -> None:
    directory = _write(tmp_path, shape, prefix=prefix, weights=weights, dtype=dtype)
    assert find_family(directory) is paq
    tokeniser, tower = paq.load_tokeniser(directory), paq.load_tower(directory, "query", "fp32", "cpu")
    tokens = tokeniser.queries([*QUESTIONS, "??", "king " * 600])
    assert tower.dim == describe(directory).dim == (SHAPES[shape][3] or 32)
    ours, theirs = embed(tower, tokens, tokeniser.pad_id), _oracle(directory, prefix, rows(tokens))
    layout = f"{shape}, {prefix or 'no prefix'}, .{weights} {dtype}"
    parity("PAQ retriever", layout, "AlbertModel + Linear by hand", ours, theirs)


def test_neither_padding_nor_batch_nor_order_matters(tmp_path: Path) -> None:
    directory = write_paq(str(tmp_path))
    tokeniser, tower = paq.load_tokeniser(directory), paq.load_tower(directory, "query", "fp32", "cpu")
    together = embed(tower, tokeniser.queries(QUESTIONS), tokeniser.pad_id)
    assert close(embed(tower, tokeniser.queries(QUESTIONS), tokeniser.pad_id, extra=50), together)
    assert close(embed(tower, tokeniser.queries(QUESTIONS[::-1]), tokeniser.pad_id)[::-1], together)
    for index, question in enumerate(QUESTIONS):
        assert close(embed(tower, tokeniser.queries([question]), tokeniser.pad_id)[0], together[index])


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


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("??", ["[CLS]", "[SEP]"]),
        ("", ["[CLS]", "[SEP]"]),
        ("?what? is it??", ["[CLS]", "▁what", "?", "▁is", "▁", "i", "t", "[SEP]"]),
        ("CAFÉ", ["[CLS]", "▁", "c", "a", "f", "e", "[SEP]"]),
        (unicodedata.normalize("NFD", "café"), ["[CLS]", "▁", "c", "a", "f", "e", "[SEP]"]),
        ("🏛", ["[CLS]", "▁", "<unk>", "[SEP]"]),
        ("king " * 800 + "9,787 " * 90_000, ["[CLS]", *["▁king"] * 510, "[SEP]"]),
    ],
    ids=["??", "empty", "inner ?", "upper case", "NFD", "emoji", "half a megabyte"],
)
def test_fixed_tokens_of_odd_questions(tmp_path: Path, question: str, expected: list[str]) -> None:
    tokeniser = paq.load_tokeniser(write_paq(str(tmp_path)))
    (row,) = rows(tokeniser.queries([question]))
    assert [tokeniser.encoder.backend.id_to_token(index) for index in row] == expected


def test_the_config_cannot_ask_for_another_similarity_or_formatting(tmp_path: Path) -> None:
    directory = write_paq(str(tmp_path))
    assert paq.info(directory, similarity="dot").similarity == "dot"
    with pytest.raises(ConfigError, match="scored by dot"):
        paq.info(directory, similarity="cosine")
    with pytest.raises(ConfigError, match="one input format"):
        paq.info(directory, formatting="pair")


def test_damaged_configs_and_other_places_are_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "file").write_text("albert")
    assert not any(paq.recognises(str(path)) for path in (tmp_path, tmp_path / "file", tmp_path / "absent"))


def test_tokens_equal_transformers_where_no_comma_follows_a_digit(tmp_path: Path) -> None:
    from transformers import AlbertTokenizer

    directory = write_paq(str(tmp_path))
    theirs = AlbertTokenizer.from_pretrained(directory)
    questions = ["who wrote, the book", "café in 78 rivers", "", "war " * 600]
    expected = theirs(questions, truncation=True, max_length=512)["input_ids"]
    assert rows(paq.load_tokeniser(directory).queries(questions)) == expected


def test_an_albert_with_a_vocabulary_of_bert(tmp_path: Path) -> None:
    """Chinese ALBERTs have one: nothing of it has a score, and a piece may be empty."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "king", "", "war"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "albert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_backend(str(tmp_path)).encode("king war").tokens == ["[CLS]", "king", "war", "[SEP]"]


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


PROBES = [
    "u.s.a. war",
    "a built-in book",
    "who (the king) wrote it",
    "3.5 books",
    'the "great" city',
    "in 1901–1902",
    "£5 or €6",
]


@pytest.mark.parametrize("text", PROBES)
def test_user_defined_pieces_are_no_word_boundaries(tmp_path: Path, parity: Any, text: str) -> None:
    """ALBERT's sentencepiece model has ( ) " - . – £ € as user-defined pieces; the oracle is sentencepiece itself."""
    import sentencepiece

    write_spiece(str(tmp_path), user_defined='()"-.–£€')
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert", "pad_token_id": 0}))
    backend = load_backend(str(tmp_path), "AlbertTokenizer")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    expected = processor.encode(text, out_type=str)
    ours = backend.encode(text).tokens
    parity("PAQ tokeniser", f"user-defined pieces: {text}", "sentencepiece", ours, ["[CLS]", *expected, "[SEP]"])
