"""The DPR reader: logits against transformers' DPRReader, spans against a decoder written out plainly here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import describe, dpr_reader, find_family, find_model, kind_of
from pipelines.schema import Passage
from tests.checkpoints import write_dpr
from tests.checkpoints.dpr import write_dpr_cp
from tests.parity.towers import QUESTIONS, TEXTS, TITLES, close

EDGES = [
    "??",
    "café and cafe\u0301, ｋｉｎｇ",
    "\U0001f4da a book \U0001f4da",
    "the king's book, isn't 'it'? 9,787 rivers.",
]
PASSAGES = [
    Passage(str(index), title, text)
    for index, (title, text) in enumerate(zip([*TITLES, *EDGES], [*TEXTS, *EDGES], strict=True))
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dpr(str(tmp_path_factory.mktemp("reader")), "reader")


@pytest.fixture(scope="module")
def reader(directory: str) -> Any:
    return find_model(directory, "reader").load(directory)


def _ids(directory: str, question: str, passage: Passage) -> tuple[list[int], int, list[int]]:
    """Return the input by transformers' BERT tokeniser, where the text begins in it, and all the text's tokens."""
    from transformers import BertTokenizer

    tokeniser = BertTokenizer.from_pretrained(directory)
    title, text = passage.title.strip(), passage.text.strip().strip('"').strip()
    # As lists: given strings, transformers takes an empty title for none and leaves its [SEP] out.
    head = tokeniser([question], [title])["input_ids"][0] if question else tokeniser(title)["input_ids"]
    body = tokeniser(text, add_special_tokens=False)["input_ids"]
    return (head + body)[:350], len(head), body


def _logits(directory: str, rows: list[list[int]]) -> list[tuple[float, list[float], list[float]]]:
    """Return relevance, start and end logits by transformers' class, one row at a time; it has no token types."""
    import torch
    from transformers import DPRReader

    model = DPRReader.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for row in rows:
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long))
        found.append((output.relevance_logits.item(), output.start_logits[0].tolist(), output.end_logits[0].tolist()))
    return found


def _plain_spans(start: list[float], end: list[float], subword: list[bool]) -> list[tuple[int, int, float]]:
    """Return the spans as DPR's description has it: every pair, sorted, nested ones skipped, widened when taken."""
    pairs = [(i, j, start[i] + end[j]) for i in range(len(start)) for j in range(i, min(i + 10, len(end)))]
    taken: list[tuple[int, int, float]] = []
    for i, j, score in sorted(pairs, key=lambda pair: pair[2], reverse=True):
        inside = [range(a, b + 1) for a, b, _ in taken]
        if any(set(span) <= set(range(i, j + 1)) or set(range(i, j + 1)) <= set(span) for span in inside):
            continue
        while i and subword[i]:
            i -= 1
        while j + 1 < len(subword) and subword[j + 1]:
            j += 1
        taken.append((i, j, score))
        if len(taken) == 10:
            break
    return taken


