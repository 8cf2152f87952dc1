"""Graphs link their rows in an order drawn by chance: the same bytes however they come, the right rows, more recall."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import train
from pipelines.build import add_group, version_name
from pipelines.errors import ArtifactError, InputError, StorageError
from pipelines.index.build import add, add_whole
from pipelines.index.exact import exact_topk
from pipelines.index.search import search
from pipelines.index.spec import new_index, parse_spec
from pipelines.schema import FORMAT_VERSION
from pipelines.verify_shard import stored_rows
from tests.test_twins import World

N, D, Q, K = 6000, 24, 200, 10
_rng = np.random.default_rng(5)
TOPICS = np.sort(_rng.integers(0, 60, N))  # a corpus sorted by topic
_centres = _rng.standard_normal((60, D))


def near(topic_N: Any) -> Any:
    vectors = _centres[topic_N] + 0.3 * _rng.standard_normal((len(topic_N), D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


X, QUERIES, ROWS = near(TOPICS), near(_rng.integers(0, 60, Q)), np.arange(N, dtype=np.int64) + 1000


def blocks(*ends: int, dtype: Any = np.float32, num: int = N) -> Iterator[tuple[Any, Any]]:
    edges = [0, *sorted(ends), num]
    return ((X[a:b].astype(dtype), ROWS[a:b]) for a, b in pairwise(edges) if a < b)


def grown(tmp_path: Path, given: Iterator[tuple[Any, Any]], *, threads: int = 1) -> Any:
    index = new_index(parse_spec("HNSW8", D, "ip"))
    add_whole(index, given, str(tmp_path / "vectors"), threads)
    return index


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 599), max_size=5), st.integers(1, 2))
def test_neither_blocks_nor_threads_decide_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, ends: list[int], threads: int
) -> None:
    folder = tmp_path_factory.mktemp("order")
    whole = faiss.serialize_index(grown(folder, blocks(num=600))).tobytes()
    cut = grown(folder, blocks(*ends, num=600), threads=threads)
    assert faiss.serialize_index(cut).tobytes() == whole


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_every_row_is_there_once_and_leads_to_its_own_vector(tmp_path: Path, dtype: Any) -> None:
    index = grown(tmp_path, blocks(700, 4100, dtype=dtype))
    np.testing.assert_array_equal(stored_rows(index), ROWS)  # as they lie in the corpus
    stored_ND = faiss.downcast_index(index.index).storage.reconstruct_n(0, N)
    np.testing.assert_array_equal(stored_ND, X.astype(dtype).astype(np.float32))


def test_a_sorted_corpus_keeps_more_recall_than_in_its_own_order(tmp_path: Path) -> None:
    one_by_one = new_index(parse_spec("HNSW8", D, "ip"))
    for vectors_ND, row_N in blocks(*range(250, N, 250)):
        add(one_by_one, vectors_ND, row_N, 1)
    exact_QK = exact_topk(QUERIES, [(X, ROWS)], K, "ip")[1]

    def recall(index: Any) -> float:
        _, found_QK = search(index, QUERIES, K, {"efSearch": 16}, 1)
        return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found_QK, exact_QK, strict=True)]))

    assert recall(grown(tmp_path, blocks())) > recall(one_by_one) + 0.05


def test_what_cannot_be_added_or_written_is_refused(tmp_path: Path) -> None:
    assert grown(tmp_path, iter(())).ntotal == 0
    with pytest.raises(InputError, match="not finite"):
        grown(tmp_path, iter([(np.full((3, D), np.nan, np.float32), ROWS[:3])]))
    with pytest.raises(ArtifactError, match="width 24"):
        grown(tmp_path, iter([(np.ones((3, D - 1), np.float32), ROWS[:3])]))
    with pytest.raises(StorageError, match="is the disk full"):
        grown(Path("/dev/full/nowhere"), blocks())
    with pytest.raises(StorageError, match="No space left"):
        add_whole(new_index(parse_spec("HNSW8", D, "ip")), blocks(), "/dev/full")
    with pytest.raises(ArtifactError, match="not trained"):
        add_whole(new_index(parse_spec("HNSW8,SQ8", D, "ip")), blocks(), str(tmp_path / "vectors"))


def test_a_graph_shard_is_the_same_whenever_it_is_built_and_leaves_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    plan = world.plan(factory="HNSW8")
    trained = train.train_quantizer(plan)
    first = [add_group(plan, trained, shard, 0) for shard in plan.shards]
    contents = [Path(plan.store.path(receipt.name)).read_bytes() for receipt in first]
    plan.store.remove(first[1].name)
    again = [add_group(plan, trained, shard, 0, num_threads=2) for shard in plan.shards]
    assert [receipt.reused for receipt in again] == [True, False]
    assert [Path(plan.store.path(receipt.name)).read_bytes() for receipt in again] == contents
    assert not list(tmp_path.rglob(".tmp-*"))
    rows_N = stored_rows(faiss.read_index(plan.store.path(first[1].name)))
    np.testing.assert_array_equal(rows_N, np.arange(200, 400))


@pytest.mark.parametrize(("factory", "drawn"), [("HNSW8", True), ("PCA4,HNSW8", True), ("HNSW8,SQ8", True),
                         ("IVF4_HNSW8,SQ8", False), ("IVF4,SQ8", False), ("Flat", False), ("NSG8", False)])  # fmt: skip
def test_the_order_names_the_versions_of_graphs_alone(tmp_path: Path, factory: str, drawn: bool) -> None:
    plan = World(tmp_path).plan(factory=factory)
    assert plan.order == ("mixed" if drawn else "")
    encoder = plan.embeddings["encoder"]
    made_from = [encoder["fingerprint"], encoder["query_fingerprint"], plan.embeddings["snapshot"]]
    before = version_name([FORMAT_VERSION, *made_from, "ip", 2], plan.config.model_dump(), tuned=False)
    assert (plan.version == before) == (not drawn)
