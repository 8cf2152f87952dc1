"""Evaluation: reading questions, answer matching, and scores against definitions written out naively."""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import json
import math
import random
import re
import string
import unicodedata
import weakref
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean as mean

import fsspec
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import ConfigError, InputError, StorageError
from pipelines.evaluate import (
    Tally,
    document_id,
    exact_match,
    format_table,
    has_answer,
    metric_rows,
    normalise_answer,
    percentiles,
    read_questions,
    recall_at,
    recall_half_width,
    score_answers,
    score_retrieval,
)
from pipelines.json_records import put_whole
from pipelines.readers import lines
from pipelines.schema import Hit, Passage, Question

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def hits(*passages: Passage) -> list[Hit]:
    return [Hit(row=row, score=-float(row), passage=passage) for row, passage in enumerate(passages)]


def texts(*ids: str) -> list[Hit]:
    return hits(*(Passage(id=name, title="", text=f"text of {name}") for name in ids))


def pairs(*answers: list[str]) -> list[Hit]:
    return hits(*(Passage(id=str(i), title="", text="who?", answers=found) for i, found in enumerate(answers)))


# --- read_questions --------------------------------------------------------------------------------------------------


def test_jsonl_in_all_its_spellings(tmp_path: Path) -> None:
    lines = [
        {"id": "a", "question": "who?", "answer": ["x", "y"], "positive": ["p1"]},
        {"question": "what?", "answers": "z", "positives": ["p2", 3]},
        {"id": 7, "text": "why?"},
        {"question": "paq?", "answer": ["first"], "answers": [{"passage_id": "1"}]},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8-sig")
    assert read_questions(str(path)) == [
        Question("a", "who?", ["x", "y"], ["p1"]),
        Question("1", "what?", ["z"], ["p2", "3"]),
        Question("7", "why?", [], []),
        Question("3", "paq?", ["first"], []),
    ]


DPR_CSV = """who got it\t['Wilhelm Conrad Röntgen']
"he said ""go""\"\t"[""Ross 'Rocky' Anderson"", 'b']"

pattern\t['Long\\s?Island']
one\t'alone'
"""


@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz", ".csv.bz2"])
def test_dpr_csv(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"test.qas{suffix}"
    raw = DPR_CSV.encode()
    path.write_bytes({".csv": raw, ".tsv.gz": gzip.compress(raw), ".csv.bz2": bz2.compress(raw)}[suffix])
    assert read_questions(str(path)) == [
        Question("0", "who got it", ["Wilhelm Conrad Röntgen"]),
        Question("1", 'he said "go"', ["Ross 'Rocky' Anderson", "b"]),
        Question("2", "pattern", ["Long\\s?Island"]),
        Question("3", "one", ["alone"]),
    ]


def test_a_url_of_any_fsspec_store() -> None:
    with fsspec.open("memory://evaluate/q.jsonl.gz", "wb", compression="infer") as stream:
        stream.write(b'{"question": "who?"}')
    assert read_questions("memory://evaluate/q.jsonl.gz") == [Question("0", "who?")]


BAD_FILES = [
    ("q.jsonl", b"", "no questions", ""),
    ("q.jsonl", b"\n \n", "no questions", ""),
    ("q.jsonl", b'{"question": "a"}\n{"question": ', "not JSON", "line 2"),
    ("q.jsonl", b"[" * 100_000, "not JSON", "line 1"),
    ("q.jsonl", b'{"question": "a"}\n\n["b"]', "JSON list", "line 3"),
    ("q.jsonl", b'{"answer": ["a"]}', "no question", "line 1"),
    ("q.jsonl", b'{"question": "  "}', "no question", "line 1"),
    ("q.jsonl", b'{"question": 3}', "no question", "line 1"),
    ("q.jsonl", b'{"question": "a", "answer": [1]}', "`answer`", "line 1"),
    ("q.jsonl", b'{"question": "a", "answer": {"b": 1}}', "`answer`", "line 1"),
    ("q.jsonl", b'{"question": "a", "positive": [true]}', "`positive`", "line 1"),
    ("q.jsonl", b'{"question": "a", "id": [1]}', "`id`", "line 1"),
    ("q.jsonl", b'{"question": "a"}\n{"question": "\xff"}', "not UTF-8", "line 2"),
    ("q.jsonl", b'{"question": "\\ud800"}', "Unicode", "line 1"),
    ("q.csv", b"a\t['b']\nonly a question\n", "1 column", "line 2"),
    ("q.csv", b"a\t['b']\textra\n", "3 column", "line 1"),
    ("q.csv", b"question\tanswers\n", "Python list", "line 1"),
    ("q.csv", b"a\t['b'\n", "Python list", "line 1"),
    ("q.csv", b"a\t__import__('os').getcwd()\n", "Python list", "line 1"),
    ("q.csv", b"a\t[1]\n", "`answer`", "line 1"),
    ("q.csv", b"a\t" + b"x" * 200_000, "not a table", "line 1"),
    ("q.jsonl.gz", b'{"question": "a"}', "decompressed", ""),
    ("q.jsonl.gz", gzip.compress(b'{"question": "a"}' * 1000, mtime=0)[:-20], "decompressed", ""),
    ("q.jsonl.zip", b'{"question": "a"}', "decompressed", ""),
]


@pytest.fixture
def csv_limit() -> Iterator[None]:
    """Python's own limit on a csv field: it is one for the process, and the corpus readers raise it."""
    before = csv.field_size_limit(131_072)
    yield
    csv.field_size_limit(before)


@pytest.mark.usefixtures("csv_limit")
@pytest.mark.parametrize(("name", "content", "what", "line"), BAD_FILES)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, name: str, content: bytes, what: str, line: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_questions(str(path))
    assert what in caught.value.what
    assert str(path) in caught.value.where
    assert caught.value.where.endswith(line)
    assert caught.value.expected or caught.value.hint


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "a"}\n' + b"x" * 1000)
    monkeypatch.setattr(lines.text_lines, "__defaults__", (100,))
    with pytest.raises(InputError, match="too long") as caught:
        read_questions(str(tmp_path / "q.jsonl"))
    assert caught.value.where.endswith("line 2")


@pytest.mark.parametrize("suffix", ["bz2", "xz", "lzma", "zst", "zip"])
def test_every_compression_is_read(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"q.jsonl.{suffix}")
    put_whole(path, lambda stream: stream.write(b'\xef\xbb\xbf{"question": "who?"}\n') and None)
    assert read_questions(path) == [Question("0", "who?")]


def test_a_missing_file_a_directory_and_an_unknown_store(tmp_path: Path) -> None:
    for url in (str(tmp_path / "none.jsonl"), str(tmp_path), "memory://evaluate/none.jsonl"):
        with pytest.raises(InputError, match="no file of questions"):
            read_questions(url)
    with pytest.raises(InputError, match="cannot be opened"):
        read_questions("nosuchstore://q.jsonl")


def test_a_store_that_fails_is_not_a_bad_file(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    with pytest.raises(StorageError, match="cannot be read"):
        read_questions(str(loop))


@pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not on this machine")
@pytest.mark.parametrize(("name", "num_questions"), [("nq", 1355), ("squad", 11245)])
def test_real_question_files(name: str, num_questions: int) -> None:
    questions = read_questions(str(DATA / name / "questions.jsonl.gz"))
    assert len({question.id for question in questions}) == num_questions == len(questions)
    assert all(question.positives and question.answers for question in questions)


# --- has_answer ------------------------------------------------------------------------------------------------------

DPR_CASES = [
    ("Born in Röntgen's house", "Rontgen", False),  # a mark stays in its token: no accent folding
    ("Born in Röntgen's house", unicodedata.normalize("NFD", "Röntgen"), True),
    (unicodedata.normalize("NFD", "naïve café"), "NAÏVE CAFÉ", True),
    ("the \N{ANGSTROM SIGN} unit", "\N{LATIN CAPITAL LETTER A WITH RING ABOVE}", True),  # canonically equal
    ("the ﬁne print", "fine", False),  # compatibility forms differ
    ("He won 1 , 500 dollars", "1,500", True),  # punctuation is a token, spacing is not
    ("He won 1500 dollars", "1,500", False),
    ("in 1902.", "1902", True),
    ("in 19022", "1902", False),  # whole tokens only
    ("Dr.Who", "dr . who", True),
    ("it's O'Brien", "O' Brien", True),
    ("it's O’Brien", "O'Brien", False),  # a typographic apostrophe is another token
    ("don't", "dont", False),
    ("東京は日本の首都", "東京", False),  # a run of CJK letters is one token
    ("東京 は 日本 の 首都", "日本", True),
    ("東京、日本。", "東京", True),
    ("café—bar", "CAFÉ - BAR", False),
    ("ΟΔΥΣΣΕΥΣ", "οδυσσευς", True),
    ("ΟΔΥΣΣΕΥΣ", "οδυσσευσ", False),  # Python's lower case knows the final sigma
    ("İstanbul", "i̇stanbul", True),
    ("a\u200bb", "ab", False),  # a format character separates
    ("a\u200bb", "a b", True),
    ("emoji 👍🏽 here", "👍", True),
    ("snake_case", "snake", True),
    ("५ लोग", "५", True),
    ("quick brown fox", "quick fox", False),  # contiguous
    ("quick brown fox", "brown quick", False),  # in order
    ("quick brown fox", "quick brown fox jumps", False),
    ("", "x", False),
    ("anything", "", False),  # ours: an answer without tokens matches nothing
    ("anything", " \t\u200b", False),
    ("", "", False),
]


@pytest.mark.parametrize(("text", "answer", "expected"), DPR_CASES)
def test_has_answer_as_dpr_defines_it(text: str, answer: str, expected: bool) -> None:
    assert has_answer(text, [answer]) is expected
    assert has_answer(text, ["no such thing", answer]) is expected


def test_has_answer_without_answers() -> None:
    assert not has_answer("anything", [])


DPR_PATTERN = regex.compile(
    r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", flags=regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
)


def naive_has_answer(text: str, answers: list[str]) -> bool:
    def words(raw: str) -> list[str]:
        return [match.group().lower() for match in DPR_PATTERN.finditer(unicodedata.normalize("NFD", raw))]

    found = words(text)
    for wanted in filter(None, map(words, answers)):
        for start in range(len(found) - len(wanted) + 1):
            if found[start : start + len(wanted)] == wanted:
                return True
    return False


TRICKY = st.text(st.sampled_from("aAbB1é\u0301ΣςσİıI'’-_., \n\t\u00a0\u200b東京👍\u0600ǅﬁ\x00"), max_size=12)


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text(max_size=30), TRICKY), answers=st.lists(st.one_of(st.text(max_size=4), TRICKY)))
def test_has_answer_equals_a_search_over_token_lists(text: str, answers: list[str]) -> None:
    assert has_answer(text, answers) == naive_has_answer(text, answers)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(min_size=1, max_size=30), TRICKY), data=st.data())