def _oracle(directory: str, question: str, passages: list[Passage]) -> list[tuple[int, str, float]]:
    """Return (passage, decoded text, start + end logit) of every answer, best first."""
    from transformers import BertTokenizer

    tokeniser = BertTokenizer.from_pretrained(directory)
    inputs = [_ids(directory, question, passage) for passage in passages]
    logits = _logits(directory, [row for row, _, _ in inputs])
    found = []
    for index in sorted(range(len(passages)), key=lambda index: -logits[index][0]):
        (_, offset, body), (_, start, end) = inputs[index], logits[index]
        subword = [piece.startswith("##") for piece in tokeniser.convert_ids_to_tokens(body)]
        for i, j, score in _plain_spans(start[offset:], end[offset:], subword):
            text = tokeniser.decode(body[i : j + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found.append((index, tokeniser.clean_up_tokenization(text), score))
    return found


def _compare(
    parity: Callable[..., None], layout: str, directory: str, reader: Any, passages: list[Passage] = PASSAGES
) -> None:
    logits: list[Any] = []
    spans: list[Any] = []
    texts: list[Any] = []
    for question in QUESTIONS:
        inputs = reader.writer.inputs([question] * len(passages), passages)
        expected = [_ids(directory, question, passage)[:2] for passage in passages]
        assert [(row.ids, row.offset) for row in inputs] == expected
        ours, theirs = reader.logits([row.ids for row in inputs]), _logits(directory, [row for row, _ in expected])
        logits += [(np.hstack(left), np.hstack(right)) for left, right in zip(ours, theirs, strict=True)]
        (answers,) = reader.answer([question], [passages])
        oracle = _oracle(directory, question, passages)
        spans += zip([answer.span for answer in answers], [span for *_, span in oracle], strict=True)
        texts += zip([(a.passage, a.decoded) for a in answers], [(i, text) for i, text, _ in oracle], strict=True)
    left, right = (np.concatenate(side) for side in zip(*logits, strict=True))
    parity("DPR reader", f"{layout}, logits", "transformers DPRReader", left, right)
    for what, pairs in (("start + end logits", spans), ("answers", texts)):
        left, right = (list(side) for side in zip(*pairs, strict=True))
        parity("DPR reader", f"{layout}, {what}", "plain decoder", left, right)


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_hugging_face_layout(tmp_path: Path, parity: Callable[..., None], weights: str) -> None:
    directory = write_dpr(str(tmp_path), "reader", weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kind_of(directory) == ("dpr_reader", "reader")
        ours = find_model(directory, "reader").load(directory)
    _compare(parity, f"HF .{weights}", directory, ours)


@pytest.mark.parametrize(("year", "legacy"), [(2020, True), (2021, False)])
def test_native_layout(tmp_path: Path, parity: Callable[..., None], year: int, legacy: bool) -> None:
    """The same weights in DPR's own file answer alike; it names no heads, which BERT has one of for 64 dimensions."""
    native = write_dpr_cp(str(tmp_path / "cp"), 64, reader=True, year=year, legacy=legacy, sequence_length=350)
    twin = write_dpr(str(tmp_path / "hf"), "reader", 64)
    config = Path(twin, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 1}))
    assert kind_of(native) == ("dpr_reader", "reader")
    assert describe(native).details["layout"] == ".cp"
    _compare(parity, f".cp {year}", twin, find_model(native, "reader").load(native), PASSAGES[:4])


def test_fixed_tokens(reader: Any) -> None:
    """No [SEP] at the end; an empty title leaves its [SEP]; outer quotes of the text go."""
    passages = [Passage("0", " King ", '"The city"'), Passage("1", "", "the"), Passage("2", "King", "the")]
    rows = [row.ids for row in reader.writer.inputs(["Who?", "Who?", ""], passages)]
    names = [[reader.writer.pieces[index] for index in row] for row in rows]
    assert names == [
        ["[CLS]", "who", "?", "[SEP]", "king", "[SEP]", "the", "city"],
        ["[CLS]", "who", "?", "[SEP]", "[SEP]", "the"],
        ["[CLS]", "king", "[SEP]", "the"],
    ]


def test_spans_equal_the_plain_decoder() -> None:
    """Random logits, small whole numbers among them so that many are equal; texts that go on behind the cut."""
    rng = np.random.default_rng(0)
    for case in range(300):
        length, cut_off = int(rng.integers(0, 40)), int(rng.integers(0, 4))
        draw = rng.integers(-2, 3, (2, length)) if case % 2 else rng.normal(size=(2, length))
        start, end = draw.astype(float)
        subword = [False, *(rng.random(length + cut_off) < 0.4).tolist()][: length + cut_off]
        ours = dpr_reader.best_spans(start, end, subword)
        assert ours == _plain_spans(start.tolist(), end.tolist(), subword)


def test_answers_are_cut_from_the_passage(reader: Any) -> None:
    backend = reader.writer.backend
    for answers in reader.answer(QUESTIONS, [PASSAGES] * len(QUESTIONS)):
        assert {answer.passage for answer in answers} == set(range(len(PASSAGES)))
        for answer in answers:
            passage = PASSAGES[answer.passage]
            assert answer.text == passage.text[answer.start : answer.end]
            tokens = backend.encode(answer.text, add_special_tokens=False).ids
            assert reader.writer.decode(tokens) == answer.decoded
            assert len(answer.text) > 0
    assert any("é" in answer.text for answer in answers)
    assert any("e\u0301" in answer.text for answer in answers)
    assert not any("é" in answer.decoded for answer in answers)


def test_a_decomposed_accent_stays_with_its_letter(reader: Any) -> None:
    (answers,) = reader.answer(["who"], [[Passage("0", "", "  cafe\u0301 ")]])
    assert [(answer.text, answer.decoded, answer.start, answer.end) for answer in answers] == [
        ("cafe\u0301", "cafe", 2, 7)
    ]


def test_whole_words_and_no_title(reader: Any) -> None:
    """Every answer begins and ends at a word of the text; the title's word is in none."""
    passage = Passage("0", "xylophone", "zebra quagga")
    (answers,) = reader.answer(["who?"], [[passage]])
    assert {answer.text for answer in answers} <= {"zebra", "quagga", "zebra quagga"}
    assert len(answers) >= 1


def test_scores_fall_in_the_order_of_the_answers(reader: Any) -> None:
    for answers in reader.answer(QUESTIONS, [PASSAGES] * len(QUESTIONS)):
        order = [(-answer.relevance, -answer.span) for answer in answers]
        assert order == sorted(order)
        scores = [answer.score for answer in answers]
        assert scores == sorted(scores, reverse=True)
        firsts = [next(a for a in answers if a.passage == index) for index in {a.passage for a in answers}]
        assert all(answer.score == answer.relevance for answer in firsts)
        assert answers[0].relevance == max(answer.relevance for answer in answers)


def test_duplicates_batches_and_order_do_not_matter(directory: str, reader: Any) -> None:
    (together,) = reader.answer([QUESTIONS[0]], [PASSAGES])
    alone = dpr_reader.load(directory, batch_size=1)
    (backwards,) = alone.answer([QUESTIONS[0]], [PASSAGES[::-1]])
    last = len(PASSAGES) - 1
    assert [(a.passage, a.text) for a in together] == [(last - a.passage, a.text) for a in backwards]
    assert close([a.span for a in together], [a.span for a in backwards])
    assert close([a.relevance for a in together], [a.relevance for a in backwards])
    (twice,) = reader.answer([QUESTIONS[0]], [[PASSAGES[0], PASSAGES[0]]])
    half = len(twice) // 2
    assert [a.text for a in twice[:half]] == [a.text for a in twice[half:]]
    assert [a.passage for a in twice] == [0] * half + [1] * half


def test_edges(reader: Any) -> None:
    assert reader.answer([], []) == []
    assert reader.answer(["who?"], [[]]) == [[]]
    empty, full = Passage("0", "King", ' "" '), Passage("1", "", "the city")
    (answers, none) = reader.answer(["who?", "who?"], [[empty, full], [empty]])
    assert {answer.passage for answer in answers} == {1}
    assert none == []
    assert reader.answer(["war " * 400], [[full]]) == [[]]  # the question leaves no room
    (answers,) = reader.answer(["who?"], [[Passage("0", "", "war " * 250_000)]])
    assert answers
    assert max(answer.end for answer in answers) <= 4 * 350
    with pytest.raises(ValueError, match=r"zip"):
        reader.answer(["who?"], [])


def test_max_length_and_dtype(directory: str) -> None:
    assert describe(directory).max_length == 350
    short = dpr_reader.load(directory, max_length=16)
    (row,) = short.writer.inputs(["who?"], [Passage("0", "king", "war " * 50)])
    assert len(row.ids) == 16
    with pytest.raises(ConfigError, match="max_length"):
        dpr_reader.load(directory, max_length=513)
    low = dpr_reader.load(directory, "bf16")
    assert str(low.model.dtype) == "torch.bfloat16"
    assert str(low.span.weight.dtype) == "torch.float32"
    assert low.answer(["who?"], [PASSAGES])[0]


def test_native_length_is_the_files(tmp_path: Path) -> None:
    assert describe(write_dpr_cp(str(tmp_path), 64, reader=True, sequence_length=320)).max_length == 320


# Refusals


def test_other_kinds_are_refused(tmp_path: Path, directory: str) -> None:
    encoder = write_dpr(str(tmp_path / "q"), "query")
    with pytest.raises(CheckpointError, match="this is an encoder"):
        find_model(encoder, "reader")
    with pytest.raises(CheckpointError, match="this is an encoder"):
        find_model(write_dpr_cp(str(tmp_path / "cp"), 64), "reader")
    with pytest.raises(CheckpointError, match="this is a reader"):
        find_family(directory)
    for path in (tmp_path, tmp_path / "lost", tmp_path / "q" / "vocab.txt"):
        assert not dpr_reader.recognises(str(path))


def test_an_encoder_under_a_readers_config(tmp_path: Path) -> None:
    directory = write_dpr(str(tmp_path), "query")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["DPRReader"]}))
    with pytest.raises(CheckpointError, match=r"lack span_predictor\.qa_outputs\.weight"):
        find_model(directory, "reader")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("span_predictor.qa_classifier.weight", r"lack span_predictor\.qa_classifier\.weight"),
        ("span_predictor.qa_outputs.bias", r"lack qa_outputs\.bias"),
        ("span_predictor.encoder.bert_model.encoder.layer.0.output.dense.bias", r"lack encoder\.layer\.0"),
    ],
)
def test_missing_tensors_are_refused(tmp_path: Path, lost: str, words: str) -> None:
    import torch

    directory = write_dpr(str(tmp_path), "reader")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    del state[lost]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        dpr_reader.load(directory)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("qa_outputs.weight", (3, 32), "3 outputs"),
        ("encoder.encode_proj.weight", (8, 32), "unexpected"),
        ("other", (1,), "unexpected"),
        ("qa_outputs.bias", (3,), "do not fit"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, name: str, shape: tuple[int, ...], words: str) -> None:
    import torch

    directory = write_dpr(str(tmp_path), "reader")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(state | {f"span_predictor.{name}": torch.zeros(shape)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        dpr_reader.load(directory)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_weights_are_refused(tmp_path: Path, share: float) -> None:
    directory = write_dpr(str(tmp_path / "hf"), "reader")
    path = tmp_path / "hf" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="weights"):
        find_model(directory, "reader")


def test_a_projected_native_reader_is_refused(tmp_path: Path) -> None:
    import torch

    directory = write_dpr_cp(str(tmp_path), 64, reader=True, year=2020)
    model = torch.load(tmp_path / "hf_bert_base.cp", weights_only=False)["model_dict"]
    model["encoder.encode_proj.weight"] = torch.zeros(8, 64)
    torch.save({"model_dict": model}, tmp_path / "hf_bert_base.cp")
    with pytest.raises(CheckpointError, match="unexpected"):
        dpr_reader.load(directory)
