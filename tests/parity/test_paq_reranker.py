"""PAQ rerankers against AlbertForMultipleChoice, with candidates side by side as the reference runs them."""

from __future__ import annotations

import json
import os
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError, InputError
from pipelines.models import describe, find_family, find_model, paq, paq_reranker
from pipelines.schema import Passage
from tests.checkpoints import linear_state, save_weights, write_cross_encoder, write_dpr, write_paq
from tests.checkpoints.rerankers import write_classifier, write_paq_reranker
from tests.parity.towers import close

Parity = Callable[..., None]
QUESTIONS = ["who wrote the first book", "Who built the City?", "café in 78 rivers"]
CANDIDATES = [
    Passage("0", "", "who wrote the book", ["the king", "a king"]),
    Passage("1", "Ignored title", "Who built the library of Alexandria", ["Greek"]),
    Passage("2", "", "what is an index, then", ["78"]),
    Passage("3", "", "", [""]),
]
FLAT_QUESTIONS = [question for question in QUESTIONS for _ in CANDIDATES]
FLAT_CANDIDATES = CANDIDATES * len(QUESTIONS)


def _oracle(directory: str) -> Any:
    """Return logits_QC of all candidates of a question in one padded multiple-choice input."""
    import torch
    from transformers import AlbertForMultipleChoice, AlbertTokenizer

    model, report = AlbertForMultipleChoice.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    tokeniser = AlbertTokenizer.from_pretrained(directory)
    first = [f"{question}?" for question in FLAT_QUESTIONS]
    second = [f"{c.text}? {(c.answers or [''])[0]}" for c in FLAT_CANDIDATES]
    batch = tokeniser(first, second, padding=True, return_token_type_ids=True, return_tensors="pt")
    shaped = {name: tensor.view(len(QUESTIONS), len(CANDIDATES), -1) for name, tensor in batch.items()}
    assert shaped["token_type_ids"].any()
    with torch.inference_mode():
        return model.eval()(**shaped).logits.numpy()


# The released sizes' proportions: hidden / heads / layers of base, large, xlarge and xxlarge.
SIZES = {"base": (32, 4, 2), "large": (48, 4, 3), "xlarge": (64, 4, 3), "xxlarge": (128, 8, 2)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("weights", "dtype"), [("bin", "float32"), ("bin", "float16"), ("safetensors", "float32")])
def test_scores_equal_the_oracle(tmp_path: Path, parity: Parity, size: str, weights: str, dtype: str) -> None:
    dim, heads, layers = SIZES[size]
    directory = write_paq_reranker(str(tmp_path), dim, heads=heads, layers=layers, weights=weights, dtype=dtype)
    assert find_model(directory, "cross-encoder") is paq_reranker
    ours = paq_reranker.load(directory, token_budget=5).score(FLAT_QUESTIONS, FLAT_CANDIDATES)
    assert ours.dtype == np.float32
    theirs = _oracle(directory).reshape(-1)
    parity("PAQ reranker", f"{size}, spiece.model, .{weights} {dtype}", "AlbertForMultipleChoice", ours, theirs)


def test_the_pooler_counts(tmp_path: Path) -> None:
    """The score is the classifier on tanh(pooler(first hidden state)), by hand."""
    import torch
    from transformers import AlbertConfig, AlbertModel

    directory = write_paq_reranker(str(tmp_path))
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    own = {n.removeprefix("albert."): t for n, t in state.items() if n.startswith("albert.")}
    del own["embeddings.position_ids"]
    model = AlbertModel(AlbertConfig.from_pretrained(directory)).eval()
    model.load_state_dict(own, strict=True)
    scorer: Any = paq_reranker.load(directory)
    rows = scorer.classifier.encoder.encode([paq_reranker.format_pair(QUESTIONS[0], CANDIDATES[0])])
    ids, types = torch.from_numpy(rows.ids).long()[None], torch.from_numpy(rows.type_ids).long()[None]
    with torch.inference_mode():
        cls = model(input_ids=ids, token_type_ids=types).last_hidden_state[0, 0]
        pooled = torch.tanh(state["albert.pooler.weight"] @ cls + state["albert.pooler.bias"])
        expected = state["classifier.weight"] @ pooled + state["classifier.bias"]
    assert close(scorer.score(QUESTIONS[:1], CANDIDATES[:1]), expected)