def test_has_answer_finds_every_run_of_whole_tokens(text: str, data: st.DataObject) -> None:
    spans = [match.span() for match in DPR_PATTERN.finditer(unicodedata.normalize("NFD", text))]
    if spans:
        first, last = sorted(data.draw(st.lists(st.sampled_from(range(len(spans))), min_size=2, max_size=2)))
        run = unicodedata.normalize("NFD", text)[spans[first][0] : spans[last][1]]
        assert has_answer(text, [run])


@settings(max_examples=100, deadline=None)
@given(text=TRICKY, answers=st.lists(TRICKY, max_size=4), more=st.lists(TRICKY, max_size=2))
def test_more_text_or_answers_never_lose_a_match(text: str, answers: list[str], more: list[str]) -> None:
    if has_answer(text, answers):
        assert has_answer(text, more + answers)
        assert has_answer(" ".join([*more, text, *more]), answers)


# --- exact match -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("An apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("Theatre", "theatre"),
        ("a-the-b", "atheb"),  # punctuation goes before articles are looked for
        ("rock 'n' roll", "rock n roll"),
        ("“the end”", "“ end”"),  # only ASCII punctuation goes
        ("the", ""),
        ("", ""),
    ],
)
def test_normalise_answer(raw: str, normal: str) -> None:
    assert normalise_answer(raw) == normal


