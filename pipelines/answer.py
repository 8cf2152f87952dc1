"""Answer a question from its hits: a reader over the passages, or the answers that QA pairs carry."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pipelines.errors import ConfigError
from pipelines.models.base import Answer, ModelFamily, Reader
from pipelines.schema import Hit, Passage

STORED = "stored"
"""In place of a reader's checkpoint: take the answers that the found QA pairs carry."""


class StoredAnswers:
    """A reader that reads nothing: the first answer of the first QA pair among the passages (PAQ)."""

    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> list[list[Answer]]:
        """Return one answer a question, none where no passage carries any.

        score: 1 / rank of the passage, the first being 1. passage: its position.
        """
        return [_stored(own) for _, own in zip(questions, passages, strict=True)]


def _stored(passages: Sequence[Passage]) -> list[Answer]:
    for position, passage in enumerate(passages):
        if passage.answers:
            return [Answer(passage.answers[0], 1.0 / (position + 1), position)]
    return []


def answer(reader: Reader, question: str, hits: Sequence[Hit], depth: int) -> list[Answer]:
    """Return the reader's answers from the first `depth` hits, best first; `passage` is a position among the hits."""
    (found,) = answers(reader, [question], [hits], depth)
    return found


def answers(
    reader: Reader, questions: Sequence[str], hits_per_question: Sequence[Sequence[Hit]], depth: int
) -> list[list[Answer]]:
    """Return `answer` for each question and its hits. Raises ConfigError when `depth` leaves nothing to read."""
    if depth < 1:
        raise ConfigError(f"depth is {depth}: there is nothing to answer from", expected="1 or more")
    return reader.answer(questions, [[hit.passage for hit in hits[:depth]] for hits in hits_per_question])


def answers_within(
    reader: Reader, questions: Sequence[str], hits_per_question: Sequence[Sequence[Hit]], depth: int, seconds: float
) -> list[list[Answer]] | None:
    """Answer as `answers`, or return None once `seconds` are over: looked at before each question."""
    deadline = time.monotonic() + seconds
    found: list[list[Answer]] = []
    for question, hits in zip(questions, hits_per_question, strict=True):
        if time.monotonic() > deadline:
            return None
        found += answers(reader, [question], [hits], depth)
    return found


def load_reader(checkpoint: str, dtype: str = "fp32", device: str = "cpu", tokeniser: str | None = None) -> Reader:
    """Return the reader of `checkpoint`: "stored", or a directory, URL or hub name (a DPR reader, a FiD reader).

    dtype: fp32, bf16, fp16, or auto for what the hardware has. tokeniser: directory, URL or hub name of the tokeniser,
    for a reader that comes without one. Raises CheckpointError when the checkpoint is no reader or incomplete,
    ConfigError for a tokeniser where none can be used.
    """
    if checkpoint == STORED:
        check_reader(checkpoint, tokeniser)
        return StoredAnswers()
    from pipelines.encode import settle_compute

    family, directory, options = _find_reader(checkpoint, tokeniser)
    settled = settle_compute(dtype, device)
    if dtype == "auto" and settled == "fp16":
        import torch

        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        settled = "bf16" if has_bf16 else "fp32"  # a T5 overflows in fp16
    reader: Reader = family.load(directory, settled, device, **options)
    return reader


def check_reader(checkpoint: str, tokeniser: str | None = None) -> None:
    """Raise what `load_reader` would raise before it comes to the weights."""
    if checkpoint != STORED:
        _find_reader(checkpoint, tokeniser)
    elif tokeniser is not None:
        raise ConfigError("answer.tokeniser: stored answers are not read by a model", expected="no tokeniser")


def _find_reader(checkpoint: str, tokeniser: str | None) -> tuple[ModelFamily, str, dict[str, Any]]:
    """Return the family, the local directory and the options of `load`."""
    from pipelines.models import find_model, tokeniser_options
    from pipelines.models.fetch import fetch

    directory = fetch(checkpoint)
    family = find_model(directory, "reader")
    return family, directory, tokeniser_options(family, directory, tokeniser, "answer.tokeniser")
