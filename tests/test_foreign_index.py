"""FAISS files as DPR and PAQ build them, adopted: the right rows and the right scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from pipelines.errors import ArtifactError
from pipelines.index.build import read, write
from pipelines.index.exact import exact_topk
from pipelines.index.identity import quantizer_digest
from pipelines.index.search import search
from pipelines.index.spec import parse_spec
from pipelines.interchange.foreign_index import adopt, open_foreign

NUM, DIM, K = 600, 16, 10
RNG = np.random.default_rng(0)
# The lengths of DPR's vectors vary by a few percent.
VECTORS = (RNG.normal(size=(NUM, DIM)) * RNG.uniform(0.95, 1.05, (NUM, 1))).astype(np.float32)
QUERIES = RNG.normal(size=(20, DIM)).astype(np.float32)
ROWS = RNG.permutation(NUM)
PHI = float((VECTORS**2).sum(axis=1).max())
AUGMENTED = np.hstack([VECTORS, np.sqrt(np.maximum(PHI - (VECTORS**2).sum(axis=1, keepdims=True), 0))])
QUANTIZER = faiss.ScalarQuantizer
KINDS = ["dpr-flat", "dpr-hnsw", "dpr-hnsw-sq", "paq-hnsw-fp16", "paq-flat-sq8", "paq-flat-fp16", "augmented-sq8"]
FACTORIES = dict(
    zip(KINDS, ["Flat", "HNSW64,Flat", "HNSW32,SQ8", "HNSW32,SQfp16", "SQ8", "SQfp16", "SQ8"], strict=True)
)


def upstream(kind: str) -> Any:
    """Return an index as DPR's or PAQ's script builds it."""
    faiss.omp_set_num_threads(1)
    index = {
        "dpr-flat": lambda: faiss.IndexFlatIP(DIM),
        "dpr-hnsw": lambda: faiss.IndexHNSWFlat(DIM + 1, 64),
        "dpr-hnsw-sq": lambda: faiss.IndexHNSWSQ(DIM + 1, QUANTIZER.QT_8bit, 32),
        "paq-hnsw-fp16": lambda: faiss.IndexHNSWSQ(DIM + 1, QUANTIZER.QT_fp16, 32),
        "paq-flat-sq8": lambda: faiss.IndexScalarQuantizer(DIM, QUANTIZER.QT_8bit, faiss.METRIC_L2),
        "paq-flat-fp16": lambda: faiss.IndexScalarQuantizer(DIM, QUANTIZER.QT_fp16, faiss.METRIC_L2),
        "augmented-sq8": lambda: faiss.IndexScalarQuantizer(DIM + 1, QUANTIZER.QT_8bit, faiss.METRIC_L2),
    }[kind]()
    vectors = np.ascontiguousarray(AUGMENTED if index.d == DIM + 1 else VECTORS, np.float32)
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch, index.hnsw.efConstruction = 128, 200
    index.train(vectors)
    index.add(vectors)
    return index


def through_file(index: Any, path: Path) -> Any:
    faiss.write_index(index, str(path))
    return read(str(path), mmap=True)


def adopted(kind: str, folder: Path) -> Any:
    """Return the index after the way it takes: read mapped, adopted, written, read mapped again."""
    foreign = open_foreign(through_file(upstream(kind), folder / "upstream"), DIM, "here")
    write(adopt(foreign, ROWS), str(folder / "ours"))
    return read(str(folder / "ours"), mmap=True)


def exact(metric: Any) -> Any:
    return exact_topk(QUERIES, [(VECTORS[np.argsort(ROWS)], np.arange(NUM))], K, metric)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_vectors_and_rows_those_of_the_ids(kind: str, tmp_path: Path) -> None:
    index = adopted(kind, tmp_path)
    assert (index.d, index.ntotal) == (DIM, NUM)
    metric = "l2" if kind.startswith("paq-flat") else "ip"
    score_BK, row_BK = search(index, QUERIES, K)
    exact_score_BK, exact_row_BK = exact(metric)
    by_row = VECTORS[np.argsort(ROWS)][row_BK]
    own = np.einsum("bd,bkd->bk", QUERIES, by_row)
    own = own if metric == "ip" else -((QUERIES[:, None] - by_row) ** 2).sum(-1)
    coded = "sq" in kind or "fp16" in kind
    np.testing.assert_allclose(score_BK, own, atol=0.15 if coded else 1e-4)
    np.testing.assert_allclose(score_BK[:, 0], exact_score_BK[:, 0], atol=0.15 if coded else 1e-4)
    assert np.mean([len(set(a) & set(b)) / K for a, b in zip(row_BK, exact_row_BK, strict=True)]) > (
        0.9 if coded else 0.999
    )


def test_an_adopted_graph_gives_upstreams_hits_and_the_score_that_phi_gives(tmp_path: Path) -> None:
    """DPR's own way, a zero after each query and (phi + |q|^2 - distance) / 2, is the reference."""
    theirs = upstream("dpr-hnsw")
    zeros = np.zeros((len(QUERIES), 1), np.float32)
    distance_BK, place_BK = theirs.search(np.hstack([QUERIES, zeros]), K)
    reference_BK = (PHI + (QUERIES**2).sum(axis=1, keepdims=True) - distance_BK) / 2
    score_BK, row_BK = search(adopted("dpr-hnsw", tmp_path), QUERIES, K)
    np.testing.assert_array_equal(row_BK, ROWS[place_BK])
    np.testing.assert_allclose(score_BK, reference_BK, atol=1e-4)