def naive_normalise(raw: str) -> str:
    kept = "".join(character for character in raw.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aAnNtThHeE .,'’-éß\t"), max_size=20))
def test_normalise_answer_equals_the_definition_and_is_stable(raw: str) -> None:
    assert normalise_answer(raw) == naive_normalise(raw)
    assert exact_match(raw, ["zzz", raw.upper() if raw.upper().lower() == raw.lower() else raw])


def test_exact_match() -> None:
    assert exact_match("the Beatles.", ["Rolling Stones", "Beatles"])
    assert not exact_match("Beatle", ["Beatles"])
    assert not exact_match("Beatles", [])


# --- score_retrieval: by hand ----------------------------------------------------------------------------------------


def test_gold_scores_by_hand() -> None:
    questions = [
        Question("0", "q", positives=["a"]),  # rank 1
        Question("1", "q", positives=["b", "d"]),  # ranks 2 and 4
        Question("2", "q", positives=["z"]),  # never
        Question("3", "q"),  # no positives: not counted
    ]
    scores = score_retrieval(questions, [texts("a", "b"), texts("a", "b", "c", "d"), texts("a"), texts("a")], ks=(1, 2))
    assert scores["num_questions"] == 4
    assert scores["num_gold_questions"] == 3
    assert scores["depth"] == 4
    assert scores["gold_top@1"] == pytest.approx(1 / 3)
    assert scores["gold_top@2"] == pytest.approx(2 / 3)
    assert scores["mrr@10"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    two = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert scores["ndcg@10"] == pytest.approx((1 + two + 0) / 3)
    assert not {key for key in scores if key.startswith(("answer", "hits", "em", "num_answer"))}
    json.dumps(scores, allow_nan=False)


def test_rank_measures_look_no_further_than_ten() -> None:
    question = [Question("0", "q", positives=["x"])]
    others = [str(i) for i in range(10)]
    tenth = score_retrieval(question, [texts(*others[:9], "x")])
    eleventh = score_retrieval(question, [texts(*others, "x")])
    assert tenth["mrr@10"] == pytest.approx(0.1)
    assert tenth["ndcg@10"] == pytest.approx(1 / math.log2(11))
    assert eleventh["mrr@10"] == eleventh["ndcg@10"] == 0.0
    assert eleventh["gold_top@20"] == 1.0
    # Even when only the first hit is scored, the rank measures see ten.
    assert score_retrieval(question, [texts(*others[:9], "x")], ks=(1,))["mrr@10"] == pytest.approx(0.1)


def test_the_order_of_hits_counts_not_their_scores() -> None:
    passages = [Passage("b", "", ""), Passage("a", "", "")]
    tied = [Hit(0, 1.0, passages[0]), Hit(1, 1.0, passages[1])]
    rising = [Hit(0, 1.0, passages[0], rerank_score=9.0), Hit(1, 5.0, passages[1], rerank_score=1.0)]
    for found in (tied, rising):
        assert score_retrieval([Question("0", "q", positives=["b"])], [found])["mrr@10"] == 1.0
        assert score_retrieval([Question("0", "q", positives=["a"])], [found])["mrr@10"] == 0.5


def test_a_passage_of_a_document_counts_only_on_request() -> None:
    question = [Question("0", "q", positives=["doc"])]
    found = [texts("other", "doc#2", "doc#3", "doc")]
    assert score_retrieval(question, found)["mrr@10"] == pytest.approx(1 / 4)
    scores = score_retrieval(question, found, id_of=document_id)
    assert scores["mrr@10"] == pytest.approx(1 / 2)
    assert scores["ndcg@10"] == pytest.approx(1 / math.log2(3))  # the document's other passages add nothing
    apart = score_retrieval(question, [texts("doc#2", "other", "doc")], id_of=document_id)
    assert apart["mrr@10"] == apart["ndcg@10"] == 1.0  # the first of them gives the document its rank
    exact = score_retrieval([Question("0", "q", positives=["doc#3"])], found, id_of=document_id)
    assert exact["mrr@10"] == pytest.approx(1 / 3)  # a positive may still name one passage


def test_document_id() -> None:
    names = ["name#2", "name", "a#b", "a#1#2", "c#", "#3"]
    assert [document_id(name) for name in names] == ["name", "name", "a#b", "a#1", "c#", ""]


def test_answer_scores_search_the_text_and_never_the_title() -> None:
    question = [Question("0", "q", answers=["Rollo"])]
    titled = hits(Passage("0", "Rollo", "a duke"), Passage("1", "", "led by Rollo."))
    scores = score_retrieval(question, [titled], ks=(1, 2))
    assert (scores["answer_top@1"], scores["answer_top@2"]) == (0.0, 1.0)
    assert scores["num_answer_questions"] == 1
    assert not {key for key in scores if key.startswith(("gold", "mrr", "ndcg", "hits", "em", "num_gold"))}


def test_paq_scores_use_the_first_answer_of_each_pair() -> None:
    questions = [
        Question("0", "q", answers=["The Beatles"]),
        Question("1", "q", answers=["x", "Y."]),
        Question("2", "q", answers=["z"]),
        Question("3", "q"),
    ]
    found = [pairs(["beatles"], ["x"]), pairs(["no"], ["nor", "y"], ["y"]), pairs([], ["who z"]), pairs(["x"])]
    scores = score_retrieval(questions, found, ks=(1, 2, 3))
    assert scores["em"] == scores["hits@1"] == pytest.approx(1 / 3)
    assert scores["hits@2"] == pytest.approx(1 / 3)  # the second answer of a pair is not its answer
    assert scores["hits@3"] == pytest.approx(2 / 3)
    assert not {key for key in scores if key.startswith("answer_top")}  # a pair's text is a question


def test_a_mix_of_passages_and_pairs_scores_each_by_its_own_measure() -> None:
    found = hits(
        Passage("p", "", "who is x?", answers=["y"]), Passage("t", "", "x"), Passage("u", "", "", answers=["x"])
    )
    scores = score_retrieval([Question("0", "q", answers=["x"])], [found], ks=(1, 2, 3))
    assert [scores[f"answer_top@{k}"] for k in (1, 2, 3)] == [0.0, 1.0, 1.0]
    assert [scores[f"hits@{k}"] for k in (1, 2, 3)] == [0.0, 0.0, 1.0]


def test_question_ids_may_repeat_and_ids_may_be_odd() -> None:
    odd = "naïve id\twith \x00 and 'quotes'"
    questions = [Question("same", "q", positives=[odd, odd]), Question("same", "q", positives=["b"])]
    scores = score_retrieval(questions, [texts(odd), texts("x", "b")])
    assert scores["mrr@10"] == pytest.approx(0.75)
    assert scores["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_no_hits_score_zero_and_no_questions_score_nothing() -> None:
    questions = [Question("0", "q", answers=["a"], positives=["p"]), Question("1", "q", answers=["b"])]
    scores = score_retrieval(questions, [[], []])
    values = {key: value for key, value in scores.items() if not key.startswith("num_")}
    assert {"gold_top@1", "answer_top@100", "mrr@10", "ndcg@10"} <= set(values)
    assert set(values.values()) == {0.0}
    assert score_retrieval([], []) == {"num_questions": 0, "depth": 0}


def test_hits_may_come_from_a_generator() -> None:
    questions = [Question(str(i), "q", positives=["a"]) for i in range(3)]
    assert score_retrieval(iter(questions), (texts("a") for _ in questions))["gold_top@1"] == 1.0


def test_lists_that_do_not_pair_up_and_bad_ks_are_refused() -> None:
    question = Question("0", "q", positives=["a"])
    with pytest.raises(InputError, match="fewer lists of hits"):
        score_retrieval([question, question], [texts("a")])
    with pytest.raises(InputError, match="more lists of hits"):
        score_retrieval([question], iter([texts("a"), texts("a")]))
    for ks in ((), (0, 5), (-1,)):
        with pytest.raises(ConfigError, match="cannot score"):
            score_retrieval([question], [texts("a")], ks=ks)


# --- score_retrieval: laws -------------------------------------------------------------------------------------------

IDS = ("a", "b", "c", "d", "e")
WORDS = ("one", "two", "three")


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[Question, list[Hit]]]:
    out = []
    for number in range(draw(st.integers(1, 6))):
        question = Question(
            id=str(number),
            text="q",
            answers=draw(st.lists(st.sampled_from(WORDS), max_size=2)),
            positives=draw(st.lists(st.sampled_from(IDS), max_size=3)),
        )
        ids = draw(st.lists(st.sampled_from(IDS), unique=True))
        passages = [
            Passage(
                id=name,
                title="",
                text=draw(st.sampled_from(WORDS)),
                answers=draw(st.none() | st.lists(st.sampled_from(WORDS), max_size=2)),
            )
            for name in ids
        ]
        out.append((question, hits(*passages)))
    return out


def naive_scores(run: list[tuple[Question, list[Hit]]], ks: tuple[int, ...]) -> dict[str, float]:
    """Score by the definitions, question by question, with no ranks, caches or libraries."""
    gold = [(q, h) for q, h in run if q.positives]
    answer = [(q, h) for q, h in run if q.answers]
    everything = [hit for _, found in run for hit in found]
    out: dict[str, float] = {"num_questions": len(run), "depth": max(len(h) for _, h in run)}
    if gold:
        out["num_gold_questions"] = len(gold)
        for k in ks:
            out[f"gold_top@{k}"] = mean([any(x.passage.id in q.positives for x in h[:k]) for q, h in gold])
        reciprocal, gain = [], []
        for q, h in gold:
            relevant = [rank for rank, x in enumerate(h[:10], 1) if x.passage.id in q.positives]
            reciprocal.append(1 / relevant[0] if relevant else 0.0)
            ideal = sum(1 / math.log2(1 + rank) for rank in range(1, min(10, len(set(q.positives))) + 1))
            gain.append(sum(1 / math.log2(1 + rank) for rank in relevant) / ideal)
        out["mrr@10"], out["ndcg@10"] = mean(reciprocal), mean(gain)
    if answer:
        out["num_answer_questions"] = len(answer)
        has_pairs = any(hit.passage.answers is not None for hit in everything)
        has_texts = any(hit.passage.answers is None for hit in everything)
        for k in ks:
            if has_texts or not has_pairs:
                found = [
                    any(x.passage.answers is None and naive_has_answer(x.passage.text, q.answers) for x in h[:k])
                    for q, h in answer
                ]
                out[f"answer_top@{k}"] = mean(found)
            if has_pairs:
                equal = [any((x.passage.answers or ["-"])[0] in q.answers for x in h[:k]) for q, h in answer]
                out[f"hits@{k}"] = mean(equal)
        if has_pairs:
            out["em"] = out["hits@1"]
    return out


@settings(max_examples=150, deadline=None)
@given(run=runs(), seed=st.integers(0, 99))
def test_scores_equal_the_definitions_rise_with_k_and_ignore_question_order(
    run: list[tuple[Question, list[Hit]]], seed: int
) -> None:
    ks = (1, 2, 3, 5)
    scores = score_retrieval([q for q, _ in run], [h for _, h in run], ks=ks)
    assert scores == pytest.approx(naive_scores(run, ks))
    for name in ("gold_top", "answer_top", "hits"):
        curve = [scores[f"{name}@{k}"] for k in ks if f"{name}@{k}" in scores]
        assert curve == sorted(curve)
        assert all(0 <= value <= 1 for value in curve)
    shuffled = random.Random(seed).sample(run, len(run))
    assert score_retrieval([q for q, _ in shuffled], [h for _, h in shuffled], ks=ks) == pytest.approx(scores)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(IDS), min_size=1, unique=True), min_size=1, max_size=5))