def test_the_two_texts_of_a_pair() -> None:
    """A question that ends in "?" gets a second one, and only the first answer is read: as in the reference."""
    assert paq_reranker.format_pair("who?", CANDIDATES[0]) == ("who??", "who wrote the book? the king")
    assert paq_reranker.format_pair(" Who", CANDIDATES[3]) == (" Who?", "? ")


def test_fixed_tokens_from_spiece(tmp_path: Path) -> None:
    """Lower-cased, accents stripped, numbers split at the comma, token types 0 and 1 (none by default any more)."""
    scorer: Any = paq_reranker.load(write_paq_reranker(str(tmp_path)))
    encoder = scorer.classifier.encoder
    pair = paq_reranker.format_pair("WHO wrote 9,787", Passage("", "", "é", ["King"]))
    for question, passage in (pair, tuple(unicodedata.normalize("NFD", side) for side in pair)):
        rows = encoder.encode([(question, passage)])
        pieces = [encoder.backend.id_to_token(index) for index in rows.ids]
        first = ["[CLS]", "▁who", "▁wrote", "▁", "9", ",", "78", "7", "?", "[SEP]"]
        assert pieces == [*first, "▁", "e", "?", "▁king", "[SEP]"]
        assert rows.type_ids.tolist() == [0] * 10 + [1] * 5


def test_a_tokenizer_json_is_read_as_it_is(tmp_path: Path) -> None:
    """Saved by today's transformers it lacks the digit-comma rule no more: its scores are final."""
    directory = write_paq_reranker(str(tmp_path))
    scorer: Any = paq_reranker.load(directory)
    before = scorer.score(FLAT_QUESTIONS, FLAT_CANDIDATES)
    scorer.classifier.encoder.backend.save(str(tmp_path / "tokenizer.json"))
    os.unlink(tmp_path / "spiece.model")
    again: Any = paq_reranker.load(directory)
    assert close(again.score(FLAT_QUESTIONS, FLAT_CANDIDATES), before)
    assert again.classifier.encoder.encode([("9,787", "a")]).ids.tolist() == (
        scorer.classifier.encoder.encode([("9,787", "a")]).ids.tolist()
    )


# Batches and odd inputs


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_paq_reranker(str(tmp_path_factory.mktemp("reranker")))


@pytest.mark.parametrize("token_budget", [1, 3, 64])
def test_neither_batch_nor_order_matters(reranker: str, token_budget: int) -> None:
    pairs = list(zip(FLAT_QUESTIONS, FLAT_CANDIDATES, strict=True))
    one = paq_reranker.load(reranker)
    alone = [one.score([question], [candidate])[0] for question, candidate in pairs]
    scorer = paq_reranker.load(reranker, token_budget=token_budget)
    assert close(scorer.score(FLAT_QUESTIONS, FLAT_CANDIDATES), alone)
    assert close(scorer.score(FLAT_QUESTIONS[::-1], FLAT_CANDIDATES[::-1])[::-1], alone)
    assert scorer.score([], []).shape == (0,)


def test_odd_texts(reranker: str) -> None:
    odd = ["", "??", "🏛️", "king " * 800, "the library " * 90_000]
    candidates = [Passage("", "", text, [text[:20]]) for text in odd]
    scorer = paq_reranker.load(reranker)
    scores = scorer.score(odd * 2, candidates * 2)
    assert np.isfinite(scores).all()
    assert close(scores[: len(odd)], scores[len(odd) :])


