"""Every sentence-transformers model of the pretrained-models page, tiny, in each layout it was released in."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.models import describe, find_family
from pipelines.models import sentence_transformers as family
from pipelines.models.base import Tower
from tests.checkpoints import save_weights, write_dpr, write_sentence_transformer
from tests.checkpoints.sentence import MODELS, Model, random_model, write_model
from tests.checkpoints.tokenisers import sentencepiece_processor
from tests.parity.towers import TEXTS, TITLES, close, embed, rows

BY_NAME = {model.name: model for model in MODELS}
BARE = [text.strip().strip('"') for text in TEXTS]  # DPR's own reader drops outer quotation marks
Parity = Callable[..., None]


def peer(directory: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(directory, device="cpu", local_files_only=True, **options)


def inputs(model: Model) -> list[Any]:
    """Return the passages as the model's documentation writes them."""
    patterns = {
        "title. text": "{}. {}",
        "title [SEP] text": "{} [SEP] {}",
        "title[SEP]text": "{}[SEP]{}",
    }
    pairs = [(title.strip(), text.strip()) for title, text in zip(TITLES, TEXTS, strict=True)]
    if model.formatting == "pair":
        return [list(pair) if pair[0] else pair[1] for pair in pairs]
    return [patterns[model.formatting].format(*pair) if pair[0] else pair[1] for pair in pairs]


def oracle_copy(directory: str, model: Model, layout: str, elsewhere: Path) -> str:
    """Return a directory from which sentence-transformers computes what the released model does.

    It cannot import the legacy module names, lower-cases a cased model that does not say so, and keeps "9," whole in
    an ALBERT without tokenizer.json.
    """
    if model.backbone == "albert" or model.cased:
        return write_model(str(elsewhere), model, "hub")
    if layout != "legacy":
        return directory
    shutil.copytree(directory, elsewhere)
    modules = json.loads((elsewhere / "modules.json").read_text())
    modules[0]["type"] = "sentence_transformers.models.Transformer"
    (elsewhere / "modules.json").write_text(json.dumps(modules))
    return str(elsewhere)


def load(directory: str, model: Model) -> tuple[Any, Tower]:
    formatting: Any = model.formatting
    similarity: Any = model.similarity
    tower = family.load_tower(directory, "passage", "fp32", "cpu", similarity=similarity)
    return family.load_tokeniser(directory, formatting=formatting), tower


@pytest.mark.parametrize("layout", ["hub", "v0.2", "legacy"])
@pytest.mark.parametrize("name", list(BY_NAME))
def test_vectors(tmp_path: Path, parity: Parity, name: str, layout: str) -> None:
    model = BY_NAME[name]
    directory = write_model(str(tmp_path / "ours"), model, layout, silent=model.cased)
    assert find_family(directory) is family
    reference = peer(oracle_copy(directory, model, layout, tmp_path / "theirs"))
    normalise = model.similarity == "cosine"
    expected = np.stack([reference.encode([text], normalize_embeddings=normalise)[0] for text in inputs(model)])
    tokeniser, tower = load(directory, model)
    found = family.info(directory)
    assert describe(directory) == found
    assert (found.dim, found.max_length, tower.dim) == (model.dim, model.length, model.dim)
    vectors = embed(tower, tokeniser.passages(TITLES, TEXTS), tokeniser.pad_id)
    parity("sentence-transformers", f"{name}, {layout}", "SentenceTransformer", vectors, expected)
    padded = embed(tower, tokeniser.passages(TITLES, TEXTS), tokeniser.pad_id, extra=7)
    assert close(padded, vectors)


def test_labse_is_the_normalised_pooler(tmp_path: Path, parity: Parity) -> None:
    """The released Dense holds BERT's pooler: by hand, from the backbone's own pooler."""
    import torch

    model = BY_NAME["LaBSE"]
    directory = write_model(str(tmp_path), model)
    bert = random_model("bert", len((tmp_path / "vocab.txt").read_text().splitlines()))
    pooler = {f"linear.{name}": value.detach().numpy() for name, value in bert.pooler.dense.named_parameters()}
    save_weights(str(tmp_path / "2_Dense"), pooler)
    tokeniser, tower = load(directory, model)
    tokens = tokeniser.queries(["The library", "a scroll"])
    with torch.inference_mode():
        pooled = [bert(torch.tensor([row])).pooler_output[0] for row in rows(tokens)]
    expected = torch.nn.functional.normalize(torch.stack(pooled), dim=1).numpy()
    parity("sentence-transformers", "LaBSE, pooler", "BertModel, by hand", embed(tower, tokens, 0), expected)


