"""Read evaluation questions and score what was retrieved for them, with the definitions the papers use.

All scores are fractions from 0 to 1. Questions are counted only where a score is defined: a gold score needs
positives, an answer score needs answers; the result says how many questions each was taken over.
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import math
import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import regex

from pipelines.errors import ConfigError, InputError, StorageError
from pipelines.json_records import DAMAGED, open_bytes
from pipelines.schema import Hit, Question

if TYPE_CHECKING:
    from rich.table import Table

RANK_CUTOFF = 10
"""MRR and nDCG look at the first ten hits, as MS MARCO and BEIR report them."""

METRIC_LABELS = {
    "gold_top": "Gold passage in the top k",
    "answer_top": "Answer text in the top k passages",
    "mrr": "Mean reciprocal rank of the gold passage",
    "ndcg": "nDCG of the gold passages",
    "hits": "Exact answer among the top k QA pairs",
    "em": "Exact match of the first QA pair",
    "answer_em": "Exact match of the answer",
}

STAGES = {"rerank": "reranked", "reader": "read"}
"""Results of the stages behind retrieval lie under these keys, in the same form; the words mark their rows."""

_CACHED = 1 << 14  # texts, about 20 MB

Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""

# --- questions ---------------------------------------------------------------------------------------------------

EXPECTED_JSON = 'a JSON object a line: {"question": str, "answer": [str, ...]?, "positive": [passage id, ...]?, "id"?}'
EXPECTED_CSV = "two tab-separated columns a line: the question, and a Python list of answers, e.g. ['Paris', 'Paname']"
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zip")


def read_questions(url: str) -> list[Question]:
    """Read questions from JSONL or from a DPR question file, at a path or any fsspec URL.

    JSONL lines carry `question` (or `text`), `answer` or `answers` (a string or a list), `positive` or `positives`
    (passage ids), and `id`: this covers NQ-open, TriviaQA and PAQ files. A name that ends in `.csv` or `.tsv` is read
    as DPR's `question <tab> ['answer', ...]`. Compression is inferred from the name; blank lines are no questions. A
    question without an id gets its ordinal, counted from 0.

    Raises InputError, naming the line, for a missing, empty, damaged or malformed file; StorageError when the store
    cannot be reached.
    """
    try:
        with _open(url) as stream:
            questions = list(_parse(stream, url))
    except (FileNotFoundError, IsADirectoryError) as error:
        expected = "a file of questions (JSONL, or DPR's question<tab>answers), optionally compressed"
        hint = "check the path and, for a remote store, the bucket and prefix"
        raise InputError("there is no file of questions", where=url, expected=expected, hint=hint) from error
    except DAMAGED as error:
        hint = "fetch the file again; its name must end in what it is compressed with"
        raise InputError(f"the file cannot be decompressed ({error})", where=url, hint=hint) from error
    except OSError as error:
        hint = "check access to the store and run it again"
        raise StorageError(f"the questions cannot be read ({error})", where=url, hint=hint) from error
    if not questions:
        hint = "check that the step that wrote the file finished"
        raise InputError("the file holds no questions", where=url, expected="at least one question", hint=hint)
    return questions


def _open(url: str) -> Any:
    try:
        return open_bytes(url)
    except (ValueError, ImportError) as error:  # an unknown protocol, or its driver is not installed
        expected = "a path, or a URL such as s3://bucket/questions.jsonl.gz"
        raise InputError(f"the URL cannot be opened ({error})", where=url, expected=expected) from error


def _parse(stream: BinaryIO, url: str) -> Iterator[Question]:
    from pipelines.readers.lines import text_lines

    plain_name = url
    for suffix in COMPRESSED:
        plain_name = plain_name.removesuffix(suffix)
    read = _read_csv if plain_name.endswith((".csv", ".tsv")) else _read_jsonl
    for ordinal, (number, record) in enumerate(read(text_lines(stream, url), url)):
        yield _question(record, ordinal, f"{url}, line {number}")


def _read_jsonl(lines: Iterable[str], url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{url}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({error})", where=where, expected=EXPECTED_JSON) from error
        if not isinstance(record, dict):
            what = f"the line is a JSON {type(record).__name__}, not an object"
            raise InputError(what, where=where, expected=EXPECTED_JSON)
        yield number, record


def _read_csv(lines: Iterable[str], url: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines, delimiter="\t")
    while True:
        where = f"{url}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"not a table ({error})", where=where, expected=EXPECTED_CSV) from error
        if not row:
            continue
        if len(row) != 2:
            raise InputError(f"the line has {len(row)} column(s)", where=where, expected=EXPECTED_CSV)
        yield reader.line_num, {"question": row[0], "answer": _literal(row[1], where)}


def _literal(source: str, where: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuratedTREC's answers are patterns with escapes such as \s
            return ast.literal_eval(source.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        what = f"the answers are not a Python list: {source[:80]!r}"
        raise InputError(what, where=where, expected=EXPECTED_CSV) from error


def _question(record: Mapping[str, Any], ordinal: int, where: str) -> Question:
    text = record.get("question", record.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise InputError("the line has no question", where=where, expected=EXPECTED_JSON)
    identity = record.get("id")
    question = Question(
        id=str(ordinal) if identity is None else _strings([identity], "id", where, numbers=True)[0],
        text=text,
        answers=_strings(record.get("answer", record.get("answers")), "answer", where),
        positives=_strings(record.get("positive", record.get("positives")), "positive", where, numbers=True),
    )
    try:
        "".join([question.id, text, *question.answers, *question.positives]).encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokeniser takes it
        raise InputError(f"not valid Unicode ({error})", where=where, expected="whole characters") from error
    return question


def _strings(value: Any, key: str, where: str, numbers: bool = False) -> list[str]:
    """Return a string or a list of strings as a list; ids may also be whole numbers."""
    if value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    kinds = (str, int) if numbers else (str,)
    for item in values:
        if not isinstance(item, kinds) or isinstance(item, bool):
            what = f"`{key}` holds {str(item)[:80]!r}, a {type(item).__name__}"
            raise InputError(what, where=where, expected=EXPECTED_JSON)
    return [str(item) for item in values]


# --- does it contain, or equal, the answer? ----------------------------------------------------------------------

# DPR's SimpleTokenizer: a run of letters, numbers and marks, or any other single character that is neither a
# separator nor a control character.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Say whether the tokens of any answer occur, contiguous and in order, among the tokens of the text.

    DPR's string match (Karpukhin et al. 2020): Unicode NFD, tokens, lower case. One difference: an answer without any
    token matches nothing, where DPR lets it match every passage.
    """
    key = _token_key(text)
    return any(answer in key for answer in _answer_keys(answers))


