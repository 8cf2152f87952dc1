"""Cross-encoders against transformers' classifiers, sentence-transformers' predict, and heads computed by hand."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config import RerankConfig
from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import cross_encoder, describe, find_model, kind_of
from pipelines.models.tokens import shorten
from pipelines.rerank import check_reranker, load_reranker
from pipelines.schema import Passage
from tests.checkpoints import (
    write_cross_encoder,
)
from tests.checkpoints.rerankers import (
    write_bert_cat,
    write_capreolus,
    write_classifier,
    write_google_bert,
    write_paq_reranker,
)
from tests.parity.towers import TEXTS, TITLES, close

Parity = Callable[..., None]
QUERY = " Who built the library? "
PASSAGES = [Passage(str(i), title, text) for i, (title, text) in enumerate(zip(TITLES, TEXTS, strict=True))]
QUERIES = [QUERY] * len(PASSAGES)
PAIRS = [(QUERY.strip(), f"{p.title}. {p.text.strip()}" if p.title else p.text.strip()) for p in PASSAGES]


def _slow_bert(directory: str) -> Any:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    return BertTokenizerLegacy(os.path.join(directory, "vocab.txt"), do_lower_case=True)


def _inputs(tokeniser: Any, pairs: list[tuple[str, str]], *, types: bool = True, length: int = 512) -> list[Any]:
    """Return each pair's own unpadded batch of one."""
    options = {"truncation": "longest_first", "max_length": length, "return_tensors": "pt"}
    return [tokeniser(a, b, return_token_type_ids=types, **options) for a, b in pairs]