def test_a_perfect_run_scores_one(positives: list[list[str]]) -> None:
    questions = [Question("q", "q", answers=["text"], positives=golds) for golds in positives]
    scores = score_retrieval(questions, [texts(*golds, "wrong") for golds in positives])
    values = {key: value for key, value in scores.items() if "num_" not in key and key != "depth"}
    assert len(values) == 10
    assert all(value == pytest.approx(1.0) for value in values.values())


@pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not on this machine")
def test_real_gold_paragraphs_hold_their_answers() -> None:
    import csv

    with gzip.open(DATA / "squad" / "passages.tsv.gz", "rt", encoding="utf-8", newline="") as stream:
        rows = {
            row["id"]: Passage(row["id"], row["title"], row["text"]) for row in csv.DictReader(stream, delimiter="\t")
        }
    questions = read_questions(str(DATA / "squad" / "questions.jsonl.gz"))
    scores = score_retrieval(questions, (hits(*(rows[name] for name in q.positives)) for q in questions), ks=(1,))
    assert scores["gold_top@1"] == scores["mrr@10"] == 1.0
    found = [any(naive_has_answer(rows[name].text, q.answers) for name in q.positives) for q in questions[:1000]]
    first = score_retrieval(questions[:1000], [hits(rows[q.positives[0]]) for q in questions[:1000]], ks=(1,))
    assert first["answer_top@1"] == pytest.approx(np.mean(found))
    # SQuAD's answers are spans of the paragraph; the few misses are spans that cut a word.
    assert 0.98 < scores["answer_top@1"] < 1.0


