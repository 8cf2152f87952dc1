"""The spans of passages that questions are to be asked about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.models.base import AnswerExtractor, Span
from pipelines.questions import Line, batches, check_passage, checked

_BATCH = 64


def extract(lines: Iterable[Line], extractor: AnswerExtractor, batch_size: int = _BATCH) -> Iterator[Line]:
    """Yield each passage's line with `answers`, best first; a passage without any keeps its line.

    Raises InputError for a line that is no passage.
    """
    for batch in batches(checked(lines, check_passage), batch_size):
        found = extractor.extract([line["passage"] for line in batch])
        for line, spans in zip(batch, found, strict=True):
            yield {
                "passage_id": line["passage_id"],
                "passage": line["passage"],
                "answers": [_answer(span) for span in spans],
                "metadata": line.get("metadata", {}),
            }


def _answer(span: Span) -> dict[str, Any]:
    return {"text": span.text, "start": span.start, "end": span.end, "score": span.score}