def _logits(directory: str, inputs: list[Any]) -> Any:
    """Return logits_NC of transformers' classifier, each pair alone."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return torch.cat([model(**one).logits for one in inputs]).numpy()


def _state(directory: str) -> dict[str, Any]:
    import torch

    return torch.load(Path(directory) / "pytorch_model.bin", weights_only=True)


# Scores


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("kind", ["bert", "electra", "distilbert", "deberta-v2", "albert", "roberta", "xlm-roberta"])
def test_every_backbone_gives_the_logits(tmp_path: Path, parity: Parity, kind: str, labels: int) -> None:
    from transformers import AutoTokenizer

    directory = write_classifier(str(tmp_path), kind, labels)
    assert find_model(directory, "cross-encoder") is cross_encoder
    assert describe(directory).details["backbone"] == kind
    wordpiece = kind in ("bert", "electra", "distilbert", "deberta-v2")
    tokeniser = _slow_bert(directory) if wordpiece else AutoTokenizer.from_pretrained(directory)
    chosen = [i for i in range(len(PAIRS)) if kind != "albert" or "9,787" not in PAIRS[i][1]]  # trap: digit + comma
    inputs = _inputs(tokeniser, [PAIRS[i] for i in chosen], types=kind in ("bert", "electra", "albert"))
    logits = _logits(directory, inputs)
    ours = cross_encoder.load(directory).score([QUERY] * len(chosen), [PASSAGES[i] for i in chosen])
    assert ours.dtype == np.float32
    theirs = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
    oracle = "AutoModelForSequenceClassification"
    parity("cross-encoder", f"{kind}, {labels} label{'s' * (labels > 1)}, .bin, slow tokeniser", oracle, ours, theirs)


@pytest.mark.parametrize(("weights", "dtype"), [("safetensors", "float32"), ("bin", "float16")])
def test_other_weight_files(tmp_path: Path, parity: Parity, weights: str, dtype: str) -> None:
    directory = write_classifier(str(tmp_path), "electra", weights=weights, dtype=dtype)
    theirs = _logits(directory, _inputs(_slow_bert(directory), PAIRS))[:, 0]
    ours = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    parity("cross-encoder", f"electra, 1 label, {weights} {dtype}", "AutoModelForSequenceClassification", ours, theirs)


@pytest.mark.parametrize("layout", ["plain", "saved by sentence-transformers 6", "its files without modules.json"])
def test_predict_of_sentence_transformers(tmp_path: Path, parity: Parity, layout: str) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    directory = write_cross_encoder(str(tmp_path / "plain"))
    theirs = CrossEncoder(directory, local_files_only=True, max_length=512)
    if layout != "plain":
        directory = str(tmp_path / "saved")
        theirs.save(directory)
    if layout.endswith("without modules.json"):
        os.unlink(os.path.join(directory, "modules.json"))
    expected = theirs.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert cross_encoder.recognises(directory)
    ours = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    parity("cross-encoder", f"bert, 1 label, {layout}", "CrossEncoder.predict", ours, expected)


@pytest.mark.parametrize("named", [True, False])
def test_early_bert_directories(tmp_path: Path, parity: Parity, named: bool) -> None:
    """gamma and beta, the starting model's architecture or none, fit_dense: the oracle gets renamed tensors."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    directory = write_google_bert(str(tmp_path), named=named)
    assert find_model(directory, "cross-encoder") is cross_encoder
    config = BertConfig(**json.loads((tmp_path / "config.json").read_text()), num_labels=2)
    model = BertForSequenceClassification(config).eval()
    state = {n.replace("gamma", "weight").replace("beta", "bias"): t for n, t in _state(directory).items()}
    model.load_state_dict({n: t for n, t in state.items() if not n.startswith("fit_dense")}, strict=True)
    with torch.inference_mode():
        logits = torch.cat([model(**one).logits for one in _inputs(_slow_bert(directory), PAIRS)]).numpy()
    ours = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    layout = f"bert, 2 labels, gamma/beta, {'MaskedLM config' if named else 'no model_type'}"
    parity("cross-encoder", layout, "BertForSequenceClassification", ours, logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize("labels", [1, 2])
def test_electra_with_a_bare_head(tmp_path: Path, parity: Parity, labels: int) -> None:
    import torch
    from transformers import ElectraConfig, ElectraModel

    directory = write_capreolus(str(tmp_path), labels)
    assert "first hidden state" in describe(directory).details["head"]
    state = _state(directory)
    model = ElectraModel(ElectraConfig.from_pretrained(directory)).eval()
    inner = {n.removeprefix("electra."): t for n, t in state.items() if n.startswith("electra.")}
    del inner["embeddings.position_ids"]
    model.load_state_dict(inner, strict=True)
    with torch.inference_mode():
        cls = torch.cat([model(**one).last_hidden_state[:, 0] for one in _inputs(_slow_bert(directory), PAIRS)])
    logits = (cls @ state["classifier.out_proj.weight"].T + state["classifier.out_proj.bias"]).numpy()
    ours = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    theirs = logits[:, 0] if labels == 1 else logits[:, 1] - logits[:, 0]
    parity("cross-encoder", f"Capreolus electra, {labels} label(s)", "ElectraModel + Linear by hand", ours, theirs)


@pytest.mark.parametrize(("dim", "dtype"), [(64, "float32"), (128, "float16")])
def test_bert_cat(tmp_path: Path, parity: Parity, dim: int, dtype: str) -> None:
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    directory = write_bert_cat(str(tmp_path), dim, dtype=dtype)
    assert find_model(directory, "cross-encoder") is cross_encoder
    state = {name: tensor.float() for name, tensor in _state(directory).items()}
    sizes = {"vocab_size": len(state["bert_model.embeddings.word_embeddings.weight"]), "dim": dim}
    config = DistilBertConfig(**sizes, n_heads=dim // 64, n_layers=2, hidden_dim=2 * dim)
    model = DistilBertModel(config).eval()
    prefix = "bert_model."
    model.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, strict=True)
    with torch.inference_mode():
        inputs = _inputs(_slow_bert(directory), PAIRS, types=False)
        cls = torch.cat([model(**one).last_hidden_state[:, 0] for one in inputs])
    theirs = (cls @ state["_classification_layer.weight"].T + state["_classification_layer.bias"]).numpy()[:, 0]
    ours = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    parity("cross-encoder", f"BERT_Cat, {dim} wide, {dtype}", "DistilBertModel + Linear by hand", ours, theirs)


def test_two_labels_order_like_softmax(tmp_path: Path) -> None:
    import torch

    directory = write_classifier(str(tmp_path), "bert", 2)
    scores = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    logits = torch.from_numpy(_logits(directory, _inputs(_slow_bert(directory), PAIRS)))
    assert np.argsort(scores).tolist() == logits.softmax(dim=1)[:, 1].argsort().tolist()


def test_the_weights_decide_the_labels(tmp_path: Path) -> None:
    """An old config.json may name two labels where the head has one."""
    directory = write_cross_encoder(str(tmp_path))
    expected = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    path = tmp_path / "config.json"
    two = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | two))
    assert close(cross_encoder.load(directory).score(QUERIES, PASSAGES), expected)


# Batches


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_classifier(str(tmp_path_factory.mktemp("electra")), "electra")