def test_dpr_copies_equal_the_dpr_layout(tmp_path: Path, parity: Parity) -> None:
    """The facebook-dpr-* copies hold the context encoder's weights; their [SEP] is written into the text."""
    from pipelines.models import dpr

    original = write_dpr(str(tmp_path / "dpr"), "passage")
    modules: dict[str, Any] = {"modes": ("cls_token",), "extras": (), "max_seq_length": 256}
    copy = write_sentence_transformer(str(tmp_path / "copy"), layout="v0.2", weights="bin", **modules)
    tokeniser = family.load_tokeniser(copy, formatting="title [SEP] text")
    ours = embed(
        family.load_tower(copy, "passage", "fp32", "cpu", similarity="dot"), tokeniser.passages(TITLES, BARE), 0
    )
    tokens = dpr.load_tokeniser(original).passages(TITLES, BARE)
    theirs = embed(dpr.load_tower(original, "passage", "fp32", "cpu"), tokens, 0)
    parity("sentence-transformers", "facebook-dpr copy, v0.2", "our DPR loader, same weights", ours, theirs)


@pytest.mark.parametrize("name", ["stsb-mpnet-base-v2", "msmarco-roberta-base-ance-firstp", "quora-distilbert-base"])
def test_half_precision_copies(tmp_path: Path, parity: Parity, name: str) -> None:
    """An fp16 copy computes in fp32 when asked to."""
    import torch
    from safetensors.numpy import load_file

    model = BY_NAME[name]
    directory = write_model(str(tmp_path), model)
    save_weights(directory, load_file(tmp_path / "model.safetensors"), dtype="float16")
    tokeniser, tower = load(directory, model)
    vectors = embed(tower, tokeniser.passages(TITLES, TEXTS), tokeniser.pad_id)
    reference = peer(directory, model_kwargs={"dtype": torch.float32})
    expected = reference.encode(inputs(model), normalize_embeddings=model.similarity == "cosine")
    parity("sentence-transformers", f"{name}, fp16 copy", "SentenceTransformer", vectors, expected)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_old_prefixes_and_heads(tmp_path: Path, parity: Parity, weights: str) -> None:
    """Weights saved with their language-model head: "roberta." before each name, lm_head.*, no pooler."""
    from safetensors.numpy import load_file

    model = BY_NAME["paraphrase-distilroberta-base-v1"]
    directory = write_model(str(tmp_path), model)
    expected = peer(directory).encode(inputs(model), normalize_embeddings=True)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    old = {f"roberta.{name}": array for name, array in state.items() if not name.startswith("pooler.")}
    head = {"lm_head.dense.weight": np.ones((32, 32), np.float32), "lm_head.bias": np.ones(9, np.float32)}
    save_weights(directory, old | head, weights)
    tokeniser, tower = load(directory, model)
    vectors = embed(tower, tokeniser.passages(TITLES, TEXTS), tokeniser.pad_id)
    parity("sentence-transformers", f"roberta. prefix, {weights}", "SentenceTransformer", vectors, expected)


# Tokens


def ids(directory: str, text: str, **options: Any) -> list[int]:
    (row,) = rows(family.load_tokeniser(directory, **options).queries([text]))
    return row


@pytest.mark.parametrize("layout", ["hub", "v0.2"])
def test_roberta_tokens(tmp_path: Path, layout: str) -> None:
    directory = write_model(str(tmp_path), BY_NAME["nli-distilroberta-base-v2"], layout)
    tokeniser = family.load_tokeniser(directory)
    pieces = [tokeniser.encoder.backend.id_to_token(index) for index in ids(directory, " \u00a0The  library\n")]
    assert pieces == ["<s>", "The", "Ġ", "Ġlibrary", "</s>"]
    (title_only,) = rows(tokeniser.passages(["The"], [" "]))
    assert [tokeniser.encoder.backend.id_to_token(index) for index in title_only] == ["<s>", "The", ".", "</s>"]
    pair = family.load_tokeniser(directory, formatting="pair").passages(["The"], ["library"])
    names = [tokeniser.encoder.backend.id_to_token(index) for index in pair.ids]
    assert names[:4] == ["<s>", "The", "</s>", "</s>"]
    assert names[-1] == "</s>"
    assert pair.type_ids is None


@pytest.mark.parametrize("layout", ["hub", "v0.2"])
def test_roberta_separator(tmp_path: Path, layout: str) -> None:
    """A model that is no BERT has its own separator token."""
    directory = write_model(str(tmp_path), BY_NAME["msmarco-roberta-base-ance-firstp"], layout)
    tokeniser = family.load_tokeniser(directory, formatting="title[SEP]text")
    assert tokeniser.separator == "</s>"
    (row, alone) = rows(tokeniser.passages(["THE", " "], ["Library", "Library"]))
    names = [tokeniser.encoder.backend.id_to_token(index) for index in row]
    assert names[:3] == ["<s>", "the", "</s>"]
    assert row[3:] == alone[1:] == ids(directory, "library")[1:]


