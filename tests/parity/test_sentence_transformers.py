"""Our loader against sentence-transformers itself on the same directory."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import describe, find_family
from pipelines.models import sentence_transformers as family
from pipelines.models.fetch import MINILM, fetch
from tests.checkpoints import write_sentence_transformer
from tests.parity.towers import QUESTIONS, TEXTS, TITLES, close, embed, passages, rows

JOINED = [f"{t}. {x.strip()}" if t else x.strip() for t, x in zip(TITLES, TEXTS, strict=True)]


def _peer(directory: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(directory, device="cpu", local_files_only=True)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Parity = Callable[..., None]
ALL_MODES = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@pytest.mark.parametrize("layout", ["hub", "v0.2"])
@pytest.mark.parametrize(
    "options",
    [
        {"modes": ("mean_tokens",), "extras": ("Normalize",)},
        {"modes": ("cls_token",), "extras": ()},
        {"modes": ALL_MODES, "extras": ()},
        {"extras": ("Dense", "LayerNorm")},
        {"extras": ("Dense", "Normalize"), "dense": {"activation_function": "torch.nn.modules.linear.Identity"}},
        {"extras": ("Dense",), "dense": {"bias": False}, "weights": "bin", "do_lower_case": True},
    ],
)
def test_vectors_equal_sentence_transformers(
    tmp_path: Path, parity: Parity, layout: str, options: dict[str, Any]
) -> None:
    directory = write_sentence_transformer(str(tmp_path), layout=layout, **options)
    assert find_family(directory) is family
    expected = _peer(directory).encode(JOINED)
    vectors = passages(family, directory, similarity="dot")
    modules = ", ".join([*options.get("modes", ("mean_tokens",)), *options["extras"]])
    parity("sentence-transformers", f"BERT, {modules}, {layout}", "SentenceTransformer", vectors, expected)
    assert describe(directory) == family.info(directory)
    assert family.info(directory).dim == vectors.shape[1]
    norm = np.linalg.norm(expected, axis=1, keepdims=True)
    assert close(passages(family, directory), expected / norm)  # an old checkpoint names no similarity: cosine


def _other_backbone(directory: Path, name: str) -> str:
    """Put a tiny random backbone of another family into a sentence-transformers directory."""
    import torch
    import transformers

    write_sentence_transformer(str(directory))
    vocabulary = len((directory / "vocab.txt").read_text().splitlines())
    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32}
    if name == "DistilBert":
        small = {"n_layers": 2, "n_heads": 4, "hidden_dim": 64, "dim": 32}
    if name in ("Roberta", "XLMRoberta", "MPNet"):
        small |= {"max_position_embeddings": 66, "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **small)
    model = getattr(transformers, f"{name}Model")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    _edit(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    _edit(directory / "sentence_bert_config.json", max_seq_length=64)
    return str(directory)


@pytest.mark.parametrize("name", ["DistilBert", "Roberta", "XLMRoberta", "MPNet", "Electra"])
def test_other_backbones(tmp_path: Path, parity: Parity, name: str) -> None:
    directory = _other_backbone(tmp_path, name)
    expected = _peer(directory).encode(JOINED)
    parity("sentence-transformers", f"{name}, hub", "SentenceTransformer", passages(family, directory), expected)
    assert family.load_tokeniser(directory).passages(TITLES, TEXTS).lengths.max() == 64


def test_roberta_positions_bound_the_length(tmp_path: Path) -> None:
    directory = _other_backbone(tmp_path, "Roberta")
    with pytest.raises(ConfigError, match="max_length 66"):
        family.load_tokeniser(directory, max_length=66)
    assert family.load_tokeniser(directory, max_length=65).encoder.max_length == 65


def test_byte_level_tokeniser_equals_transformers(tmp_path: Path) -> None:
    """RoBERTa's vocab.json + merges.txt, with and without tokenizer.json; a leading space is stripped."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer

    directory = _other_backbone(tmp_path, "Roberta")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    trainer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(TEXTS * 3, vocab_size=300, special_tokens=special, show_progress=False)
    trainer.save_model(str(tmp_path))
    theirs = RobertaTokenizer.from_pretrained(directory)
    stripped = [text.strip() for text in QUESTIONS]
    expected = theirs(stripped, truncation=True, max_length=64)["input_ids"]
    assert rows(family.load_tokeniser(directory).queries(QUESTIONS)) == expected
    theirs.save_pretrained(directory)
    assert (tmp_path / "tokenizer.json").is_file()
    assert rows(family.load_tokeniser(directory).queries(QUESTIONS)) == expected


def test_new_layout_as_saved_today(tmp_path: Path, parity: Parity) -> None:
    old = write_sentence_transformer(str(tmp_path / "old"), modes=("max_tokens", "mean_tokens"), extras=("Dense",))
    peer = _peer(old)
    peer.save(str(tmp_path / "new"))
    expected = peer.encode(JOINED)
    vectors = passages(family, str(tmp_path / "new"), similarity="dot")
    parity("sentence-transformers", "BERT, max and mean, Dense, saved by 6.2", "SentenceTransformer", vectors, expected)
    assert family.info(str(tmp_path / "new")).details["pooling"] == "max, mean"