def _token_key(text: str) -> str:
    """Return the text's tokens in lower case, with one space before and after each.

    No token holds a space (a separator), so a token list contains another exactly when its key contains the other's:
    a substring search in C instead of a loop in Python. Lowering after joining equals lowering each token, because the
    one context rule of lower case (the final sigma) stops at a space.
    """
    tokens = _TOKEN.findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(tokens)} ".lower() if tokens else ""


def _answer_keys(answers: Iterable[str]) -> list[str]:
    return [key for key in map(_token_key, answers) if key]


def normalise_answer(text: str) -> str:
    """Return the text in SQuAD's form: lower case, no ASCII punctuation, no English article, single spaces."""
    bare = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, golds: Iterable[str]) -> bool:
    """Say whether the prediction equals any gold answer after `normalise_answer`."""
    normalised = normalise_answer(prediction)
    return any(normalised == normalise_answer(gold) for gold in golds)


# --- retrieval ---------------------------------------------------------------------------------------------------


def document_id(passage_id: str) -> str:
    """Return the document of a passage that was cut from one: `name#2` and `name` give `name`."""
    return re.sub(r"#\d+$", "", passage_id)


def score_retrieval(
    questions: Iterable[Question],
    hits_per_question: Iterable[Sequence[Hit]],
    ks: Sequence[int] = (1, 5, 20, 100),
    *,
    id_of: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """Score ranked hits against gold passages and accepted answers.

    hits_per_question: for each question, in the same order, its hits with the best first; read once, so a generator
    keeps memory flat. id_of: what else a passage id is called by, e.g. `document_id`: then a positive `name` is met by
    passage `name#2` too, and counts once however many of its passages are found.

    Returns a flat dict for JSON; `num_questions`, `depth` (the most hits any question had; a score at a larger k is the
    score at that depth) and, where they apply:

    - `gold_top@k`, over `num_gold_questions`, the questions with positives: any positive among the first k.
    - `mrr@10`, `ndcg@10`, over the same: computed by ir-measures (trec_eval) with binary relevance.
    - `answer_top@k`, over `num_answer_questions`, the questions with answers: `has_answer` in the text, never the
      title, of any of the first k passages. Left out when all hits are QA pairs; in a mix, a pair is no match.
    - `hits@k` and `em` (= `hits@1`), over the same, when hits are QA pairs: the first answer of any of the first k
      pairs is an exact match (PAQ, Lewis et al. 2021).

    Raises ConfigError for a k below 1, InputError when there are not as many lists of hits as questions.
    """
    tally = Tally(ks, id_of)
    missing: Any = object()
    for question, hits in itertools.zip_longest(questions, hits_per_question, fillvalue=missing):
        if question is missing or hits is missing:
            what = f"there are {'more' if question is missing else 'fewer'} lists of hits than questions"
            raise InputError(what, expected="one list of hits, possibly empty, for each question")
        tally.add(question, hits)
    return tally.results()


class Tally:
    """`score_retrieval` one question at a time: `add` each with its hits, best first, then ask for the `results`.

    Keeps the rank (from 1) at which each question was first satisfied, infinity where it was not, and no hits.
    Raises ConfigError for a k below 1.
    """

    def __init__(self, ks: Sequence[int], id_of: Callable[[str], str] | None = None) -> None:
        if not ks or min(ks) < 1:
            raise ConfigError(f"cannot score at k = {list(ks)}", expected="one or more whole numbers from 1")
        self.ks, self.limit, self.id_of = sorted(set(ks)), max(ks), id_of
        self.gold: list[float] = []
        self.answer: list[float] = []
        self.pair: list[float] = []
        self.num_questions = self.depth = 0
        self.saw_passage = self.saw_pair = False
        self.judged: dict[str, dict[str, int]] = {}
        self.run: dict[str, dict[str, float]] = {}
        # Popular passages return for many questions. Keyed by the text itself, which cannot be stale; bounded.
        self.token_key = lru_cache(maxsize=_CACHED)(_token_key)
        self.normalise = lru_cache(maxsize=_CACHED)(normalise_answer)

    def add(self, question: Question, hits: Sequence[Hit]) -> None:
        self.num_questions += 1
        self.depth = max(self.depth, len(hits))
        pairs = sum(hit.passage.answers is not None for hit in hits)
        self.saw_pair |= pairs > 0
        self.saw_passage |= pairs < len(hits)
        if question.positives:
            self._add_gold(question, hits)
        if question.answers:
            self._add_answer(question, hits[: self.limit])

    def _add_gold(self, question: Question, hits: Sequence[Hit]) -> None:
        positives = set(question.positives)
        golds = [self._gold(hit.passage.id, positives) for hit in hits[: max(self.limit, RANK_CUTOFF)]]
        self.gold.append(_first_rank(gold is not None for gold in golds))
        # Our own names, because question ids may repeat, and scores from ranks, because trec_eval would break ties of
        # the real scores by id. A gold document's later passages count as hits that are not relevant.
        name = str(len(self.judged))
        self.judged[name] = {f"gold {positive}": 1 for positive in positives}
        run: dict[str, float] = {}
        for rank, gold in enumerate(golds[:RANK_CUTOFF], start=1):
            fresh = gold is not None and f"gold {gold}" not in run
            run[f"gold {gold}" if fresh else f"rank {rank}"] = -float(rank)
        if run:
            self.run[name] = run

    def _gold(self, passage_id: str, positives: set[str]) -> str | None:
        if passage_id in positives:
            return passage_id
        alias = self.id_of(passage_id) if self.id_of else passage_id
        return alias if alias in positives else None

    def _add_answer(self, question: Question, hits: Sequence[Hit]) -> None:
        keys = _answer_keys(question.answers)
        golds = {normalise_answer(answer) for answer in question.answers}
        self.answer.append(_first_rank(self._contains(hit, keys) for hit in hits))
        self.pair.append(_first_rank(self._equals(hit, golds) for hit in hits))

    def _contains(self, hit: Hit, keys: list[str]) -> bool:
        if hit.passage.answers is not None:
            return False
        text = self.token_key(hit.passage.text)
        return any(key in text for key in keys)

    def _equals(self, hit: Hit, golds: set[str]) -> bool:
        answers = hit.passage.answers
        return self.normalise(answers[0]) in golds if answers else False

    def results(self) -> dict[str, Any]:
        ks = self.ks
        scores: dict[str, Any] = {"num_questions": self.num_questions, "depth": self.depth}
        if self.gold:
            scores["num_gold_questions"] = len(self.gold)
            scores |= _top(self.gold, ks, "gold_top") | self._rank_measures()
        if self.answer:
            scores["num_answer_questions"] = len(self.answer)
        if self.answer and (self.saw_passage or not self.saw_pair):
            scores |= _top(self.answer, ks, "answer_top")
        if self.answer and self.saw_pair:
            scores |= _top(self.pair, ks, "hits")
            scores["em"] = _share(self.pair, 1)
        return scores

    def _rank_measures(self) -> dict[str, float]:
        import ir_measures
        from ir_measures import RR, nDCG

        # The run was cut at ten, so plain RR is RR@10: the trec_eval binding has no cutoff of its own for it.
        wanted = {f"mrr@{RANK_CUTOFF}": RR, f"ndcg@{RANK_CUTOFF}": nDCG @ RANK_CUTOFF}
        found = ir_measures.pytrec_eval.calc_aggregate(list(wanted.values()), self.judged, self.run)
        return {name: float(found[measure]) for name, measure in wanted.items()}


def _first_rank(matches: Iterable[bool]) -> float:
    return next((rank for rank, match in enumerate(matches, start=1) if match), math.inf)


def _share(ranks: Sequence[float], k: int) -> float:
    return sum(rank <= k for rank in ranks) / len(ranks)


def _top(ranks: Sequence[float], ks: Sequence[int], name: str) -> dict[str, float]:
    return {f"{name}@{k}": _share(ranks, k) for k in ks}


def score_answers(questions: Iterable[Question], answers: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Score what a reader answered: `answer_em`, over the `num_answer_questions` questions with accepted answers.

    answers: for each question its answers, best first; only the first counts, and none is wrong (DPR, PAQ and FiD).
    """
    tally = AnswerTally()
    for question, given in zip(questions, answers, strict=True):
        tally.add(question, given)
    return tally.results()


class AnswerTally:
    """`score_answers` one question at a time."""

    def __init__(self) -> None:
        self.right = self.total = 0

    def add(self, question: Question, given: Sequence[str]) -> None:
        self.total += bool(question.answers)
        self.right += bool(given) and exact_match(given[0], question.answers)

    def results(self) -> dict[str, Any]:
        told = {"num_answer_questions": self.total}
        return told | ({"answer_em": self.right / self.total} if self.total else {})


# --- index recall and latency ------------------------------------------------------------------------------------


def recall_at(rows_QK: npt.NDArray[np.int64], exact_rows_QK: npt.NDArray[np.int64], k: int) -> float:
    """Return the mean share of the exact first k rows that are among the first k rows found.

    rows_QK, exact_rows_QK: (Q, >= k) row numbers, best first, -1 for "no result". A query whose exact search gave fewer
    than k rows is measured against those it gave; one that gave none is left out. Raises InputError for arrays that do
    not fit each other or k, or hold no exact result at all.
    """
    return float(_recall_per_query(rows_QK, exact_rows_QK, k).mean())


def recall_half_width(rows_QK: npt.NDArray[np.int64], exact_rows_QK: npt.NDArray[np.int64], k: int) -> float:
    """Return half the width of the 95 % confidence interval of `recall_at`, over the choice of queries.

    Normal interval of the mean over queries: the k results of one query are not independent, so the query is the unit
    that counts. Not below the Wilson interval's half-width at a share of 1, z²/(2(Q + z²)): a sample in which every
    query was perfect still says only so much. Arguments and errors as in `recall_at`.
    """
    recall_Q = _recall_per_query(rows_QK, exact_rows_QK, k)
    num_queries = len(recall_Q)
    spread = float(recall_Q.std(ddof=1)) if num_queries > 1 else 0.0
    floor = Z95**2 / (2 * (num_queries + Z95**2))
    return max(Z95 * spread / math.sqrt(num_queries), floor)


def _recall_per_query(
    rows_QK: npt.NDArray[np.int64], exact_rows_QK: npt.NDArray[np.int64], k: int
) -> npt.NDArray[np.float64]:
    found, exact = np.asarray(rows_QK), np.asarray(exact_rows_QK)
    if found.ndim != 2 or exact.ndim != 2 or len(found) != len(exact):
        what = f"cannot compare rows of shapes {found.shape} and {exact.shape}"
        raise InputError(what, expected="two arrays (Q, K) for the same Q queries")
    if not 1 <= k <= min(found.shape[1], exact.shape[1]):
        what = f"cannot take recall at {k} of {found.shape[1]} found and {exact.shape[1]} exact results a query"
        raise InputError(what, expected="1 <= k <= the number of results a query", hint="search for at least k results")
    shares = []
    for found_K, exact_K in zip(found[:, :k].tolist(), exact[:, :k].tolist(), strict=True):
        truth = set(exact_K) - {-1}
        if truth:
            shares.append(len(truth.intersection(found_K)) / len(truth))
    if not shares:
        raise InputError("there is no query with an exact result", expected="at least one query and one vector")
    return np.asarray(shares)


def percentiles(seconds: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    """Return the median, 95th and 99th percentile of durations in seconds, as milliseconds, linearly interpolated.

    Raises InputError when there are no durations, or one is negative or not finite.
    """
    values = np.asarray(seconds, dtype=np.float64)
    if values.size == 0 or not np.all(np.isfinite(values)) or values.min() < 0:
        raise InputError("cannot summarise the latencies", expected="at least one duration, none negative or NaN")
    p50, p95, p99 = np.percentile(values, [50, 95, 99]) * 1000
    return {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}


# --- for the screen ----------------------------------------------------------------------------------------------


def metric_rows(results: Mapping[str, Any]) -> list[tuple[str, dict[int, float]]]:
    """Return the scores of `score_retrieval`, then of STAGES, as (label, {k: score}); other keys are passed over."""
    rows = _score_rows(results)
    for stage, told in STAGES.items():
        nested = results.get(stage)
        rows += [(f"{label}, {told}", s) for label, s in _score_rows(nested if isinstance(nested, Mapping) else {})]
    return rows


def _score_rows(results: Mapping[str, Any]) -> list[tuple[str, dict[int, float]]]:
    rows: dict[str, dict[int, float]] = {}
    for key, value in results.items():
        name, _, k = str(key).partition("@")
        is_score = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name in METRIC_LABELS and is_score and (k.isdecimal() or key in ("em", "answer_em")):
            rows.setdefault(name, {})[int(k or 1)] = float(value)
    return [(label, dict(sorted(rows[name].items()))) for name, label in METRIC_LABELS.items() if name in rows]


def format_table(results: Mapping[str, Any]) -> Table:
    """Return the scores as a table for the terminal: a line a measure, a column a k, in per cent."""
    from rich.table import Table

    rows = metric_rows(results)
    ks = sorted({k for _, scores in rows for k in scores})
    caption = f"{results.get('num_questions', 0):,} questions, searched to depth {results.get('depth', 0):,}"
    table = Table(title="Retrieval, in %", caption=caption)
    table.add_column("measure")
    for k in ks:
        table.add_column(f"k={k}", justify="right")
    for label, scores in rows:
        table.add_row(label, *(f"{scores[k] * 100:.1f}" if k in scores else "" for k in ks))
    return table
