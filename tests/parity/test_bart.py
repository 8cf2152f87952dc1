"""PAQ's question generators against transformers' own beam search, and a greedy search by hand."""

from __future__ import annotations

import json
import os
import pickle
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import CheckpointError, ConfigError, InputError
from pipelines.models import bart, describe, find_family, find_model
from pipelines.models.base import Span
from pipelines.models.tokens import clean_spaces
from tests.checkpoints import _Draw, _write_json, write_cross_encoder, write_dpr, write_paq
from tests.checkpoints.questions import BART_SPECIAL, rewrite_config, rewrite_weights, write_bart

FAMILY = "PAQ question generator"
TITLES = ["Alexandria", "", "Great library", "Ray", "café"]
TEXTS = [
    "The library of Alexandria was the first great library.",
    "A king's war, in a river.",
    "war " * 30,
    "Who wrote the book?? Ägypten 👑 9,787",
    "In the city: café, " + unicodedata.normalize("NFD", "Ägypten"),
]
SPANS = [Span("Alexandria", 15, 25), Span("king", 2, 6), Span("war", 4, 7), Span("👑", 29, 30), Span("café", 13, 17)]


def _sources(*, titled: bool = True) -> list[str]:
    return [
        (f"answer: {span.text} | title: {title} | context: " if titled else f"answer: {span.text} | context: ")
        + f"{text[: span.start]}** {text[span.start : span.end]} **{text[span.end :]}"
        for title, text, span in zip(TITLES, TEXTS, SPANS, strict=True)
    ]


class _Oracle:
    """transformers' classes on one source at a time, without padding, with the arguments of PAQ's configs."""

    def __init__(self, directory: str) -> None:
        import torch
        from transformers import BartForConditionalGeneration, BartTokenizer

        self.model = BartForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokeniser = BartTokenizer.from_pretrained(directory)

    def questions(self, sources: Sequence[str], **arguments: Any) -> list[list[str]]:
        import torch

        given = {"num_beams": 4, "num_return_sequences": 1, "max_length": 20, "min_length": 3, "do_sample": False}
        given |= {"forced_eos_token_id": 2, "no_repeat_ngram_size": 3, "early_stopping": True} | arguments
        with torch.inference_mode():
            rows = [self.model.generate(**self.tokeniser(source, return_tensors="pt"), **given) for source in sources]
        return [[self._text(ids) for ids in row.tolist()] for row in rows]

    def _text(self, ids: list[int]) -> str:
        decoded = self.tokeniser.decode(ids, skip_special_tokens=True)
        return str(self.tokeniser.clean_up_tokenization(decoded)).strip()

    def greedy(self, source: str) -> str:
        """Return the greedy question by hand: 3-grams never twice, no end before 3 tokens, the end at the 20th."""
        import torch

        encoded, out = self.tokeniser(source, return_tensors="pt"), [2]
        while len(out) < 20 and (len(out) == 1 or out[-1] != 2):
            with torch.inference_mode():
                logits = self.model(**encoded, decoder_input_ids=torch.tensor([out]), use_cache=False).logits
            scores = logits[0, -1].numpy().copy()
            seen = {tuple(out[at : at + 3]) for at in range(len(out) - 2)}
            banned = [gram[2] for gram in seen if gram[:2] == tuple(out[-2:])] + ([2] if len(out) < 3 else [])
            scores[banned] = -np.inf
            out.append(2 if len(out) == 19 else int(scores.argmax()))
        return self._text(out)


