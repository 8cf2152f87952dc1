"""FiD readers against T5ForConditionalGeneration, passage by passage, with a greedy loop that keeps no cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.models import describe, fid, find_model
from pipelines.models.base import Answer
from pipelines.models.tokens import clean_spaces
from pipelines.schema import Passage
from tests.checkpoints import State, save_weights
from tests.checkpoints.fid import CROSS_BIAS, T5_PIECES, t5_config, t5_state, wrap, write_fid, write_t5_tokeniser

QUESTIONS = ["who wrote the book?", " What is a scroll ", "", "9,787 books in 78 rivers??"]
LIBRARY = Passage("1", "Alexandria", "The library of Alexandria was the first great library.")
PASSAGES = [
    [LIBRARY, Passage("2", "", "a king wrote it\nin a  scroll"), Passage("3", "King", "")],
    [Passage("4", "Ray", "war " * 400)],
    [LIBRARY, LIBRARY],
    [Passage("5", "Ägypten 🙂", "café, cafe\u0301 ½ x ??")] * 4 + [LIBRARY],
]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_t5_tokeniser(str(tmp_path_factory.mktemp("t5")))


@pytest.fixture(scope="module")
def reader_of(tmp_path_factory: pytest.TempPathFactory, t5: str) -> Callable[[int], fid.FidReader]:
    """Readers of the released layout, by seed."""
    made: dict[int, fid.FidReader] = {}

    def give(seed: int) -> fid.FidReader:
        if seed not in made:
            made[seed] = fid.load(write_fid(str(tmp_path_factory.mktemp("fid")), seed=seed), tokeniser=t5)
        return made[seed]

    return give


def _input_ids(t5: str, question: str, passage: Passage, max_length: int = 200) -> list[int]:
    """Return what SentencePiece itself makes of the input, cut before its `</s>`."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=os.path.join(t5, "spiece.model"))
    text = f"question: {question} title: {passage.title} context: {passage.text}"
    ids: list[int] = pieces.encode(text)
    return [*ids[: max_length - 1], 1]