# --- recall, latency, table ------------------------------------------------------------------------------------------


def test_recall_by_hand() -> None:
    exact = np.array([[1, 2, 3], [4, 5, 6], [7, -1, -1], [-1, -1, -1]])
    found = np.array([[2, 1, 9], [9, 8, -1], [-1, 7, -1], [-1, 1, 2]])
    assert recall_at(found, exact, 2) == pytest.approx((1 + 0 + 1) / 3)  # the last query has no exact result
    assert recall_at(found, exact, 3) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert recall_at(found, exact, 1) == pytest.approx(0.0)
    assert recall_at(exact, exact, 3) == 1.0


def test_a_row_found_twice_counts_once() -> None:
    assert recall_at(np.array([[1, 1]]), np.array([[1, 2]]), 2) == 0.5


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_queries=st.integers(1, 20), k=st.integers(1, 6))
def test_recall_equals_the_definition_and_ignores_order_within_k(seed: int, num_queries: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    exact = np.array([rng.permutation(12)[:6] for _ in range(num_queries)])
    found = np.array([rng.permutation(12)[:6] for _ in range(num_queries)])
    naive = [sum(row in list(truth[:k]) for row in rows[:k]) / k for rows, truth in zip(found, exact, strict=True)]
    assert recall_at(found, exact, k) == pytest.approx(np.mean(naive))
    mixed = found.copy()
    mixed[:, :k] = rng.permuted(found[:, :k], axis=1)
    assert recall_at(mixed, exact, k) == pytest.approx(recall_at(found, exact, k))
    assert 0 < recall_half_width(found, exact, k) < 1


def test_half_width_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    k, num_queries, truth, trials = 10, 200, 0.9, 400
    covered = 0
    for _ in range(trials):
        exact = np.tile(np.arange(k), (num_queries, 1))
        # Results of one query share a fate in part: the case that an interval over single results gets wrong.
        chance = rng.choice([truth - 0.1, truth + 0.1], size=(num_queries, 1))
        found = np.where(rng.random((num_queries, k)) < chance, exact, 1000 + exact)
        covered += abs(recall_at(found, exact, k) - truth) <= recall_half_width(found, exact, k)
    assert 0.92 <= covered / trials <= 0.98


def test_half_width_of_perfect_and_of_single_queries() -> None:
    perfect = np.arange(1000).reshape(1000, 1)
    assert recall_half_width(perfect, perfect, 1) == pytest.approx(1.96**2 / (2 * (1000 + 1.96**2)), rel=1e-4)
    assert 0.3 < recall_half_width(perfect[:1], perfect[:1], 1) < 0.5


@pytest.mark.parametrize(
    ("found", "exact", "k", "what"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 3), int), 1, "shapes"),
        (np.zeros(3, int), np.zeros(3, int), 1, "shapes"),
        (np.zeros((2, 3), int), np.zeros((2, 2), int), 3, "recall at 3"),
        (np.zeros((2, 3), int), np.zeros((2, 3), int), 0, "recall at 0"),
        (np.zeros((2, 3), int), np.full((2, 3), -1), 2, "no query"),
        (np.zeros((0, 3), int), np.zeros((0, 3), int), 2, "no query"),
    ],
)
def test_rows_that_cannot_be_compared(found: np.ndarray, exact: np.ndarray, k: int, what: str) -> None:
    for measure in (recall_at, recall_half_width):
        with pytest.raises(InputError, match=what):
            measure(found, exact, k)


