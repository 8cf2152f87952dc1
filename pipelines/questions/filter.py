"""Filter: mark every generated question by whether a reader, given evidence, answers what the question was made from.

Nothing is removed: `metadata.consistent` and `metadata.filter_answer` are set, and what to do with inconsistent
questions is left to the user. Evidence decides the mode. Global: the passages that a retriever finds among all of them.
Local: the one passage the question came from. Dummy: none, and every question counts as consistent. Source of the
three modes and the test (exact match of the reader's answer and the extracted one): Lewis et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipelines.errors import ConfigError
from pipelines.evaluate import exact_match
from pipelines.models.base import Answer, Reader
from pipelines.models.paq import normalise_question
from pipelines.questions import Line, batches, checked
from pipelines.questions.group import check_generated
from pipelines.schema import Hit, Passage

Evidence = Callable[[list[Line]], list[list[Passage]]]
"""The passages from which the reader is to answer each line; none is allowed."""
GLOBAL_DEPTH = 50


def filter_questions(lines: Iterable[Line], reader: Reader, evidence: Evidence, batch_size: int = 32) -> Iterator[Line]:
    """Yield a copy of each line, in order, with `metadata.consistent` and `metadata.filter_answer`.

    filter_answer is the reader's best answer, None where there was no evidence or no answer (then not consistent).
    The reader gets the question as it is written, without outer whitespace. batch_size: lines that evidence and reader
    see at once. Raises InputError for a line that is no generated question.
    """
    for batch in batches(checked(lines, check_generated), batch_size):
        found = evidence(batch)
        answers = reader.answer([line["question"].strip() for line in batch], found)
        for line, own in zip(batch, answers, strict=True):
            yield _marked(line, own)


def mark_all(lines: Iterable[Line]) -> Iterator[Line]:
    """Yield a copy of each line as consistent, with nothing read: the dummy mode. Raises InputError as above."""
    for line in checked(lines, check_generated):
        yield _with_metadata(line, True, None)


def global_evidence(
    search: Callable[[list[str], int], list[list[Hit]]], k: int = GLOBAL_DEPTH, *, normalise: bool = True
) -> Evidence:
    """Return evidence from a search over all passages, `pipelines.retrieve.Retriever.search` or the like.

    search(queries, k) gives up to k hits a query. normalise: give it each question lower-cased and without outer
    question marks, as PAQ does; not where the search's own encoder does so, because twice is not the same as once.
    """
    if k < 1:
        raise ConfigError(f"k is {k}: global evidence needs passages", expected="1 or more")

    def find(lines: list[Line]) -> list[list[Passage]]:
        questions = [line["question"] for line in lines]
        hits = search([normalise_question(q) for q in questions] if normalise else questions, k)
        return [[hit.passage for hit in own] for own in hits]

    return find


def local_evidence(passage_of: Callable[[str], Passage | None]) -> Evidence:
    """Return evidence from the passage that each question came from.

    passage_of: the passage with this id, or None when it is not known (the question has no evidence then).
    """

    def find(lines: list[Line]) -> list[list[Passage]]:
        sources = [passage_of(str(line["passage_id"])) for line in lines]
        return [[] if source is None else [source] for source in sources]

    return find


def _marked(line: Line, answers: list[Answer]) -> Line:
    if not answers:
        return _with_metadata(line, False, None)
    best = answers[0].text
    return _with_metadata(line, exact_match(best, [line["answer"]]), best)


def _with_metadata(line: Line, consistent: bool, answer: str | None) -> Line:
    metadata = {**(line.get("metadata") or {}), "consistent": consistent, "filter_answer": answer}
    return {**line, "metadata": metadata}
