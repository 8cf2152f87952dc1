"""Two tiers: what codes find is decided by the vectors beside them, in every search and with every filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.build import BuildPlan, plan_build
from pipelines.config import IndexConfig
from pipelines.errors import ArtifactError, ConfigError, InputError
from pipelines.index.among import search_among, select
from pipelines.index.balance import list_sizes
from pipelines.index.build import add, train
from pipelines.index.exact import exact_topk
from pipelines.index.search import search
from pipelines.index.spec import parse_spec
from pipelines.index.tiers import TwoTier, map_vectors, with_vectors, write_vectors

N, D, FIRST = 800, 16, 5000
_rng = np.random.default_rng(4)
X = _rng.standard_normal((N, D)).astype(np.float16)
QUERIES = _rng.standard_normal((20, D)).astype(np.float32)
ROWS = np.arange(FIRST, FIRST + N)


def codes(factory: str = "PQ4x4", metric: Any = "ip") -> Any:
    index = train(parse_spec(factory, D, metric), X, 0, 1)
    add(index, X, ROWS, 1)
    return index


def exact(queries: Any, k: int, metric: Any = "ip", rows: Any = slice(None)) -> Any:
    return exact_topk(queries, [(X[rows], ROWS[rows])], k, metric, num_threads=1)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("factory", ["PQ4x4", "IVF8,PQ4x4", "IVF8,PQ8x4fs", "HNSW8,SQ8", "PCA8,IVF8,SQ8"])
def test_all_rows_as_candidates_are_an_exact_search(factory: str, metric: Any) -> None:
    tier = TwoTier(codes(factory, metric), X, FIRST)
    every = {"nprobe": 8} if "IVF" in factory else {"efSearch": N} if "HNSW" in factory else {}
    score, rows = search(tier, QUERIES, 10, {"k_factor": N, **every}, 1)
    expected_score, expected = exact(QUERIES, 10, metric)
    assert (rows == expected).mean() > 0.99  # graphs may lose a node
    same = rows == expected
    np.testing.assert_allclose(score[same], expected_score[same], rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 40), factor=st.integers(1, 30))
def test_more_candidates_never_find_less_and_scores_are_exact(k: int, factor: int) -> None:
    tier = TwoTier(_CODES, X, FIRST)
    truth = exact(QUERIES, k)[1]
    found = []
    for more in (factor, 2 * factor):
        score, rows = search(tier, QUERIES, k, {"k_factor": more}, 1)
        assert (np.diff(score, axis=1) <= 0).all()
        products = np.einsum("bkd,bd->bk", X[rows - FIRST].astype(np.float32), QUERIES)
        np.testing.assert_allclose(score, products, rtol=1e-4, atol=1e-4)
        found.append(np.mean([len(set(a) & set(b)) / k for a, b in zip(rows.tolist(), truth.tolist(), strict=True)]))
    assert found[0] <= found[1]
    plain = search(_CODES, QUERIES, k, {}, 1)[1]
    at_least = np.mean([len(set(a) & set(b)) / k for a, b in zip(plain.tolist(), truth.tolist(), strict=True)])
    assert found[0] >= at_least


_CODES = codes()


def test_a_filter_leaves_the_selected_rows_in_their_exact_order() -> None:
    mask = np.zeros(N, bool)
    mask[::3] = True
    tier = TwoTier(codes("IVF8,PQ4x4"), X, FIRST)
    selection = select(tier, mask, FIRST)
    _, rows = search_among(tier, selection, QUERIES, 5, {"k_factor": 200, "nprobe": 8}, 1)
    assert (rows == exact(QUERIES, 5, rows=mask)[1]).all()
    few = np.zeros(N, bool)
    few[:3] = True
    _, rows = search_among(tier, select(tier, few, FIRST), QUERIES, 5, {"nprobe": 1}, 1)
    assert (np.sort(rows, axis=1)[:, 2:] == ROWS[:3]).all()
    assert (np.sort(rows, axis=1)[:, :2] == -1).all()


def test_its_parameters_are_the_codes_own_and_the_candidates() -> None:
    tier = TwoTier(codes("IVF8,SQ8"), X, FIRST)
    assert search(tier, QUERIES, 3)[1].shape == (20, 3)  # untuned
    for bad in ({"k_facto": 2}, {"k_factor": 0}, {"efSearch": 8}):
        with pytest.raises(ConfigError):
            search(tier, QUERIES, 3, bad)
    with pytest.raises(ConfigError, match="k_factor"):
        search(tier.codes, QUERIES, 3, {"k_factor": 2})
    sizes = list_sizes(tier)
    assert sizes is not None
    assert sizes.sum() == N


def test_the_file_is_plain_npy_and_is_refused_when_it_does_not_fit(tmp_path: Path) -> None:
    path = str(tmp_path / "vectors-000.npy")
    blocks = [(X[:300].astype(np.float32), ROWS[:300]), (X[300:], ROWS[300:])]
    write_vectors(path, iter(blocks), N, D)
    assert (np.load(path) == X).all()
    mapped = map_vectors(path)
    assert isinstance(mapped, np.memmap)
    files = {"vectors-000.npy": {"first_row": FIRST}}
    tier = with_vectors(_CODES, 0, files, lambda name: str(tmp_path / name))
    assert (search(tier, QUERIES, 5, {"k_factor": N})[1] == exact(QUERIES, 5)[1]).all()
    assert with_vectors(_CODES, 1, files, str) is _CODES
    with pytest.raises(ArtifactError, match="shape"):
        TwoTier(_CODES, mapped[:-1], FIRST)
    with pytest.raises(ArtifactError, match="300 vectors"):
        write_vectors(path, iter(blocks[:1]), N, D)
    with pytest.raises(InputError, match="fp16"):
        write_vectors(path, [(np.full((1, D), 1e6, np.float32), ROWS[:1])], 1, D)
    for content in (b"", b"no array", b"\x93NUMPY\x01\x00"):
        Path(path).write_bytes(content)
        with pytest.raises(ArtifactError, match="not a file of vectors"):
            map_vectors(path)
    np.save(path, X.astype(np.float32))
    with pytest.raises(ArtifactError, match="fp16"):
        map_vectors(path)


def plan(root: Path, **index: Any) -> BuildPlan:
    encoder = {"fingerprint": "e", "query_fingerprint": "q"}
    embedded = {"num_rows": N, "dim": D, "snapshot": "s", "encoder": encoder}
    return plan_build(str(root), IndexConfig(**index), {}, embedded, 1)


def test_the_candidates_are_tuned_beside_what_the_codes_have(tmp_path: Path) -> None:
    refined = plan(tmp_path, factory="IVF8,PQ4", refine="exact", min_recall=0.9)
    assert [(knob.name, knob.most) for knob in refined.tunable] == [("k_factor", 80), ("nprobe", 8)]
    assert [knob.name for knob in plan(tmp_path, factory="PQ4", refine="exact", min_recall=0.9).tunable] == ["k_factor"]
    bare = plan(tmp_path, factory="IVF8,PQ4", min_recall=0.9)
    assert (refined.version == bare.version, refined.build == bare.build) == (False, True)
    with pytest.raises(ConfigError, match="refines its candidates already"):
        plan(tmp_path, factory="IVF8,PQ4,RFlat", refine="exact")
    assert TwoTier(_CODES, X, FIRST).metric_type == faiss.METRIC_INNER_PRODUCT