@pytest.mark.parametrize("token_budget", [1, 2, 32])
def test_neither_batch_nor_order_matters(electra: str, token_budget: int) -> None:
    alone = [cross_encoder.load(electra).score([QUERY], [passage])[0] for passage in PASSAGES]
    scorer = cross_encoder.load(electra, token_budget=token_budget)
    assert close(scorer.score(QUERIES, PASSAGES), alone)
    assert close(scorer.score(QUERIES, PASSAGES[::-1])[::-1], alone)
    mixed = [QUERY, "a king", QUERY, "war?", QUERY]
    assert close(scorer.score(mixed, PASSAGES)[::2], alone[::2])
    assert scorer.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="zip"):
        scorer.score([QUERY], PASSAGES)


def test_odd_texts(electra: str) -> None:
    odd = ["", "??", "🏛️ 📜", unicodedata.normalize("NFD", "café in Ägypten"), "king " * 700, "the library " * 90_000]
    passages = [Passage("", "", text) for text in [*odd, *odd]]
    scorer = cross_encoder.load(electra)
    scores = scorer.score([""] * len(passages), passages)
    assert np.isfinite(scores).all()
    assert close(scores[: len(odd)], scores[len(odd) :])
    pairs = [("", text.strip()) for text in odd[:5]]
    assert close(scores[:5], _logits(electra, _inputs(_slow_bert(electra), pairs))[:, 0])


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_long_pairs_are_shortened_without_a_trace(tmp_path: Path, kind: str) -> None:
    """The ids are those of the whole texts: an odd number to keep shows which side the tokeniser took for longer."""
    scorer: Any = cross_encoder.load(write_classifier(str(tmp_path), kind), max_length=16)
    encoder, rng = scorer.classifier.encoder, np.random.default_rng(0)
    words = ["king", "the library", "Café", "9,787", "x" * 40, "war?", "  ", "🏛"]
    sides = [" ".join(rng.choice(words, size)) for size in rng.choice([1, 5, 20, 30], 120)]
    pairs: list[tuple[str, str]] = list(zip(sides[::2], sides[1::2], strict=True))
    shorter: list[Any] = shorten(encoder, pairs)
    assert sum(short != pair for short, pair in zip(shorter, pairs, strict=True)) > 20
    for short, (first, second) in zip(shorter, pairs, strict=True):  # one at a time: what is cut off costs memory
        assert encoder.encode([short]).ids.tolist() == encoder.backend.encode(first, second).ids
    million = "the library " * 90_000
    ((first, second),) = shorten(encoder, [(million, million)])
    assert len(first) == len(second) < 1000


def test_length(electra: str) -> None:
    long = [Passage("", "", "king " * 300)]
    theirs = _logits(electra, _inputs(_slow_bert(electra), [("who", long[0].text.strip())], length=64))[:, 0]
    assert close(cross_encoder.load(electra, max_length=64).score(["who"], long), theirs)
    with pytest.raises(ConfigError, match="max_length 513"):
        cross_encoder.load(electra, max_length=513)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.5), ("fp16", 0.05)])
def test_half_precision(electra: str, dtype: str, tolerance: float) -> None:
    scores = cross_encoder.load(electra, dtype).score(QUERIES, PASSAGES)
    assert scores.dtype == np.float32
    assert close(scores, cross_encoder.load(electra).score(QUERIES, PASSAGES), tolerance)


# Tokens


def _tokens(directory: str, query: str, text: str) -> tuple[list[str], list[int] | None]:
    scorer = cross_encoder.load(directory)
    assert isinstance(scorer, cross_encoder.PairScorer)
    encoder = scorer.classifier.encoder
    rows = encoder.encode([(query, text)])
    types = None if rows.type_ids is None else rows.type_ids.tolist()
    return [encoder.backend.id_to_token(index) for index in rows.ids], types


@pytest.mark.parametrize("kind", ["bert", "electra", "distilbert"])
def test_fixed_tokens_of_wordpiece(tmp_path: Path, kind: str) -> None:
    """An uncased vocabulary lower-cases; DistilBERT takes no token types."""
    pieces, types = _tokens(write_classifier(str(tmp_path), kind), "Who wrote?", "The KING in Café")
    expected = ["[CLS]", "who", "wrote", "?", "[SEP]", "the", "king", "in", "c", "##a", "##f", "##e", "[SEP]"]
    assert pieces == expected
    assert types == (None if kind == "distilbert" else [0] * 5 + [1] * 8)


