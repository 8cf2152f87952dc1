"""Questions about the spans of passages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.models.base import QuestionGenerator, Span
from pipelines.questions import Line, batches, check_passage, checked

_BATCH = 64  # spans


def generate(lines: Iterable[Line], generator: QuestionGenerator, batch_size: int = _BATCH) -> Iterator[Line]:
    """Yield a line for each question: those of a span together, best first, spans in the order of the input.

    lines: what `extract` yields. Raises InputError for a line of another shape, or a span that is not in its passage.
    """
    pairs = ((line, answer) for line in checked(lines, check_extracted) for answer in line["answers"])
    for batch in batches(pairs, batch_size):
        spans = [_span(answer) for _, answer in batch]
        titles = [line.get("metadata", {}).get("title", "") for line, _ in batch]
        questions = generator.generate(titles, [line["passage"] for line, _ in batch], spans)
        for (line, _), span, written in zip(batch, spans, questions, strict=True):
            yield from (_generated(line, span, question) for question in written)


def _span(answer: dict[str, Any]) -> Span:
    return Span(answer["text"], answer["start"], answer["end"], answer.get("score"))


def _generated(line: Line, span: Span, question: str) -> Line:
    """Return one line of the output. qg_score is null, as it is in the reference's."""
    about = {"answer_start": span.start, "answer_end": span.end, "ae_score": span.score, "qg_score": None}
    return {"passage_id": line["passage_id"], "answer": span.text, "question": question, "metadata": about}


def check_extracted(line: Line) -> str | None:
    """Return what is wrong with a line of extracted answers, or None."""
    if complaint := check_passage(line):
        return complaint
    if not isinstance(line.get("answers"), list):
        return "the line has no answers, or they are no list"
    complaints = (_check_answer(line["passage"], answer) for answer in line["answers"])
    return next((complaint for complaint in complaints if complaint), None)


def _check_answer(passage: str, answer: Any) -> str | None:
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        return "an answer is no object with a text"
    start, end = answer.get("start"), answer.get("end")
    if type(start) is not int or type(end) is not int or not 0 <= start <= end <= len(passage):
        return f"the answer {answer['text']!r} has no start and end within its passage"
    # The reference's "null" answer is an empty span with a text.
    if start < end and passage[start:end] != answer["text"]:
        return f"the answer {answer['text']!r} is not at {start} to {end}, where the passage has {passage[start:end]!r}"
    return None