@pytest.mark.parametrize(("length", "words"), [(16, 14), (None, 510)])
def test_max_seq_length(tmp_path: Path, length: int | None, words: int) -> None:
    directory = write_sentence_transformer(str(tmp_path), max_seq_length=length)
    tokens = family.load_tokeniser(directory).queries(["war " * 600])
    assert tokens.lengths.tolist() == [words + 2]


def test_fixed_tokens(tmp_path: Path) -> None:
    tokeniser = family.load_tokeniser(write_sentence_transformer(str(tmp_path)))
    backend = tokeniser.encoder.backend
    tokens = tokeniser.passages(["Library", " "], ["  The king ", "king\n"])
    names = [[backend.id_to_token(index) for index in row] for row in rows(tokens)]
    assert names == [["[CLS]", "library", ".", "the", "king", "[SEP]"], ["[CLS]", "king", "[SEP]"]]
    assert tokens.type_ids is None


@pytest.mark.parametrize("layout", ["hub", "v0.2"])
@pytest.mark.parametrize("config", ["{}", '{"do_lower_case": false}'])
def test_cased_models_stay_cased(tmp_path: Path, layout: str, config: str) -> None:
    """transformers 5 lower-cases a cased model whose tokenizer_config.json is silent."""
    directory = write_sentence_transformer(str(tmp_path), cased=True, layout=layout)
    folder = tmp_path if layout == "hub" else tmp_path / "0_Transformer"
    (folder / "tokenizer_config.json").write_text(config)
    tokeniser = family.load_tokeniser(directory)
    (row,) = rows(tokeniser.queries(["Library"]))
    assert [tokeniser.encoder.backend.id_to_token(index) for index in row] == ["[CLS]", "Library", "[SEP]"]


def test_declared_lower_casing_wins_over_tokenizer_json(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path), cased=True)
    _edit(tmp_path / "tokenizer_config.json", do_lower_case=True)
    tokeniser = family.load_tokeniser(directory)
    assert rows(tokeniser.queries(["Library"])) == rows(tokeniser.queries(["library"]))


def test_prompts(tmp_path: Path) -> None:
    settings = {"prompts": {"query": "question: ", "passage": "passage: "}}
    directory = write_sentence_transformer(str(tmp_path), settings=settings)
    assert family.info(directory).prompts == {"query": "question: ", "passage": "passage: "}
    tokeniser, tower = family.load_tokeniser(directory), family.load_tower(directory, "query", "fp32", "cpu")
    peer = _peer(directory)
    stripped = [text.strip() for text in QUESTIONS]
    vectors = embed(tower, tokeniser.queries(QUESTIONS), tokeniser.pad_id)
    assert close(vectors, peer.encode(stripped, prompt_name="query"))
    assert close(passages(family, directory), peer.encode(JOINED, prompt_name="passage"))


def test_default_prompt_serves_the_side_without_its_own(tmp_path: Path) -> None:
    settings = {"prompts": {"document": "", "all": "text: "}, "default_prompt_name": "all"}
    directory = write_sentence_transformer(str(tmp_path), settings=settings)
    assert family.info(directory).prompts == {"query": "text: "}
    settings["default_prompt_name"] = "lost"
    with pytest.raises(CheckpointError, match="default prompt 'lost'"):
        describe(write_sentence_transformer(str(tmp_path), settings=settings))


def test_pairs(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path))
    tokeniser = family.load_tokeniser(directory, formatting="pair")
    tokens = tokeniser.passages(TITLES, TEXTS)
    bodies = [text.strip() for text in TEXTS]
    inputs = [[title, body] if title else body for title, body in zip(TITLES, bodies, strict=True)]
    tower, peer = family.load_tower(directory, "passage", "fp32", "cpu"), _peer(directory)
    expected = np.concatenate([peer.encode([text]) for text in inputs])
    assert tokens.type_ids is not None
    assert close(embed(tower, tokens, tokeniser.pad_id), expected)
    with pytest.raises(ConfigError, match="formatting"):
        family.load_tokeniser(directory, formatting="triple")  # type: ignore[arg-type]