@pytest.mark.parametrize("answers", [None, []])
def test_passages_without_answers_are_refused(reranker: str, answers: list[str] | None) -> None:
    with pytest.raises(InputError, match="without answers") as caught:
        paq_reranker.load(reranker).score(["who"], [Passage("p7", "", "text", answers)])
    assert "p7" in caught.value.where


# Recognition


@pytest.mark.parametrize("architecture", ["AlbertForMultipleChoice", "AlbertForMaskedLM", "AlbertModel"])
def test_config_or_head_decides(tmp_path: Path, architecture: str) -> None:
    directory = write_paq_reranker(str(tmp_path), architecture=architecture)
    assert paq_reranker.recognises(directory)
    assert not paq.recognises(directory)
    assert describe(directory).kind == "cross-encoder"
    with pytest.raises(CheckpointError, match="paq reranker"):
        find_family(directory)


def test_nothing_else_is_recognised(tmp_path: Path) -> None:
    modules = write_paq_reranker(str(tmp_path / "modules"))
    (tmp_path / "modules" / "modules.json").write_text("[]")
    others = [
        modules,
        write_paq(str(tmp_path / "paq")),
        write_dpr(str(tmp_path / "dpr"), "query"),
        write_cross_encoder(str(tmp_path / "bert")),
        write_classifier(str(tmp_path / "albert"), "albert"),
        str(tmp_path / "absent"),
        str(tmp_path / "dpr" / "config.json"),
    ]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    assert [other for other in [*others, str(tmp_path / "bad")] if paq_reranker.recognises(other)] == []


# Refusals


def _rewrite(directory: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    import torch

    state = torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)
    save_weights(directory, change({name: tensor.numpy() for name, tensor in state.items()}), "bin")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("albert.pooler.", r"lack albert\.pooler\.bias, albert\.pooler\.weight"),
        ("albert.encoder.embedding_hidden_mapping_in.bias", "embedding_hidden_mapping_in"),
        ("classifier.bias", r"lack classifier\.bias"),
        ("classifier.", "no classifier"),
    ],
)
def test_nothing_is_ever_random(tmp_path: Path, lost: str, words: str) -> None:
    directory = write_paq_reranker(str(tmp_path))
    _rewrite(directory, lambda state: {name: a for name, a in state.items() if not name.startswith(lost)})
    with pytest.raises(CheckpointError, match=words):
        paq_reranker.load(directory)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (linear_state("encode_proj", 8, 32), "PAQ retriever's"),
        (linear_state("classifier", 2, 32), "classifier of 2 labels"),
        (linear_state("adapter", 2, 2), r"unexpected adapter"),
    ],
)
def test_mixed_up_weights_are_refused(tmp_path: Path, added: dict[str, Any], words: str) -> None:
    directory = write_paq_reranker(str(tmp_path))
    _rewrite(directory, lambda state: state | added)
    with pytest.raises(CheckpointError, match=words):
        paq_reranker.load(directory)


def test_wrong_sizes_and_lost_files_are_refused(tmp_path: Path) -> None:
    directory = write_paq_reranker(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(CheckpointError, match="do not fit"):
        paq_reranker.load(directory)
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(CheckpointError, match="no tokeniser"):
        paq_reranker.load(directory)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        paq_reranker.load(directory)


class _Evil:
    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("damage", ["truncated", "pickle"])
def test_damaged_weights_are_refused(tmp_path: Path, damage: str) -> None:
    directory, proof = write_paq_reranker(str(tmp_path / "model")), tmp_path / "proof"
    path = tmp_path / "model" / "pytorch_model.bin"
    evil = pickle.dumps({"classifier.weight": _Evil(str(proof))}, protocol=2)
    path.write_bytes(path.read_bytes()[:4000] if damage == "truncated" else evil)
    with pytest.raises(CheckpointError, match="damaged"):
        find_model(directory, "cross-encoder")
    assert not proof.exists()