def test_search_parameters_reach_the_graph(tmp_path: Path) -> None:
    index = adopted("dpr-hnsw-sq", tmp_path)
    narrow, wide = (search(index, QUERIES, 1, {"efSearch": ef})[1] for ef in (1, 400))
    _, best = exact("ip")
    assert (wide == best[:, :1]).mean() >= (narrow == best[:, :1]).mean()
    assert not np.array_equal(narrow, wide)


@pytest.mark.parametrize("kind", KINDS)
def test_the_empty_index_is_of_the_same_kind_and_codes(kind: str, tmp_path: Path) -> None:
    foreign = open_foreign(through_file(upstream(kind), tmp_path / "x"), DIM, "here")
    assert foreign.factory == FACTORIES[kind]
    parse_spec(foreign.factory, DIM, foreign.metric)
    np.testing.assert_allclose(foreign.vectors(np.array([3, 1])), VECTORS[[3, 1]], atol=0.05)
    empty = adopt(foreign.empty(), np.zeros(0, np.int64))
    whole = adopted(kind, tmp_path)
    write(empty, str(tmp_path / "empty"))
    empty = read(str(tmp_path / "empty"))
    assert (empty.ntotal, empty.d, empty.is_trained) == (0, DIM, True)
    if "hnsw" not in kind:  # a graph's training is not apart from its rows
        assert quantizer_digest(empty) == quantizer_digest(whole)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: faiss.index_factory(DIM, "IVF4,Flat"), "type IndexIVFFlat is not imported"),
        (lambda: faiss.IndexPQ(DIM, 4, 8), "type IndexPQ is not imported"),
        (lambda: faiss.IndexFlat(DIM, faiss.METRIC_L1), "metric 2 is not imported"),
        (lambda: faiss.IndexFlatIP(DIM + 1), "width 17"),
        (lambda: faiss.IndexFlatL2(DIM + 2), "width 18"),
        (lambda: faiss.IndexScalarQuantizer(DIM, QUANTIZER.QT_8bit_uniform), "codes of type 2 are not imported"),
    ],
)
def test_other_indexes_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        open_foreign(make(), DIM, "here")


def test_an_index_one_wider_that_is_not_augmented_is_refused() -> None:
    index = faiss.IndexHNSWFlat(DIM + 1, 16)
    index.add(np.hstack([VECTORS, VECTORS[:, :1]]))
    with pytest.raises(ArtifactError, match="not augmented: squared lengths from"):
        open_foreign(index, DIM, "here")