def _oracle_model(config: dict[str, Any], state: State) -> Any:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**config)).eval()
    if config.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    tensors = {name: torch.from_numpy(array.astype(np.float32)) for name, array in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model


def _oracle(
    model: Any, t5: str, question: str, passages: list[Passage], answer_length: int = 10
) -> tuple[list[int], list[float]]:
    """Return the ids of the answer and their log-probabilities, `</s>` included."""
    import torch

    with torch.inference_mode():
        inputs = [torch.tensor([_input_ids(t5, question, passage)]) for passage in passages]
        fused = torch.cat([model.encoder(input_ids=ids).last_hidden_state for ids in inputs], dim=1)
        written, scores = [0], []
        while len(written) < answer_length and written[-1] != 1:
            hidden = model.decoder(input_ids=torch.tensor([written]), encoder_hidden_states=fused).last_hidden_state
            last = hidden[0, -1] * (model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0)
            logprobs = (last @ model.lm_head.weight.T).log_softmax(dim=0)
            written.append(int(logprobs.argmax()))
            scores.append(float(logprobs[written[-1]]))
    return written[1:], scores


def _check(parity: Any, layout: str, reader: fid.FidReader, model: Any, t5: str, answer_length: int = 10) -> None:
    """Compare texts, and scores divided by the number of tokens: a sum of many adds up their rounding."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=os.path.join(t5, "spiece.model"))
    ours = [answer for (answer,) in reader.answer(QUESTIONS, PASSAGES)]
    asked = zip(QUESTIONS, PASSAGES, strict=True)
    theirs = [_oracle(model, t5, question, own, answer_length) for question, own in asked]
    texts = [clean_spaces(pieces.decode([index for index in ids if 2 < index < T5_PIECES])) for ids, _ in theirs]
    oracle = "T5, greedy without cache"
    parity("FiD reader", f"{layout}, text", oracle, [answer.text for answer in ours], texts)
    means = [answer.score / len(ids) for answer, (ids, _) in zip(ours, theirs, strict=True)]
    parity("FiD reader", f"{layout}, log-prob", oracle, means, [sum(scores) / len(scores) for _, scores in theirs])


@pytest.mark.parametrize(
    ("wrapped", "weights", "dtype", "seed"),
    [
        (True, "bin", "float32", 0),
        (True, "bin", "float32", 4),
        (True, "bin", "float16", 1),
        (True, "safetensors", "float32", 1),
        (False, "bin", "float32", 5),
        (False, "safetensors", "float16", 0),
    ],
)
def test_answers_equal_the_oracle(
    tmp_path: Path, t5: str, parity: Any, wrapped: bool, weights: str, dtype: str, seed: int
) -> None:
    directory = write_fid(str(tmp_path), wrapped=wrapped, weights=weights, dtype=dtype, seed=seed)
    assert find_model(directory, "reader") is fid
    assert describe(directory).details["layout"] == ("wrapped" if wrapped else "unwrapped")
    config = t5_config()
    state = {name: array.astype(dtype) for name, array in t5_state(config, seed).items()}
    layout = f"{'wrapped' if wrapped else 'unwrapped'} {weights} {dtype} {seed}"
    _check(parity, layout, fid.load(directory, tokeniser=t5), _oracle_model(config, state), t5)


def test_some_answers_end_and_some_are_cut(reader_of: Callable[[int], fid.FidReader], t5: str) -> None:
    """The models of the comparison above are such that both ends of an answer are met."""
    ends = set()
    for seed in range(4):
        model = _oracle_model(t5_config(), t5_state(t5_config(), seed))
        ends |= {_oracle(model, t5, q, own)[0][-1] == 1 for q, own in zip(QUESTIONS, PASSAGES, strict=True)}
    assert ends == {True, False}


def test_t5_11_has_an_output_layer_of_its_own(tmp_path: Path, t5: str, parity: Any) -> None:
    """Gated feed-forward, no scaling of the decoder's output, lm_head apart from the embedding."""
    config = t5_config(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    state = t5_state(config, gated=True, tied=False)
    directory = write_fid(str(tmp_path), config=config, state=state)
    reader = fid.load(directory, tokeniser=t5)
    assert not np.allclose(reader.model.lm_head.weight.detach(), reader.model.shared.weight.detach())
    _check(parity, "T5 1.1 wrapped bin", reader, _oracle_model(config, state), t5)


def test_longer_answers_start_with_the_shorter(tmp_path: Path, t5: str, parity: Any) -> None:
    """50 tokens, as in FiD's own evaluation."""
    directory = write_fid(str(tmp_path))
    reader = fid.load(directory, tokeniser=t5, answer_length=50)
    _check(parity, "answer_length 50", reader, _oracle_model(t5_config(), t5_state(t5_config())), t5, 50)
    (short,), (long,) = (
        fid.load(directory, tokeniser=t5, answer_length=length).answer(QUESTIONS[:1], PASSAGES[:1])[0]
        for length in (4, 50)
    )
    assert long.text.startswith(short.text)
    assert len(long.text) > len(short.text)


# Batches


def _same(left: list[list[Answer]], right: list[list[Answer]]) -> bool:
    pairs = [(a, b) for row, other in zip(left, right, strict=True) for a, b in zip(row, other, strict=True)]
    return all(a.text == b.text and abs(a.score - b.score) <= 1e-5 for a, b in pairs)


@pytest.mark.parametrize(("passage_tokens", "state_tokens"), [(1, 1), (300, 100_000), (100_000, 400)])
def test_batches_do_not_matter(
    reader_of: Callable[[int], fid.FidReader], passage_tokens: int, state_tokens: int
) -> None:
    """Different numbers of passages in one call give what each question gives alone, in the order given."""
    reader = reader_of(0)
    questions, passages = [*QUESTIONS, "no passages"], [*PASSAGES, []]
    alone = [reader.answer([question], [own])[0] for question, own in zip(questions, passages, strict=True)]
    assert [len(own) for own in alone] == [1, 1, 1, 1, 0]
    assert len({own[0].score for own in alone[:4]}) == 4
    small = fid.FidReader(reader.model, reader.encoder, "cpu", passage_tokens=passage_tokens, state_tokens=state_tokens)
    assert _same(small.answer(questions, passages), alone)
    assert _same(small.answer(questions[::-1], passages[::-1]), alone[::-1])


def test_a_hundred_passages_in_any_order(reader_of: Callable[[int], fid.FidReader]) -> None:
    reader = reader_of(1)
    many = [Passage(str(n), f"title {n}", f"the {n} king of the river " * (n % 7 + 1)) for n in range(100)]
    forwards, backwards = (reader.answer(["who is king"], [order]) for order in (many, many[::-1]))
    assert _same(forwards, backwards)
    assert not _same(forwards, reader.answer(["who is king"], [many[:50]]))


def test_nothing_to_read(reader_of: Callable[[int], fid.FidReader]) -> None:
    assert reader_of(0).answer([], []) == []
    assert reader_of(0).answer(["who"], [[]]) == [[]]
    with pytest.raises(ValueError, match="shorter"):
        reader_of(0).answer(["who", "what"], [[LIBRARY]])


def test_bf16_is_near_fp32(tmp_path: Path, t5: str) -> None:
    import torch

    directory = write_fid(str(tmp_path))
    exact, coarse = (fid.load(directory, dtype, tokeniser=t5, answer_length=2) for dtype in ("fp32", "bf16"))
    assert {parameter.dtype for parameter in coarse.model.parameters()} == {torch.bfloat16}
    wanted, found = (reader.answer(QUESTIONS, PASSAGES) for reader in (exact, coarse))
    differences = [abs(a[0].score - b[0].score) for a, b in zip(wanted, found, strict=True)]
    assert 0 < max(differences) < 0.5


def test_the_old_cross_attention_bias_is_dropped(tmp_path: Path, t5: str) -> None:
    with_bias = write_fid(str(tmp_path / "with"))
    state = wrap(t5_state(t5_config()), t5_config())
    without = write_fid(str(tmp_path / "without"))
    save_weights(without, {name: array for name, array in state.items() if name != CROSS_BIAS}, "bin")
    first, second = (fid.load(directory, tokeniser=t5) for directory in (with_bias, without))
    assert first.answer(QUESTIONS, PASSAGES) == second.answer(QUESTIONS, PASSAGES)


# Tokens


@pytest.mark.parametrize("question", [*QUESTIONS, "cafe\u0301 ½ 🙂🙂", "ａ　ｂ", "who\twrote\n it", "x" * 600])
def test_tokens_equal_sentencepiece(reader_of: Callable[[int], fid.FidReader], t5: str, question: str) -> None:
    encoder = reader_of(0).encoder
    for passage in [own for group in PASSAGES for own in group]:
        ids = encoder.encode([fid.reader_input(question, passage)]).ids.tolist()
        assert ids == _input_ids(t5, question, passage)


def test_fixed_tokens_end_in_the_end_token(reader_of: Callable[[int], fid.FidReader]) -> None:
    encoder = reader_of(0).encoder
    pieces = [
        [encoder.backend.id_to_token(index) for index in encoder.encode([text]).ids]
        for text in (fid.reader_input("who?", Passage("1", "", "King")), "war " * 400)
    ]
    assert pieces[0] == ["▁question", ":", "▁who", "?", "▁title", ":", "▁context", ":", "▁King", "</s>"]
    assert len(pieces[1]) == 200
    assert pieces[1][198:] == ["▁war", "</s>"]


def test_special_tokens_in_a_text_are_what_transformers_takes_them_for(
    reader_of: Callable[[int], fid.FidReader], t5: str
) -> None:
    from transformers import T5Tokenizer

    text = fid.reader_input("</s> who <extra_id_0>", Passage("1", "<pad>", "the <unk> king</s>"))
    theirs = T5Tokenizer.from_pretrained(t5)(text)["input_ids"]
    assert reader_of(0).encoder.encode([text]).ids.tolist() == theirs


def test_outer_whitespace_of_a_question_is_not_seen(reader_of: Callable[[int], fid.FidReader]) -> None:
    encoder = reader_of(0).encoder
    bare, spaced = (encoder.encode([fid.reader_input(text, LIBRARY)]).ids.tolist() for text in ("who?", " \twho? \n"))
    assert bare == spaced


def test_a_very_long_passage(reader_of: Callable[[int], fid.FidReader]) -> None:
    row = Passage("1", "t", "the king of the river " * 48_000)
    short = Passage("1", "t", "the king of the river " * 60)
    assert len(row.text) > 1_000_000
    assert reader_of(0).answer(["who"], [[row]]) == reader_of(0).answer(["who"], [[short]])


@pytest.mark.parametrize("ending", [True, False])
def test_tokeniser_json_gives_the_same_tokens(tmp_path: Path, t5: str, ending: bool) -> None:
    """Also one that lacks the step which appends `</s>`, and one that lies in the checkpoint itself."""
    directory = write_t5_tokeniser(write_fid(str(tmp_path)), fast=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    assert content["post_processor"]
    path.write_text(json.dumps(content if ending else content | {"post_processor": None}))
    assert describe(directory).details["has_tokeniser"]
    encoder = fid.load(directory).encoder
    for question in QUESTIONS:
        ids = encoder.encode([fid.reader_input(question, PASSAGES[1][0])]).ids.tolist()
        assert ids == _input_ids(t5, question, PASSAGES[1][0])


def test_settings_of_an_old_slow_tokeniser(tmp_path: Path, t5: str) -> None:
    """tokenizer_config.json and special_tokens_map.json as transformers 4.1 saved them beside spiece.model."""
    old = write_t5_tokeniser(str(tmp_path / "old"))
    sentinels = [f"<extra_id_{index}>" for index in range(100)]
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    Path(old, "special_tokens_map.json").write_text(json.dumps(special | {"additional_special_tokens": sentinels}))
    settings = special | {"extra_ids": 100, "additional_special_tokens": sentinels, "model_max_length": 512}
    Path(old, "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = fid.load(write_fid(str(tmp_path / "fid")), tokeniser=old).encoder
    ids = encoder.encode([fid.reader_input("who?", LIBRARY)]).ids.tolist()
    assert ids == _input_ids(t5, "who?", LIBRARY)
    assert encoder.backend.decode([T5_PIECES, 0, 1, 2], skip_special_tokens=True) == ""


def test_a_written_answer_is_tidied(reader_of: Callable[[int], fid.FidReader]) -> None:
    reader = reader_of(0)
    pieces = ["<pad>", "▁the", "▁King", "▁", "'", "s", "<unk>", "▁book", "▁", ".", "</s>"]
    assert reader.text([reader.encoder.backend.token_to_id(piece) for piece in pieces]) == "the King's book."
