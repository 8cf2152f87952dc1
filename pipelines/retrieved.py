"""Files of retrieved candidates: PAQ's jsonl of QA pairs, DPR's JSON of passages; PAQ's reranker output.

    PAQ        lines   {"input_qa": {"question", "answer"}, "retrieved_qas": [{"question", "answer", "score"}]}
    DPR, FiD   one array, or lines   {"question", "answers", "ctxs": [{"id", "title", "text", "score"}]}
    reranked   lines   {"question", "prediction", "score", "index"}   (written only)

The order in a file is best first, and that order is kept. A score is kept as it was written: a dot product in most
files, but PAQ's faiss runs wrote squared L2 distances, of which the smaller is the better. So never sort by the scores
of a file; give the hits a `rerank_score`, or trust their order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal

from pipelines.errors import ConfigError, InputError
from pipelines.json_records import put_whole, read_records
from pipelines.schema import Hit, Passage, Question

Form = Literal["paq", "dpr", "reranked"]

_EXPECTED = 'an object with "input_qa" and "retrieved_qas" (PAQ), or with "question" and "ctxs" (DPR, FiD)'


@dataclass(frozen=True)
class RetrievedQuestion(Question):
    """A question of such a file. extra: what else the file says about it, written back as it is."""

    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RetrievedPassage(Passage):
    """A candidate of such a file. position: in its question's list, from 0. extra: as for a question.

    The id of a QA pair is empty when the file gives none.
    """

    position: int = -1
    extra: dict[str, Any] = field(default_factory=dict)


# Reading


def read_retrieved(url: str) -> Iterator[tuple[Question, list[Hit]]]:
    """Yield each question with its hits, best first, from a PAQ or a DPR file at a path or any fsspec URL.

    Which one it is, and whether an array or lines, is read from the content; compression is inferred from the name. A
    question without an id gets its ordinal, a hit's `row` is its position in the list, and a candidate without a score
    gets minus its position. DPR's scores may be strings. Ids keep their `wiki:` prefix.

    Raises InputError, naming the line, for a missing, empty, damaged or malformed file; StorageError when the store
    cannot be reached. Memory: one question at a time.
    """
    for ordinal, (where, record) in enumerate(read_records(url, _EXPECTED)):
        yield _record(record, ordinal, where)


def _record(record: dict[str, Any], ordinal: int, where: str) -> tuple[Question, list[Hit]]:
    if "retrieved_qas" in record and "input_qa" in record:
        asked, candidates, parse = record["input_qa"], record["retrieved_qas"], _qa_pair
        extra = {key: value for key, value in record.items() if key not in ("input_qa", "retrieved_qas")}
        if not isinstance(asked, dict):
            raise InputError("`input_qa` is no object", where=where, expected=_EXPECTED)
        own = _rest(asked, "question", "answer")
        extra = {"input_qa": own} | extra if own else extra
    elif "ctxs" in record:
        asked, candidates, parse = record, record["ctxs"], _context
        extra = _rest(record, "question", "answers", "ctxs")
    else:
        what = "the record is neither PAQ's nor DPR's"
        raise InputError(what, where=where, expected=_EXPECTED, hint="PAQ's reranker output holds no candidates")
    if not isinstance(candidates, list) or not all(isinstance(one, dict) for one in candidates):
        raise InputError("the candidates are no list of objects", where=where, expected=_EXPECTED)
    answers = _strings(asked, "answer" if "answer" in asked else "answers", where)
    identity = str(asked["id"]) if isinstance(asked.get("id"), str | int) else str(ordinal)
    question = RetrievedQuestion(identity, _text(asked, "question", where), answers, extra=extra)
    return question, [_hit(one, parse, i, f"{where}, candidate {i}") for i, one in enumerate(candidates)]


Parse = Callable[[dict[str, Any], int, str], RetrievedPassage]


def _hit(candidate: dict[str, Any], parse: Parse, position: int, where: str) -> Hit:
    found = candidate.get("score")
    score = float(-position) if found is None else _score(found, where)
    again = candidate.get("rerank_score")
    rerank_score = None if again is None else _score(again, where)
    return Hit(position, score, parse(candidate, position, where), rerank_score)


def _qa_pair(candidate: dict[str, Any], position: int, where: str) -> RetrievedPassage:
    answers = _strings(candidate, "answer", where)
    extra = _rest(candidate, "id", "question", "answer", "score", "rerank_score")
    text = _text(candidate, "question", where)
    return RetrievedPassage(_id(candidate, where), "", text, answers, position=position, extra=extra)


def _context(candidate: dict[str, Any], position: int, where: str) -> RetrievedPassage:
    answers = _strings(candidate, "answers", where) if "answers" in candidate else None
    extra = _rest(candidate, "id", "title", "text", "score", "rerank_score", "answers")
    title = "" if candidate.get("title") is None else _text(candidate, "title", where)
    text = _text(candidate, "text", where)
    return RetrievedPassage(_id(candidate, where), title, text, answers, position=position, extra=extra)


def _rest(record: dict[str, Any], *known: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in known}


def _id(candidate: dict[str, Any], where: str) -> str:
    value = candidate.get("id", "")
    return str(value) if isinstance(value, int) else _text({"id": value or ""}, "id", where)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        what = f"`{key}` is missing" if value is None else f"`{key}` holds a {type(value).__name__}"
        raise InputError(what, where=where, expected="a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokeniser takes it
        raise InputError(f"`{key}` is not valid Unicode ({error})", where=where, expected="whole characters") from error
    return value


def _strings(record: dict[str, Any], key: str, where: str) -> list[str]:
    """Return a string or a list of strings as a list; nothing as none."""
    value = record.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [_text({key: one}, key, where) for one in values]


def _score(value: Any, where: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"`score` holds {str(value)[:40]!r}", where=where, expected="a finite number")
    return score


# Writing


def write_retrieved(url: str, records: Iterable[tuple[Question, list[Hit]]], form: Form = "paq") -> int:
    """Write the records at a path or any fsspec URL, whole or not at all. Returns how many were written.

    form: "paq" or "reranked" (lines), "dpr" (one array, scores as strings, has_answer computed where it is not known).
    The order of the hits is kept and says what is best; "reranked" takes the hit with the highest `rerank_score`,
    or the first where none has one, and its index is its position in the list that was retrieved; without hits the
    prediction is empty, the score null, the index -1. Compressed as the name says: .gz, .bz2, .xz, .zst.

    Raises InputError for "paq" or "reranked" when a hit is no QA pair, or has a score that is no number; ConfigError
    for another form.
    """
    makers: dict[str, Callable[[Question, list[Hit]], dict[str, Any]]] = {
        "paq": _to_paq,
        "dpr": _to_dpr,
        "reranked": _to_reranked,
    }
    if form not in makers:
        raise ConfigError(f"unknown form {form!r}", expected=", ".join(makers))
    count = 0

    def fill(stream: BinaryIO) -> None:
        nonlocal count
        opening, between, closing = ("[\n", ",\n", "\n]\n") if form == "dpr" else ("", "\n", "\n")
        stream.write(opening.encode())
        for question, hits in records:
            text = _dump(makers[form](question, hits), question)
            stream.write(((between if count else "") + text).encode())
            count += 1
        stream.write((closing if count or form == "dpr" else "").encode())

    put_whole(url, fill)
    return count


def _dump(record: dict[str, Any], question: Question) -> str:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        where = f"question {question.id!r}"
        raise InputError(f"the record cannot be written: {error}", where=where, expected="finite scores") from error


def _to_paq(question: Question, hits: list[Hit]) -> dict[str, Any]:
    extra = dict(_extra(question))
    asked = {"question": question.text, "answer": question.answers} | _own_id(question) | extra.pop("input_qa", {})
    pairs = []
    for hit in hits:
        answers = _answers(question, hit)
        identity = {"id": hit.passage.id} if hit.passage.id else {}
        pair = {"question": hit.passage.text, "answer": answers, "score": hit.score}
        pairs.append(identity | pair | _rerank_score(hit) | _extra(hit.passage))
    return {"input_qa": asked, "retrieved_qas": pairs} | extra


def _to_dpr(question: Question, hits: list[Hit]) -> dict[str, Any]:
    contexts = []
    for hit in hits:
        passage, extra = hit.passage, _extra(hit.passage)
        context: dict[str, Any] = {
            "id": passage.id,
            "title": passage.title,
            "text": passage.text,
            "score": str(hit.score),
        }
        context |= _rerank_score(hit)
        if passage.answers is not None:
            context["answers"] = passage.answers
        if "has_answer" not in extra and question.answers:
            from pipelines.evaluate import has_answer

            context["has_answer"] = has_answer(passage.text, question.answers)
        contexts.append(context | extra)
    asked = {"question": question.text, "answers": question.answers} | _own_id(question) | _extra(question)
    return asked | {"ctxs": contexts}


def _to_reranked(question: Question, hits: list[Hit]) -> dict[str, Any]:
    if not hits:
        return {"question": question.text, "prediction": "", "score": None, "index": -1}
    reranked = [hit for hit in hits if hit.rerank_score is not None]
    best = max(reranked, key=lambda hit: hit.rerank_score or 0.0) if reranked else hits[0]
    score = best.score if best.rerank_score is None else best.rerank_score
    prediction = _answers(question, best)[0]
    return {"question": question.text, "prediction": prediction, "score": score, "index": _position(hits, best)}


def _position(hits: list[Hit], hit: Hit) -> int:
    """Return where the hit was in the list that was retrieved: as the file said, else by its retrieval score."""
    if isinstance(hit.passage, RetrievedPassage):
        return hit.passage.position
    return next(i for i, other in enumerate(sorted(hits, key=lambda one: -one.score)) if other is hit)


def _answers(question: Question, hit: Hit) -> list[str]:
    if not hit.passage.answers:
        where = f"question {question.id!r}, candidate {hit.passage.id or hit.passage.text[:60]!r}"
        expected = "QA pairs; write passages with form dpr"
        raise InputError("a candidate has no answer", where=where, expected=expected)
    return hit.passage.answers


def _rerank_score(hit: Hit) -> dict[str, Any]:
    return {} if hit.rerank_score is None else {"rerank_score": hit.rerank_score}


def _extra(item: Question | Passage) -> dict[str, Any]:
    return item.extra if isinstance(item, RetrievedQuestion | RetrievedPassage) else {}


def _own_id(question: Question) -> dict[str, Any]:
    """Return the id of a question that came with one: those of a file keep theirs among the extra keys."""
    return {} if isinstance(question, RetrievedQuestion) else {"id": question.id}