@pytest.mark.parametrize("layout", ["hub", "v0.2"])
def test_xlm_roberta_tokens_are_sentencepiece_shifted_by_one(tmp_path: Path, parity: Parity, layout: str) -> None:
    """By hand: fairseq puts <s> <pad> </s> <unk> at 0..3, so that piece i of the model is id i + 1."""
    directory = write_model(str(tmp_path), BY_NAME["paraphrase-xlm-r-multilingual-v1"], layout)
    folder = tmp_path if layout == "hub" else tmp_path / "0_Transformer"
    assert (folder / "sentencepiece.bpe.model").is_file()
    assert (folder / "tokenizer.json").is_file() == (layout == "hub")
    processor = sentencepiece_processor()
    texts = ["The  library of Alexandria", "Ａ king’s café", "cafe\u0301 naïve", "??", "図書館 xyz Ω", "9,787"]
    theirs = [[0, *(piece + 1 if piece else 3 for piece in processor.encode(text)), 2] for text in texts]
    ours = rows(family.load_tokeniser(directory).queries(texts))
    assert any(3 in row for row in theirs)
    mine, other = ([str(row) for row in some] for some in (ours, theirs))
    parity("sentence-transformers", f"XLM-R token ids, {layout}", "sentencepiece, by hand", mine, other)
    assert family.load_tokeniser(directory).pad_id == 1


@pytest.mark.parametrize("layout", ["hub", "v0.2"])
def test_mpnet_tokens(tmp_path: Path, layout: str) -> None:
    directory = write_model(str(tmp_path), BY_NAME["stsb-mpnet-base-v2"], layout)
    vocabulary = (tmp_path / ("" if layout == "hub" else "0_Transformer") / "vocab.txt").read_text().splitlines()
    assert [vocabulary[index] for index in ids(directory, " The Library ")] == ["<s>", "the", "library", "</s>"]
    pair = family.load_tokeniser(directory, formatting="pair").passages(["King"], ["war"])
    assert [vocabulary[index] for index in pair.ids] == ["<s>", "king", "</s>", "</s>", "war", "</s>"]
    assert family.load_tokeniser(directory).pad_id == 1


@pytest.mark.parametrize("layout", ["hub", "v0.2", "legacy"])
def test_albert_tokens_split_at_a_comma_after_a_digit(tmp_path: Path, layout: str) -> None:
    directory = write_model(str(tmp_path), BY_NAME["paraphrase-albert-small-v2"], layout)
    backend = family.load_tokeniser(directory).encoder.backend
    assert [backend.id_to_token(index) for index in ids(directory, "9,78")] == ["[CLS]", "▁", "9", ",", "78", "[SEP]"]


@pytest.mark.parametrize(
    ("formatting", "expected"),
    [
        ("title. text", ["[CLS]", "king", ".", "war", "[SEP]"]),
        ("title [SEP] text", ["[CLS]", "king", "[SEP]", "war", "[SEP]"]),
        ("title[SEP]text", ["[CLS]", "king", "[SEP]", "war", "[SEP]"]),
        ("pair", ["[CLS]", "king", "[SEP]", "war", "[SEP]"]),
        ("text", ["[CLS]", "war", "[SEP]"]),
    ],
)
@pytest.mark.parametrize("layout", ["hub", "v0.2"])
def test_formattings(tmp_path: Path, layout: str, formatting: Any, expected: list[str]) -> None:
    directory = write_model(str(tmp_path), BY_NAME["facebook-dpr-ctx_encoder"], layout)
    tokeniser = family.load_tokeniser(directory, formatting=formatting)
    tokens = tokeniser.passages([" King ", "", " "], [" war\n", " war\n", ""])
    names = [[tokeniser.encoder.backend.id_to_token(index) for index in row] for row in rows(tokens)]
    assert names == [expected, ["[CLS]", "war", "[SEP]"], ["[CLS]", "[SEP]"]]
    types = None if tokens.type_ids is None else tokens.type_ids[: len(expected)].tolist()
    assert types == ([0, 0, 0, 1, 1] if formatting == "pair" else None)
    line = family.info(directory, formatting=formatting).formatting
    lines = {family.info(directory, formatting=other).formatting for other in family._FORMATTINGS}
    assert line in lines
    assert len(lines) == 5


def test_a_separator_that_tokenizer_json_does_not_call_special(tmp_path: Path) -> None:
    directory = write_model(str(tmp_path), BY_NAME["allenai-specter"])
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": []}))
    settings = {"do_lower_case": True, "sep_token": {"content": "[SEP]", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokeniser = family.load_tokeniser(directory, formatting="title[SEP]text")
    (row,) = rows(tokeniser.passages(["King"], ["war"]))
    names = [tokeniser.encoder.backend.id_to_token(index) for index in row]
    assert names == ["[CLS]", "king", "[SEP]", "war", "[SEP]"]