def test_fixed_tokens_of_albert(tmp_path: Path) -> None:
    """From spiece.model: segment 1 for the passage, and a number is split at its comma."""
    pieces, types = _tokens(write_classifier(str(tmp_path), "albert"), "Who", "wrote 9,787")
    assert pieces == ["[CLS]", "▁who", "[SEP]", "▁wrote", "▁", "9", ",", "78", "7", "[SEP]"]
    assert types == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_fixed_ids_of_xlmr_and_roberta(tmp_path: Path) -> None:
    """Their pairs have two separators; XLM-R's ids are one above those of the SentencePiece model."""
    scorer: Any = cross_encoder.load(write_classifier(str(tmp_path / "x"), "xlm-roberta"))
    rows = scorer.classifier.encoder.encode([("the", "library")])
    assert rows.ids.tolist()[:1] + rows.ids.tolist()[2:4] == [0, 2, 2]
    assert rows.type_ids is None
    assert [scorer.classifier.encoder.backend.id_to_token(i) for i in rows.ids] == [
        *("<s>", "▁the", "</s>", "</s>", "▁", "library", "</s>")
    ]
    assert scorer.classifier.encoder.pad_id == 1
    roberta: Any = cross_encoder.load(write_classifier(str(tmp_path / "r"), "roberta"))
    score = roberta.score(["  the library "], [Passage("", "", " the king")])
    assert close(score, roberta.score(["the library"], [Passage("", "", "the king")]))  # a leading space is a token


# PAQ's passage ranker


def test_passage_ranker(tmp_path: Path, parity: Parity) -> None:
    import torch

    directory = write_classifier(str(tmp_path), "bert", 2)
    texts = [*TEXTS, "", "king " * 400]
    options = {"truncation": True, "max_length": 256, "return_tensors": "pt"}
    tokeniser = _slow_bert(directory)
    logits = torch.from_numpy(_logits(directory, [tokeniser(text, **options) for text in texts]))
    ours = cross_encoder.load_passage_ranker(directory, token_budget=3).score(texts)
    assert ours.dtype == np.float32
    assert (ours <= 0).all()
    parity("PAQ passage ranker", "bert, 2 labels, .bin", "log_softmax[:, 1]", ours, logits.log_softmax(1)[:, 1].numpy())
    assert cross_encoder.load_passage_ranker(directory).score([]).shape == (0,)


def test_passage_ranker_of_one_label_is_refused(electra: str) -> None:
    with pytest.raises(CheckpointError, match="one label"):
        cross_encoder.load_passage_ranker(electra)


def test_bert_cat_takes_the_tokeniser_it_was_released_without(tmp_path: Path) -> None:
    """Through the config, as a user does; the same scores as with the tokeniser beside the weights."""
    whole = write_bert_cat(str(tmp_path / "whole"))
    bare = shutil.copytree(whole, tmp_path / "bare")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (bare / name).unlink(missing_ok=True)
    config = RerankConfig(checkpoint=str(bare), tokeniser=whole)
    check_reranker(config)
    assert close(load_reranker(config).score(QUERIES, PASSAGES), cross_encoder.load(whole).score(QUERIES, PASSAGES))
    with pytest.raises(CheckpointError, match="without a tokeniser") as caught:
        check_reranker(RerankConfig(checkpoint=str(bare)))
    assert "rerank.tokeniser" in caught.value.hint
    small = write_bert_cat(str(tmp_path / "small"), tokeniser=False)
    with pytest.raises(CheckpointError, match="pieces, the model"):
        load_reranker(RerankConfig(checkpoint=small, tokeniser=whole))
    with pytest.raises(ConfigError, match="its own tokeniser"):
        check_reranker(RerankConfig(checkpoint=write_paq_reranker(str(tmp_path / "paq")), tokeniser=whole))


@pytest.mark.parametrize("architectures", [None, ["ElectraForPreTraining"]])
def test_capreolus_is_known_by_its_tensors(tmp_path: Path, architectures: Any) -> None:
    """Its config may still name the model that training started from."""
    directory = write_capreolus(str(tmp_path))
    expected = cross_encoder.load(directory).score(QUERIES, PASSAGES)
    path = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}
    path.write_text(json.dumps(config | ({"architectures": architectures} if architectures else {})))
    assert kind_of(directory) == ("cross_encoder", "cross-encoder")
    assert close(cross_encoder.load(directory).score(QUERIES, PASSAGES), expected)
