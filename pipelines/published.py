"""The published figures that can be measured again with one's own copy of the weights and the data.

A row is a released model with the figures its authors printed, the data sets they hold on, and what has to be supplied.
The rows themselves are in benchmarks/rows.py. All figures but `docs_per_second` are in per cent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.errors import ConfigError, nearest
from pipelines.models.base import Formatting, Similarity


@dataclass(frozen=True)
class Data:
    """A data set and its split. num_questions: how many the published figure is a mean over, where that is known.

    regex_answers: accepted answers are regular expressions (CuratedTREC), not text.
    """

    title: str
    num_questions: int | None = None
    regex_answers: bool = False


@dataclass(frozen=True)
class Figure:
    """One printed number: `metric` on data set `data` (a key of DATA) was `value`."""

    data: str
    metric: str
    value: float


@dataclass(frozen=True)
class Task:
    """What is measured. needs: every input key and what it holds; ways: sets of keys that suffice, preferred first.

    optional: keys that may come on top of any way.
    """

    title: str
    needs: Mapping[str, str]
    ways: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A published row. similarity, formatting: how the model was used there, where its files may not say so."""

    name: str
    task: str
    figures: tuple[Figure, ...]
    source: str
    similarity: Similarity | None = None
    formatting: Formatting | None = None
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def data(self) -> tuple[str, ...]:
        """The data sets that this row has figures on, in the order printed."""
        return tuple(dict.fromkeys(figure.data for figure in self.figures))


DATA: dict[str, Data] = {
    "nq-dev": Data("Natural Questions, dev", 8_757),
    "nq-test": Data("Natural Questions, test", 3_610),
    "trivia-test": Data("TriviaQA, test", 11_313),
    "wq-test": Data("WebQuestions, test", 2_032),
    "trec-test": Data("CuratedTREC, test", 694, regex_answers=True),
    "squad-test": Data("SQuAD 1.1, as open-domain test", 10_570),
    "stsb-test": Data("STS benchmark, test", 1_379),
    "msmarco-dev": Data("MS MARCO passages, dev small", 6_980),
    "dl19": Data("TREC 2019 Deep Learning, passages", 43),
    "nq-dev-small": Data("Natural Questions, dev small of sentence-transformers"),
}

_DIRECTORY = "directory (or hub name) of"
_INDEX = {"root": "root folder of Pinakes", "index": "name of an index in it, built with this row's encoder"}
_QRELS = "relevance: query id, 0, passage id, grade (TREC qrels)"
_COLLECTION = "passages without header or quoting: id<tab>text, or id<tab>title<tab>text (collection.tsv)"
_QUERIES = "queries: id<tab>text (queries.dev.small.tsv)"

TASKS: dict[str, Task] = {
    "qa-retrieval": Task(
        "question answering by the nearest stored question",
        {"checkpoint": f"{_DIRECTORY} the PAQ retriever",
         "corpus": 'JSON lines of QA pairs: {"question", "answer": [...]} (tqa-train-nq-train-PAQ.jsonl)',
         "questions": 'JSON lines: {"question", "answer": [...]} (NQ-open.test.jsonl)',
         **_INDEX,
         "reranker": f"{_DIRECTORY} the PAQ reranker, for the reranked figure"},
        (("checkpoint", "corpus", "questions"), ("root", "index", "questions")),
        ("reranker",),
    ),
    "qa-rerank": Task(
        "question answering by reranked stored questions",
        {"reranker": f"{_DIRECTORY} the PAQ reranker",
         "retrieved": 'JSON lines, as PAQ retrieves: {"input_qa", "retrieved_qas"} (multi_xlarge_nq_test.jsonl)'},
        (("reranker", "retrieved"),),
    ),
    "passage-retrieval": Task(
        "passages that hold an accepted answer",
        {"checkpoint": f"{_DIRECTORY} the passage (context) encoder",
         "query_checkpoint": f"{_DIRECTORY} the question encoder; a .cp file holds both, so give it twice",
         "corpus": "TSV with header id, text, title (psgs_w100.tsv)",
         "questions": "DPR's question<tab>['answer', ...] (nq-test.csv), or JSON lines",
         **_INDEX,
         "results": "DPR's JSON of results: [{question, answers, ctxs: [{id, title, text}]}]"},
        (("checkpoint", "query_checkpoint", "corpus", "questions"), ("root", "index", "questions"), ("results",)),
    ),
    "sts": Task(
        "rank correlation of cosine and human similarity",
        {"checkpoint": f"{_DIRECTORY} the encoder",
         "sts": "scored pairs: a header with score, sentence1, sentence2 and perhaps split (stsbenchmark.tsv.gz), "
                "or the original sts-test.csv"},
        (("checkpoint", "sts"),),
    ),
    "msmarco-retrieval": Task(
        "rank of the first relevant passage",
        {"checkpoint": f"{_DIRECTORY} the encoder",
         "query_checkpoint": f"{_DIRECTORY} the query encoder, where it is another one",
         "collection": _COLLECTION, "queries": _QUERIES, "qrels": _QRELS},
        (("checkpoint", "collection", "queries", "qrels"),),
        ("query_checkpoint",),
    ),
    "msmarco-rerank": Task(
        "reranked candidates",
        {"reranker": f"{_DIRECTORY} the cross-encoder",
         "top1000": "candidates: query id, passage id, query, passage (top1000.dev.tsv); ids suffice with `queries` "
                    "and `collection`",
         "qrels": _QRELS, "queries": _QUERIES, "collection": _COLLECTION},
        (("reranker", "top1000", "queries", "collection", "qrels"), ("reranker", "top1000", "qrels")),
    ),
}  # fmt: skip