@cache
def _shared(folder: Path) -> str:
    return write_bart(str(folder / "shared-bart"), seed=1)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A generator that several tests read and none changes."""
    return _shared(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_questions_equal_transformers(tmp_path: Path, parity: Callable[..., None], count: int, seed: int) -> None:
    directory = write_bart(str(tmp_path), seed=seed)
    assert find_model(directory, "question-generator") is bart
    theirs = _Oracle(directory).questions(_sources(), num_return_sequences=count)
    assert {len(question.split()) for row in theirs for question in row} - {1}
    ours = bart.load(directory, num_questions=count).generate(TITLES, TEXTS, SPANS)
    parity(FAMILY, f"4.1 .bin, {count} a span, weights {seed}", "transformers generate, unbatched", ours, theirs)


def test_greedy_equals_a_loop_by_hand(directory: str, parity: Callable[..., None]) -> None:
    oracle = _Oracle(directory)
    theirs = [[oracle.greedy(source)] for source in _sources()]
    lengths = {len(oracle.tokeniser(question)["input_ids"]) for row in theirs for question in row}
    assert len(lengths) > 2
    ours = bart.load(directory, num_beams=1).generate(TITLES, TEXTS, SPANS)
    parity(FAMILY, "greedy", "a loop without cache", ours, theirs)


def test_the_last_token_is_the_end(tmp_path: Path) -> None:
    """Else a word more is written: the 20th token, which transformers 4.1 always made the end."""
    directory = write_bart(str(tmp_path), end_bias=0.0)
    oracle, ours = _Oracle(directory), bart.load(directory).generate(TITLES, TEXTS, SPANS)
    assert ours == oracle.questions(_sources())
    assert ours != oracle.questions(_sources(), forced_eos_token_id=None)


def test_no_space_stands_before_punctuation(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    bias = np.full((1, len(vocabulary)), -9.0, dtype=np.float32)
    bias[0, [vocabulary[piece] for piece in ("Ġ?", "Ġ,", "Ġking", "Ġwar", "Ġwho")]] = 3.0
    rewrite_weights(directory, final_logits_bias=bias)
    oracle, generator = _Oracle(directory), bart.load(directory)
    ours = generator.generate(TITLES, TEXTS, SPANS)
    assert ours == oracle.questions(_sources())
    oracle.tokeniser.clean_up_tokenization = lambda text: text
    assert ours != oracle.questions(_sources())


def test_titles_can_be_left_out(directory: str) -> None:
    ours = bart.load(directory, include_title=False).generate(TITLES, TEXTS, SPANS)
    assert ours == _Oracle(directory).questions(_sources(titled=False))
    assert ours != bart.load(directory).generate(TITLES, TEXTS, SPANS)


def test_the_checkpoint_says_how_to_generate(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path), seed=1, no_repeat_ngram_size=1, early_stopping=False, length_penalty=3.0)
    own = {"no_repeat_ngram_size": 1, "early_stopping": False, "length_penalty": 3.0}
    ours = bart.load(directory).generate(TITLES, TEXTS, SPANS)
    assert ours == _Oracle(directory).questions(_sources(), **own) != _Oracle(directory).questions(_sources())
    theirs = _Oracle(directory).questions(_sources(), **own | {"no_repeat_ngram_size": 2})
    _write_json(directory, "generation_config.json", {"no_repeat_ngram_size": 2, "do_sample": True})
    assert bart.load(directory).generate(TITLES, TEXTS, SPANS) == theirs != ours


def test_the_old_key_that_forces_the_first_token(tmp_path: Path, directory: str) -> None:
    forced = write_bart(str(tmp_path), seed=1, force_bos_token_to_be_generated=True)
    theirs = _Oracle(directory).questions(_sources(), forced_bos_token_id=0)
    assert bart.load(forced).generate(TITLES, TEXTS, SPANS) == theirs != _Oracle(directory).questions(_sources())


def test_batch_and_order_do_not_matter(directory: str) -> None:
    generator = bart.load(directory, num_questions=4)
    whole = generator.generate(TITLES, TEXTS, SPANS)
    for size in (1, 2):
        assert bart.load(directory, num_questions=4, batch_size=size).generate(TITLES, TEXTS, SPANS) == whole
    assert generator.generate(TITLES[::-1], TEXTS[::-1], SPANS[::-1])[::-1] == whole
    assert generator.generate(TITLES[:2] * 2, TEXTS[:2] * 2, SPANS[:2] * 2) == whole[:2] * 2
    assert generator.generate([], [], []) == []


@pytest.mark.parametrize(
    ("weights", "tied"),
    [
        ("safetensors", ()),
        ("bin", ("lm_head.weight",)),
        ("bin", ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")),
    ],
)
def test_every_way_to_save_the_shared_embedding(tmp_path: Path, directory: str, weights: str, tied: Any) -> None:
    other = write_bart(str(tmp_path), weights=weights, tied=tied, seed=1)
    assert bart.load(other).generate(TITLES, TEXTS, SPANS) == bart.load(directory).generate(TITLES, TEXTS, SPANS)


def test_old_files_without_shared_and_bias(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path))
    rewrite_weights(directory, final_logits_bias=np.zeros((1, _vocabulary(directory)), np.float32))
    with_zeros = bart.load(directory).generate(TITLES, TEXTS, SPANS)
    extra = {"model.encoder.version": np.array([3.0]), "model.decoder.version": np.array([3.0])}
    rewrite_weights(directory, ["final_logits_bias", "model.shared.weight"], **extra)
    assert bart.load(directory).generate(TITLES, TEXTS, SPANS) == with_zeros


def _vocabulary(directory: str) -> int:
    return int(json.loads((Path(directory) / "config.json").read_text())["vocab_size"])


def test_an_fp16_copy_loads_as_asked(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path), dtype="float16", seed=1)
    generator = bart.load(directory)
    assert str(generator.model.dtype) == "torch.float32"
    assert generator.generate(TITLES, TEXTS, SPANS) == _Oracle(directory).questions(_sources())
    assert str(bart.load(directory, "bf16").model.dtype) == "torch.bfloat16"


def test_source_text() -> None:
    text, span = "Who built Alexandria?", Span("Alexandria", 10, 20)
    source, start, end = bart.source_text("A city", text, span)
    assert source == "answer: Alexandria | title: A city | context: Who built ** Alexandria **?"
    assert source[start:end] == "** Alexandria **"
    assert bart.source_text("", text, span)[0] == "answer: Alexandria | title:  | context: Who built ** Alexandria **?"
    assert bart.source_text(None, text, span)[0] == "answer: Alexandria | context: Who built ** Alexandria **?"
    null = bart.source_text("T", text, Span("null", 0, 0))[0]
    assert null == "answer: null | title: T | context: **  **Who built Alexandria?"


def test_fixed_tokens(directory: str) -> None:
    """Byte-level: case and accents stay, a space begins the token behind it."""
    backend = bart.load(directory).encoder.backend
    encoding = backend.encode("answer: the Ä")
    assert encoding.tokens == ["<s>", "a", "n", "s", "w", "e", "r", ":", "Ġthe", "ĠÃ"[0], "Ã", "Ħ", "</s>"]
    assert encoding.ids[0] == 0
    assert encoding.ids[-1] == 2
    theirs = _Oracle(directory).tokeniser(_sources())["input_ids"]
    assert bart.load(directory).encoder.encode(TITLES, TEXTS, SPANS) == theirs


@pytest.mark.parametrize(
    "text",
    ["king 's ' book '", "do n't , I 'm ! you 've ? they 're ' so '", "a . b ,c", "I 'm ? ' ' ' x", "  a ,, b", ""],
)
def test_spaces_are_cleaned_as_transformers_does(directory: str, text: str) -> None:
    assert clean_spaces(text) == _Oracle(directory).tokeniser.clean_up_tokenization(text)


@pytest.mark.parametrize("place", [0, 100, 4000, 99_999])
def test_a_long_context_is_cut_around_the_span(directory: str, place: int) -> None:
    words = [f"w{n}" for n in range(2000)]
    text = " ".join(words)
    start = text.index(" ", min(place, len(text) - 20)) + 1 if place else 0
    end = text.find(" ", start) if text.find(" ", start) > 0 else len(text)
    span = Span(text[start:end], start, end)
    encoder = bart.load(directory).encoder
    (ids,) = encoder.encode(["Alexandria"], [text], [span])
    assert len(ids) == 256
    cut = encoder.backend.decode(ids)
    head = f"answer: {span.text} | title: Alexandria | context: "
    assert cut.startswith(head.rstrip())
    marked = f"** {span.text} **"
    assert cut.count(marked) == 1
    left, right = cut[len(head.rstrip()) :].split(marked)
    assert text[:start].endswith(left.removeprefix(" "))
    assert text[end:].startswith(right)
    assert place != 4000 or abs(len(left) - len(right)) < 10


def test_exactly_the_limit_is_not_cut(directory: str) -> None:
    encoder, text = bart.load(directory).encoder, "war " + "x" * 300
    whole = len(encoder.backend.encode(bart.source_text("", text, Span("war", 0, 3))[0]).ids)
    short = text[: len(text) - (whole - 256)]
    (ids,) = encoder.encode([""], [short], [Span("war", 0, 3)])
    assert encoder.backend.decode(ids).endswith(short[3:])
    (cut,) = encoder.encode([""], [short + "y"], [Span("war", 0, 3)])
    assert len(ids) == len(cut) == 256


def test_a_text_of_a_megabyte(directory: str) -> None:
    text = "Alexandria " * 95_000
    (questions,) = bart.load(directory).generate(["T"], [text], [Span("Alexandria", 11, 21)])
    assert len(questions) == 1


def test_spans_that_cannot_be_asked_about(directory: str) -> None:
    generator = bart.load(directory)
    for start, end in [(-1, 2), (3, 2), (0, 99)]:
        with pytest.raises(InputError, match="does not lie in a text of 5 characters"):
            generator.generate(["T"], ["texts"], [Span("te", start, end)])
    with pytest.raises(InputError, match="more than the model's 256"):
        generator.generate(["T" * 400], ["texts"], [Span("te", 0, 2)])


def test_what_it_is(tmp_path: Path, directory: str) -> None:
    described = describe(directory)
    assert (described.family, described.kind, described.max_length) == ("bart", "question-generator", 256)
    with pytest.raises(CheckpointError, match="question generator"):
        find_family(directory)
    others = [
        write_dpr(str(tmp_path / "dpr"), "query"),
        write_paq(str(tmp_path / "paq")),
        write_cross_encoder(str(tmp_path / "cross")),
        write_bart(str(tmp_path / "classifier"), architectures=["BartForSequenceClassification"]),
        str(tmp_path / "dpr" / "config.json"),
        str(tmp_path / "absent"),
    ]
    assert [bart.recognises(other) for other in others] == [False] * 6


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path))
    rewrite_weights(directory, ["model.decoder.layers.1.encoder_attn.k_proj.bias"])
    with pytest.raises(CheckpointError, match="encoder_attn"):
        bart.load(directory)


def test_other_barts_are_refused(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path / "head"))
    draw = _Draw(0)
    draw.linear("classification_head.dense", 4, 32)
    rewrite_weights(directory, **draw.state)
    with pytest.raises(CheckpointError, match="classifies or reads"):
        find_model(directory, "question-generator")
    bare = write_bart(str(tmp_path / "bare"))
    import torch

    state = torch.load(tmp_path / "bare" / "pytorch_model.bin", weights_only=True)
    torch.save({n.removeprefix("model."): t for n, t in state.items()}, tmp_path / "bare" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="without its generating part"):
        find_model(bare, "question-generator")


def test_copies_of_the_embedding_that_differ_are_refused(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path))
    shape = (_vocabulary(directory), 32)
    rewrite_weights(directory, **{"lm_head.weight": np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model\.shared\.weight"):
        bart.load(directory)
    rewrite_weights(directory, ["lm_head.weight", "model.shared.weight", "model.encoder.embed_tokens.weight",
                                "model.decoder.embed_tokens.weight"])  # fmt: skip
    with pytest.raises(CheckpointError, match=r"lack model\.shared\.weight"):
        bart.load(directory)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    directory = write_bart(str(tmp_path))
    rewrite_config(directory, encoder_ffn_dim=63)
    with pytest.raises(CheckpointError, match="do not fit"):
        bart.load(directory)


class _Evil:
    def __init__(self, proof: str) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.proof,)


def test_damaged_and_malicious_files_are_refused(tmp_path: Path) -> None:
    directory, proof = write_bart(str(tmp_path / "bart")), tmp_path / "proof"
    path = Path(directory) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(CheckpointError, match="damaged"):
        find_model(directory, "question-generator")
    path.write_bytes(pickle.dumps({"model.shared.weight": _Evil(str(proof))}, protocol=2))
    with pytest.raises(CheckpointError, match="holds code"):
        find_model(directory, "question-generator")
    assert not proof.exists()
    (Path(directory) / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="no tokeniser"):
        find_model(directory, "question-generator")


def test_numbers_that_cannot_be_meant(directory: str) -> None:
    with pytest.raises(ConfigError, match="num_questions is 5"):
        bart.load(directory, num_questions=5)
    with pytest.raises(ConfigError, match="cannot be meant"):
        bart.load(directory, min_length=20)
    assert BART_SPECIAL[2] == "</s>"
