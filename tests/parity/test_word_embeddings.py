"""Averages of word vectors against sentence-transformers on the same directory, and by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import ConfigError
from pipelines.models import describe, find_family
from pipelines.models import sentence_transformers as sentence
from pipelines.models import word_embeddings as family
from pipelines.models.tokens import micro_batches, pad
from tests.checkpoints import write_sentence_transformer
from tests.checkpoints.words import write_word_vectors
from tests.parity.towers import close, embed, rows

VOCABULARY = [
    "PADDING_TOKEN",
    "Paris",
    "paris",
    "king",
    "war",
    "'s",
    "don't",
    "U.S.",
    "café",
    "Ω",
    "great",
    "IT",
    "the",
]
STOP_WORDS = ["the", "a", "it", "--"]
TEXTS = [
    "King Paris, war! (the) great war.",
    "nothing known here",
    "",
    "  Paris PARIS 'king' don't U.S. 's IT  It it --  ---  café cafe\u0301 Ω ?? ",
    "war " * 2500,
]
Parity = Callable[..., None]


def peer(directory: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(directory, device="cpu", local_files_only=True)


def vectors(directory: str, texts: list[str], **options: Any) -> Any:
    tokeniser = family.load_tokeniser(directory)
    tower = family.load_tower(directory, "query", "fp32", "cpu", **options)
    return embed(tower, tokeniser.queries(texts), tokeniser.pad_id)


WEIGHTED = {"Paris": 2.0, "war": 0.25, "u.s.": 3.0, "elsewhere": 9.0}


@pytest.mark.parametrize("layout", ["v0.2", "new"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop_words": STOP_WORDS, "weights": "safetensors"},
        {"stop_words": STOP_WORDS, "lower_case": True},
        {"word_weights": WEIGHTED, "unknown_weight": 0.5},
        {"word_weights": WEIGHTED, "modes": ("mean_tokens", "mean_sqrt_len_tokens")},
        {"extras": ("Dense", "Normalize"), "length": 3},
        {"extras": ("LayerNorm",)},
    ],
    ids=str,
)
def test_vectors_equal_sentence_transformers(
    tmp_path: Path, parity: Parity, layout: str, options: dict[str, Any]
) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, layout=layout, **options)
    assert find_family(directory) is family
    assert not sentence.recognises(directory)
    expected = peer(directory).encode(TEXTS)
    ours = vectors(directory, TEXTS, similarity="dot")
    name = ", ".join([layout, *options])
    parity("word embeddings", name, "SentenceTransformer", ours, expected)
    assert family.info(directory).dim == expected.shape[1]
    assert describe(directory) == family.info(directory)


def test_the_largest_component_of_the_words(tmp_path: Path, parity: Parity) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, modes=("max_tokens",), word_weights=WEIGHTED)
    known = [TEXTS[0], *TEXTS[3:]]
    expected = peer(directory).encode(known)
    parity(
        "word embeddings", "max pooling", "SentenceTransformer", vectors(directory, known, similarity="dot"), expected
    )
    assert not vectors(directory, TEXTS[1:3]).any()  # where sentence-transformers gives minus infinity


def test_by_hand(tmp_path: Path, parity: Parity) -> None:
    """The mean of the words' rows; a stop word and an unknown word count for nothing."""
    import torch

    directory = write_word_vectors(str(tmp_path), VOCABULARY, stop_words=STOP_WORDS)
    table = torch.load(tmp_path / "0_WordEmbeddings" / "pytorch_model.bin", weights_only=True)["emb_layer.weight"]
    expected = table[[3, 1, 4, 10, 4]].mean(dim=0).numpy()
    ours = vectors(directory, TEXTS[:1], similarity="dot")[0]
    parity("word embeddings", "v0.2, one text", "mean of rows, by hand", ours, expected)
    assert close(vectors(directory, TEXTS[:1])[0], expected / np.linalg.norm(expected))


def test_fixed_tokens(tmp_path: Path) -> None:
    """As it is, then bare of outer punctuation, then in lower case; a stop word ends the search at each step."""
    directory = write_word_vectors(str(tmp_path), VOCABULARY, stop_words=STOP_WORDS)
    tokeniser = family.load_tokeniser(directory)
    words = {
        "Paris": [1],
        "PARIS": [2],
        "(Paris),": [1],
        "'s": [5],
        "don't": [6],
        "U.S.": [7],
        "U.S": [],
        "IT": [11],
        "It": [],
        "it": [],
        "the.": [],
        "THE": [],
        "--": [],
        "---": [],
        "??": [],
        "café": [8],
        "CAFÉ": [8],
        "cafe\u0301": [],
        "Ω": [9],
        "king\u00a0war\u3000king\x1cwar": [3, 4, 3, 4],
        "king-war": [],
    }
    assert dict(zip(words, rows(tokeniser.queries(list(words))), strict=True)) == words
    assert tokeniser.queries(list(words)).type_ids is None


def test_formattings(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY)
    joined = family.load_tokeniser(directory).passages([" Paris ", "", "nothing"], ["king", "king", "king"])
    assert rows(joined) == [[1, 3], [3], [3]]
    alone = family.load_tokeniser(directory, formatting="text").passages(["Paris"], ["king"])
    assert rows(alone) == [[3]]
    assert family.info(directory, formatting="text").formatting != family.info(directory).formatting
    for function in (family.info, family.load_tokeniser):
        with pytest.raises(ConfigError, match="no formatting 'pair'"):
            function(directory, formatting="pair")