def test_percentiles() -> None:
    assert percentiles([0.001 * i for i in range(101)]) == pytest.approx({"p50_ms": 50, "p95_ms": 95, "p99_ms": 99})
    assert percentiles(np.array([0.25])) == {"p50_ms": 250.0, "p95_ms": 250.0, "p99_ms": 250.0}
    for bad in ([], [0.1, math.nan], [-0.1], [math.inf]):
        with pytest.raises(InputError, match="latencies"):
            percentiles(bad)


def test_table_for_the_screen() -> None:
    from rich.console import Console

    questions = [Question("0", "q", answers=["text"], positives=["a"])] * 2
    scores = score_retrieval(questions, [texts("a"), texts("b", "a")], ks=(1, 5))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(format_table({**scores, "latency": {"p50_ms": 1.0}, "note": "x"}))
    lines = [line for line in capture.get().splitlines() if "│" in line or "┃" in line]
    assert [cell.strip() for cell in re.split("[│┃]", lines[0])[1:-1]] == ["measure", "k=1", "k=5", "k=10"]
    gold = next(line for line in lines if "Gold passage in" in line)
    assert re.findall(r"\d+\.\d", gold) == ["50.0", "100.0"]
    mean = next(line for line in lines if "reciprocal" in line)
    assert re.findall(r"\d+\.\d", mean) == ["75.0"]
    assert "2 questions, searched to depth 2" in capture.get()