def rows() -> tuple[Row, ...]:
    """Return every published row, in the order of the sources."""
    from pipelines.benchmarks.rows import all_rows

    return all_rows()


def find(name: str) -> Row:
    """Return the row of this name, whatever its case, or of its model's released name.

    Raises ConfigError naming the nearest row.
    """
    named = {row.name.casefold(): row for row in rows()}
    aliases = {alias.casefold(): row for row in rows() for alias in row.aliases}
    found = named.get(name.casefold()) or aliases.get(name.casefold())
    if found:
        return found
    guess = nearest(name, [row.name for row in rows()])
    hint = f"did you mean {guess!r}?" if guess else "the names are in pipelines/benchmarks/rows.py"
    expected = f"one of {len(rows())} names, such as {', '.join(row.name for row in rows()[::11])}"
    raise ConfigError(f"there is no published row {name!r}", expected=expected, hint=hint)


def check_inputs(row: Row, inputs: Mapping[str, str]) -> str:
    """Return which of the row's data sets the inputs are, once they suffice and every one of them will be used.

    Raises ConfigError listing what the row needs, in which format.
    """
    task = TASKS[row.task]
    known = [*task.needs, "data"]
    needs = f"{row.name} needs {describe_inputs(row)}"
    for key, value in inputs.items():
        if key not in known:
            guess = nearest(key, known)
            hint = f"did you mean {guess!r}?" if guess else ""
            raise ConfigError(f"unknown input {key!r} for {row.name}", expected=needs, hint=hint)
        if not value.strip():
            raise ConfigError(f"the input {key!r} is empty", expected=needs)
    missing = min((tuple(k for k in way if k not in inputs) for way in task.ways), key=len)
    if missing:
        raise ConfigError(f"{row.name} lacks {' and '.join(missing)}", expected=needs)
    way = next(way for way in task.ways if set(way) <= set(inputs))
    unused = [key for key in inputs if key not in (*way, *task.optional, "data")]
    if unused:
        what = f"{' and '.join(unused)} would not be used beside {', '.join(way)}"
        raise ConfigError(what, expected=needs, hint="leave out what is not meant")
    return _data(row, inputs.get("data"))


def _data(row: Row, chosen: str | None) -> str:
    if chosen is None and len(row.data) == 1:
        return row.data[0]
    if chosen not in row.data:
        what = f"{row.name} has no figures on {chosen!r}" if chosen else f"{row.name} has figures on several data sets"
        raise ConfigError(what, expected=f"data={' or data='.join(row.data)}", hint="say which one the files are")
    return chosen


def describe_inputs(row: Row) -> str:
    """Return what has to be supplied for `row`, over several lines, for messages and `--help`."""
    task = TASKS[row.task]
    ways = "; or ".join(", ".join(way) for way in task.ways)
    lines = [ways + (f"; optional: {', '.join(task.optional)}" if task.optional else "")]
    lines += [f"  {key}: {what}" for key, what in task.needs.items()]
    lines += [f"  data: which data set the files are: {', '.join(row.data)}"] if len(row.data) > 1 else []
    return "\n".join(lines)