def test_prompts(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY)
    content = json.dumps({"prompts": {"query": "king ", "document": "war: "}})
    (tmp_path / "config_sentence_transformers.json").write_text(content)
    tokeniser = family.load_tokeniser(directory)
    assert rows(tokeniser.queries(["Paris"])) == [[3, 1]]
    assert rows(tokeniser.passages(["great"], ["Paris"])) == [[4, 10, 1]]
    expected = peer(directory).encode(["Paris"], prompt_name="query")
    assert close(vectors(directory, ["Paris"], similarity="dot"), expected)


def test_truncation_and_similarity(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY)
    content = json.dumps({"similarity_fn_name": "dot", "truncate_dim": 7})
    (tmp_path / "config_sentence_transformers.json").write_text(content)
    assert (family.info(directory).similarity, family.info(directory).dim) == ("dot", 7)
    assert close(vectors(directory, TEXTS), peer(directory).encode(TEXTS))
    normalised = peer(directory).encode(TEXTS, normalize_embeddings=True)
    assert close(vectors(directory, TEXTS, similarity="cosine"), normalised)


def test_max_length(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, length=5)
    assert family.info(directory).max_length == 5
    text = "unknown king " * 9
    assert family.load_tokeniser(directory).queries([text]).lengths.tolist() == [5]
    assert family.load_tokeniser(directory, max_length=2).queries([text]).lengths.tolist() == [2]
    for length in (0, 6):
        with pytest.raises(ConfigError, match="max_length"):
            family.load_tokeniser(directory, max_length=length)


def test_a_text_without_a_known_word_is_zero_through_the_engine(tmp_path: Path) -> None:
    """Micro-batches and padding hold texts of no tokens, alone and among others; cosine leaves them zero."""
    directory = write_word_vectors(str(tmp_path), VOCABULARY)
    tokeniser, tower = family.load_tokeniser(directory), family.load_tower(directory, "query", "fp32", "cpu")
    for texts in (["", "??", "unknown"], ["", "king", "??"]):
        import torch

        tokens = tokeniser.queries(texts)
        found = np.zeros((len(texts), tower.dim), np.float32)
        for batch in micro_batches(tokens.lengths, 2):
            ids, mask, types = pad(tokens, batch, tokeniser.pad_id)
            assert types is None
            found[batch] = tower(torch.from_numpy(ids), torch.from_numpy(mask), None).numpy()
        assert found.any(axis=1).tolist() == [text == "king" for text in texts]
        assert close(embed(tower, tokens, 0), found)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.one_of(st.text(), st.sampled_from([*TEXTS, *VOCABULARY, "war " * 3000])), min_size=1))
def test_batch_order_and_padding_do_not_matter(shared: str, texts: list[str]) -> None:
    tokeniser, tower = family.load_tokeniser(shared), family.load_tower(shared, "query", "fp32", "cpu")
    tokens = tokeniser.queries(texts)
    together = embed(tower, tokens, tokeniser.pad_id)
    assert np.isfinite(together).all()
    known = [any(row) for row in rows(tokens)]  # row 0, the padding word's, is zero
    assert together.any(axis=1).tolist() == known
    assert close(embed(tower, tokeniser.queries(texts[::-1]), tokeniser.pad_id, extra=3)[::-1], together)
    alone = [embed(tower, tokeniser.queries([text]), tokeniser.pad_id)[0] for text in texts]
    assert close(np.stack(alone), together)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_word_vectors(str(tmp_path_factory.mktemp("words")), VOCABULARY, word_weights=WEIGHTED)


def test_a_megabyte_of_words(shared: str) -> None:
    long = "Paris king war unknown " * 60_000
    assert len(long) > 1_000_000
    assert close(vectors(shared, [long, "Paris king war"])[0], vectors(shared, ["Paris king war"])[0])


def test_low_precision_and_old_copies(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, extras=("Dense",))
    tokens = family.load_tokeniser(directory).queries(TEXTS)
    full = embed(family.load_tower(directory, "query", "fp32", "cpu"), tokens, 0)
    low = embed(family.load_tower(directory, "query", "bf16", "cpu"), tokens, 0)
    assert low.dtype == np.float32
    assert 0 < np.abs(low - full).max() < 0.02


def test_describing_needs_no_torch(tmp_path: Path) -> None:
    directory = write_word_vectors(str(tmp_path), VOCABULARY, weights="safetensors")
    code = (
        "import sys; from pipelines.models import describe, find_family\n"
        f"find_family({directory!r}).load_tokeniser({directory!r}).queries(['king'])\n"
        f"print(describe({directory!r}).dim, [m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "32 []"


def test_it_recognises_nothing_else(tmp_path: Path) -> None:
    other = write_sentence_transformer(str(tmp_path / "other"))
    file = tmp_path / "file.cp"
    file.write_bytes(b"\x00")
    for checkpoint in (other, str(file), str(tmp_path), str(tmp_path / "lost")):
        assert not family.recognises(checkpoint)
    assert sentence.recognises(other)
