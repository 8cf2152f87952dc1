"""The files that figures were published on are read as released, or refused with the line; measures are exact."""

from __future__ import annotations

import bz2
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.benchmarks import files, measures
from pipelines.errors import InputError


def sts(url: str) -> Any:
    return files.read_sts(url, "test")


def collection(url: str) -> Any:
    return list(files.read_collection(url))


def pairs(url: str) -> Any:
    return list(files.read_corpus(url, pairs=True))


PAIR = b'{"question": "a", "answer": ["x"]}\n'
BAD_LINES: dict[str, tuple[Callable[[str], Any], bytes, str]] = {
    "a collection with one column": (collection, b"1\ta\nno tab\n", "line 2"),
    "a collection of two widths": (collection, b"1\ta\n2\tt\tb\n", "line 2"),
    "a collection that is not UTF-8": (collection, b"1\ta\n2\t\xff\n", "line 2"),
    "an empty collection": (collection, b"\n", "the file is empty"),
    "queries that come twice": (files.read_queries, b"1\ta\n1\tb\n", "'1' comes twice"),
    "queries with three columns": (files.read_queries, b"1\ta\tb\n", "3 column"),
    "qrels with three columns": (files.read_qrels, b"1 0 2\n", "line 1"),
    "qrels with a grade that is none": (files.read_qrels, b"1 0 2 1\n1 0 3 high\n", "'high' is no whole number"),
    "qrels without anything relevant": (files.read_qrels, b"1 0 2 0\n", "no passage is judged relevant"),
    "candidates without texts": (lambda u: list(files.read_candidates(u)), b"1\t2\n", "2 column"),
    "candidate ids in five columns": (lambda u: list(files.read_candidate_ids(u)), b"1 2 3 4 5\n", "5 column"),
    "STS without scores": (sts, b"sentence1\tsentence2\na\tb\n", "sentence1, sentence2"),
    "STS with a word for a score": (sts, b"score\tsentence1\tsentence2\nx\ta\tb\n", "'x'"),
    "STS with a score of nan": (sts, b"score\tsentence1\tsentence2\nnan\ta\tb\n", "'nan'"),
    "STS with a short line": (sts, b"score\tsentence1\tsentence2\n1\ta\n", "line 2"),
    "STS of another split": (sts, b"split\tscore\tsentence1\tsentence2\ndev\t1\ta\tb\n", "'test'"),
    "STS with an open quote": (sts, b'score,sentence1,sentence2\n1,"a"x,b\n', "line 2"),
    "QA pairs without answers": (pairs, PAIR + b'{"question": "b"}\n', "line 2"),
    "QA pairs that are no JSON": (pairs, PAIR + b"\nnot\n", "line 3"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_files_are_refused_with_their_line(tmp_path: Path, case: str) -> None:
    read, content, message = BAD_LINES[case]
    path = tmp_path / ("bad.jsonl" if "pairs" in case else "bad.tsv")
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read(str(path))
    assert str(path) in caught.value.where


def test_lines_as_other_systems_write_them(tmp_path: Path) -> None:
    content = "\ufeff7\t“quoted\r\n\n8\tlast, without a newline".encode()
    for name, data in (("plain.tsv", content), ("packed.tsv.bz2", bz2.compress(content))):
        (tmp_path / name).write_bytes(data)
        assert files.read_queries(str(tmp_path / name)) == {"7": "“quoted", "8": "last, without a newline"}


def test_a_missing_a_cut_off_and_an_endless_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file"):
        files.read_queries(str(tmp_path / "nowhere.tsv"))
    packed = tmp_path / "cut.tsv.gz"
    packed.write_bytes(gzip.compress(b"1\ta\n" * 1000)[:-12])
    with pytest.raises(InputError, match="damaged or cut short"):
        list(files.read_lines(str(packed)))
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100)
    long = tmp_path / "long.tsv"
    long.write_bytes(b"1\ta\n2\t" + b"x" * 1000)
    with pytest.raises(InputError, match="too long"):
        files.read_queries(str(long))


def test_grades_of_zero_are_as_if_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "qrels"
    path.write_text("1 0 a 3\n1\tQ0\tb\t0\n2 0 c 1\n3 0 d 0\n")
    assert files.read_qrels(str(path)) == {"1": {"a": 3}, "2": {"c": 1}}


def test_a_corpus_of_several_files_names_the_one_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(PAIR * 3)
    (tmp_path / "b.jsonl").write_bytes(PAIR.replace(b'"a"', b'"c"') + b"[]\n")
    with pytest.raises(InputError, match=r"row 5 cannot be read") as caught:
        pairs(str(tmp_path / "*.jsonl"))
    assert caught.value.where == f"{tmp_path / 'b.jsonl'}, line 2"


def test_patterns_are_found_as_dpr_finds_them() -> None:
    texts = ["Born in CAFÉ\nsociety", "in 1984.", ""]
    assert list(measures.pattern_matches(texts, ["^society$", "(never closed"])) == [True, False, False]
    assert list(measures.pattern_matches(texts, ["cafe\u0301", r"19\d\d"])) == [True, True, False]
    assert list(measures.pattern_matches(texts, ["[a", "("])) == [False, False, False]
    assert measures.first_match_rates([[False, True], [False, False], []], (1, 2)) == [0.0, pytest.approx(1 / 3)]


def test_spearman_against_scipy() -> None:
    from scipy.stats import rankdata, spearmanr

    rng = np.random.default_rng(3)
    for size in (2, 5, 50):
        left, right = rng.integers(0, max(3, size // 2), size), rng.normal(size=size).round(1)
        left[:2] = 0, 1
        right[:2] = -9, 9
        assert measures.average_ranks(left.astype(float)).tolist() == rankdata(left).tolist()
        assert measures.spearman(left, right) == pytest.approx(spearmanr(left, right).statistic, abs=1e-12)
    with pytest.raises(InputError, match="undefined"):
        measures.spearman(np.ones(5), np.arange(5))