@pytest.mark.parametrize("extras", [(), ("Normalize",), ("Dense",)])
def test_truncation_comes_before_normalisation(tmp_path: Path, parity: Parity, extras: tuple[str, ...]) -> None:
    """A Matryoshka checkpoint's truncate_dim, as encode(truncate_dim=..., normalize_embeddings=...) has it."""
    whole = _peer(write_sentence_transformer(str(tmp_path), extras=extras))
    settings = {"similarity_fn_name": "dot", "truncate_dim": 20}
    directory = write_sentence_transformer(str(tmp_path), extras=extras, settings=settings)
    assert (family.info(directory).similarity, family.info(directory).dim) == ("dot", 20)
    for similarity in ("dot", "cosine"):
        vectors = passages(family, directory, similarity=similarity)
        expected = whole.encode(JOINED, truncate_dim=20, normalize_embeddings=similarity == "cosine")
        name = ", ".join(["truncated", *extras, similarity])
        parity("sentence-transformers", name, "SentenceTransformer", vectors, expected)
    assert close(passages(family, directory), _peer(directory).encode(JOINED))  # "dot" is what this one declares
    assert np.abs(np.linalg.norm(passages(family, directory), axis=1) - 1).min() > 0.01


def test_a_truncation_beyond_the_width_changes_nothing(tmp_path: Path) -> None:
    directory = write_sentence_transformer(str(tmp_path), settings={"truncate_dim": 99})
    assert family.info(directory).dim == passages(family, directory).shape[1] == 32
    for wrong in (0, "7", 2.5):
        with pytest.raises(CheckpointError, match="truncate_dim"):
            family.info(write_sentence_transformer(str(tmp_path), settings={"truncate_dim": wrong}))


def test_similarity(tmp_path: Path) -> None:
    """A checkpoint older than 3.0 names none; one that ends in Normalize ranks the same by dot."""
    silent = write_sentence_transformer(str(tmp_path))
    assert family.info(silent).similarity == "cosine"
    assert family.info(silent, similarity="dot").similarity == "dot"
    assert close(passages(family, silent, similarity="dot"), passages(family, silent))
    dot = write_sentence_transformer(str(tmp_path), extras=(), settings={"similarity_fn_name": "dot"})
    assert family.info(dot).similarity == "dot"
    assert family.info(dot, similarity="cosine").similarity == "cosine"
    raw, unit = passages(family, dot), passages(family, dot, similarity="cosine")
    assert close(raw / np.linalg.norm(raw, axis=1, keepdims=True), unit)
    assert np.linalg.norm(raw, axis=1).min() > 1.5
    with pytest.raises(CheckpointError, match="manhattan"):
        family.info(write_sentence_transformer(str(tmp_path), settings={"similarity_fn_name": "manhattan"}))


@pytest.mark.parametrize("activation", [{}, {"activation_function": "torch.nn.modules.linear.Identity"}])
def test_a_dense_layer_without_a_named_activation_is_tanh(tmp_path: Path, activation: dict[str, str]) -> None:
    directory = write_sentence_transformer(str(tmp_path), extras=("Dense",))
    config = json.loads((tmp_path / "2_Dense" / "config.json").read_text())
    del config["activation_function"]
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(config | activation))
    expected = _peer(directory).encode(JOINED)
    assert close(passages(family, directory, similarity="dot"), expected)
    assert (np.abs(expected).max() > 1) == bool(activation)


def test_a_zero_vector_stays_zero() -> None:
    import torch

    from pipelines.models.tower import EncoderTower

    tower = EncoderTower(torch.nn.Identity(), 4, ["mean"], normalise=True)
    vectors = tower.head(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64))
    assert vectors.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("mode", ALL_MODES)
def test_padding_and_order_do_not_matter(tmp_path: Path, mode: str) -> None:
    directory = write_sentence_transformer(str(tmp_path), modes=(mode,))
    tokeniser, tower = family.load_tokeniser(directory), family.load_tower(directory, "query", "fp32", "cpu")
    vectors = embed(tower, tokeniser.queries(QUESTIONS), tokeniser.pad_id)
    assert close(embed(tower, tokeniser.queries(QUESTIONS), tokeniser.pad_id, extra=30), vectors)
    assert close(embed(tower, tokeniser.queries(QUESTIONS[::-1]), tokeniser.pad_id)[::-1], vectors)
    assert close(embed(tower, tokeniser.queries(QUESTIONS[:1]), tokeniser.pad_id)[0], vectors[0])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_stays_near(tmp_path: Path, dtype: str) -> None:
    directory = write_sentence_transformer(str(tmp_path), dtype="float16")
    tokens = family.load_tokeniser(directory).queries(QUESTIONS)
    full = embed(family.load_tower(directory, "query", "fp32", "cpu"), tokens, 0)
    tower = family.load_tower(directory, "query", dtype, "cpu")
    vectors = embed(tower, tokens, 0)
    assert vectors.dtype == np.float32
    assert (vectors * full).sum(axis=1).min() > 0.99
    assert np.abs(vectors - full).max() > 0


def test_real_minilm_equals_sentence_transformers() -> None:
    try:
        directory = fetch(MINILM)
    except CheckpointError as error:
        pytest.skip(f"MiniLM cannot be fetched: {error.what}")
    assert family.info(directory).dim == 384
    expected = _peer(directory).encode(JOINED)
    assert (passages(family, directory) * expected).sum(axis=1).min() >= 0.99999
