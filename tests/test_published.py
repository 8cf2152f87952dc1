"""The table of published figures says what the sources print, and what a user has to supply."""

from __future__ import annotations

import pytest

from pipelines.errors import ConfigError
from pipelines.published import DATA, TASKS, Row, check_inputs, describe_inputs, find, rows
from pipelines.reproduce import _LABELS


def figures(name: str) -> dict[tuple[str, str], float]:
    return {(f.data, f.metric): f.value for f in find(name).figures}


def test_figures_as_the_sources_print_them() -> None:
    assert list(figures("paq/nq_xlarge").values()) == [41.1, 47.7, 35.7, 48.9]
    assert figures("paq/reranker_multi_xxlarge") == {("nq-test", "em"): 47.7, ("trivia-test", "em"): 52.1}
    rdr = figures("rdr/single-nq")
    assert [rdr["nq-test", f"top@{k}"] for k in (1, 5, 20, 50, 100)] == [54.29, 72.16, 82.8, 86.34, 88.2]
    assert ("nq-test", "top@50") not in figures("dpr/single-nq")  # the source leaves it out
    assert figures("dpr/multiset")["trec-test", "top@20"] == 89.1
    assert figures("st/stsb-mpnet-base-v2") == {("stsb-test", "spearman"): 88.57}
    assert figures("ce/ms-marco-MiniLM-L-6-v2") == {
        ("dl19", "ndcg@10"): 74.30,
        ("dl19", "docs_per_second"): 1800,
        ("msmarco-dev", "mrr@10"): 39.01,
        ("msmarco-dev", "docs_per_second"): 1800,
    }


def test_every_family_of_rows_is_complete() -> None:
    counts: dict[str, int] = {}
    for row in rows():
        kind = "paq/reranker" if row.name.startswith("paq/reranker") else row.name.split("/")[0]
        counts[kind] = counts.get(kind, 0) + 1
    # ten retrievers and the README's run over HNSW; eight rerankers; six STS, four MS MARCO, one NQ; fifteen
    assert counts == {"paq": 11, "paq/reranker": 8, "rdr": 1, "dpr": 5, "st": 11, "ce": 15}
    assert len({row.name for row in rows()}) == len(rows())
    names = [name.casefold() for row in rows() for name in (row.name, *row.aliases)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_every_row_hangs_together(row: Row) -> None:
    assert row.figures
    assert row.source
    for figure in row.figures:
        assert figure.data in DATA
        assert figure.metric in _LABELS
        assert figure.metric == "docs_per_second" or 0 < figure.value < 100
    for way in TASKS[row.task].ways:
        assert set(way) | set(TASKS[row.task].optional) <= set(TASKS[row.task].needs)


@pytest.mark.parametrize("row", [r for r in rows() if r.name.startswith("st/")], ids=lambda row: row.name)
def test_similarity_is_that_of_the_released_model(row: Row) -> None:
    is_dot = any(piece in row.name for piece in ("dot-prod", "tas-b", "ance"))
    assert row.similarity == ("dot" if is_dot else "cosine")
    assert row.formatting == ("pair" if "nq-distilbert" in row.name else None)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("PAQ/Multi_Base_256", "paq/multi_base_256"),
        ("retriever_multi_base_256", "paq/multi_base_256"),
        ("cross-encoder/ms-marco-MiniLM-L6-v2", "ce/ms-marco-MiniLM-L-6-v2"),
        ("ms-marco-TinyBERT-L-2", "ce/ms-marco-TinyBERT-L-2"),
        ("nboost/pt-bert-large-msmarco", "ce/pt-bert-large-msmarco"),
        ("sentence-transformers/msmarco-roberta-base-ance-firstp", "st/msmarco-roberta-base-ance-fristp"),
    ],
)
def test_rows_are_found_by_every_spelling(given: str, name: str) -> None:
    assert find(given).name == name


def test_a_miss_names_the_nearest_row() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paq/multi_base_256'"):
        find("paq/multi_base-256")
    with pytest.raises(ConfigError, match=r"benchmarks/rows\.py"):
        find("zzzzzz")


GOOD = {"checkpoint": "m", "corpus": "c.jsonl", "questions": "q.jsonl", "data": "nq-test"}


def test_inputs_that_suffice() -> None:
    assert check_inputs(find("paq/multi_base_256"), GOOD) == "nq-test"
    assert check_inputs(find("paq/multi_base_256"), GOOD | {"reranker": "r", "data": "trivia-test"}) == "trivia-test"
    assert check_inputs(find("st/stsb-mpnet-base-v2"), {"checkpoint": "m", "sts": "s"}) == "stsb-test"
    assert check_inputs(find("dpr/single-nq"), {"results": "r.json", "data": "nq-dev"}) == "nq-dev"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "lacks root and index and questions|lacks checkpoint and corpus and questions"),
        ({"checkpoint": "m", "corpus": "c", "data": "nq-test"}, "lacks questions"),
        (GOOD | {"corpous": "c"}, "did you mean 'corpus'"),
        (GOOD | {"corpus": " "}, "'corpus' is empty"),
        (GOOD | {"root": "r", "index": "i"}, "root and index would not be used beside checkpoint, corpus, questions"),
        ({k: v for k, v in GOOD.items() if k != "data"}, "several data sets"),
        (GOOD | {"data": "squad-test"}, "no figures on 'squad-test'"),
    ],
)
def test_inputs_that_do_not_suffice_are_explained(inputs: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_inputs(find("paq/multi_base_256"), inputs)
    assert "data=nq-test or data=trivia-test" in str(caught.value) or "JSON lines of QA pairs" in str(caught.value)


def test_the_needs_name_every_key_with_its_format() -> None:
    told = describe_inputs(find("ce/ms-marco-MiniLM-L-6-v2"))
    for piece in ("reranker:", "top1000:", "qrels:", "collection:", "queries:", "data:", "dl19, msmarco-dev"):
        assert piece in told