def test_metric_rows_pass_over_what_is_no_score() -> None:
    odd = {"gold_top@5": 0.5, "gold_top@1": 0.25, "gold_top@x": 1.0, "mrr@10": None, "em": 0.5, "hits@1": True}
    assert metric_rows(odd | {"ndcg@10": math.nan, "unknown@3": 1.0, "latency": {}}) == [
        ("Gold passage in the top k", {1: 0.25, 5: 0.5}),
        ("Exact match of the first QA pair", {1: 0.5}),
    ]
    assert metric_rows({}) == []


def test_stages_behind_retrieval_get_rows_of_their_own() -> None:
    results = {"em": 0.5, "rerank": {"em": 0.75, "hits@1": 0.75, "depth": 50}, "reader": {"answer_em": 0.25}}
    assert metric_rows(results) == [
        ("Exact match of the first QA pair", {1: 0.5}),
        ("Exact answer among the top k QA pairs, reranked", {1: 0.75}),
        ("Exact match of the first QA pair, reranked", {1: 0.75}),
        ("Exact match of the answer, read", {1: 0.25}),
    ]


def test_a_tally_keeps_no_hits() -> None:
    tally = Tally((1, 5))
    found, question = texts("a", "b"), Question("0", "q", ["text of b"], ["b"])
    passages = [weakref.ref(hit.passage) for hit in found]
    tally.add(question, found)
    expected = score_retrieval([question], [found], ks=(5, 1))
    del found
    gc.collect()
    assert [passage() for passage in passages] == [None, None]
    assert tally.results() == expected


def test_answers_are_scored_by_their_first() -> None:
    questions = [
        Question("0", "q", ["The King!"]),
        Question("1", "q", ["x"]),
        Question("2", "q"),
        Question("3", "q", ["y"]),
    ]
    scored = score_answers(questions, [["king", "x"], ["king", "x"], ["z"], []])
    assert scored == {"num_answer_questions": 3, "answer_em": pytest.approx(1 / 3)}
    assert score_answers([Question("0", "q")], [["a"]]) == {"num_answer_questions": 0}
