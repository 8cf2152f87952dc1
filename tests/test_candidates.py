"""The candidate indexes of a plan: valid for every width, and as large as they are said to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_index import candidates_for
from pipelines.config import parse_config
from pipelines.encode import resolve
from pipelines.errors import ConfigError
from pipelines.index.build import add, train, write
from pipelines.index.candidates import RECALL_CLASSES, Candidate, candidates, default_lists, finer, pq_pieces
from pipelines.index.search import search
from pipelines.index.spec import IndexSpec, parse_spec
from pipelines.sizes import parse_bytes
from tests.checkpoints import write_sentence_transformer
from tests.test_corpus import ingest

FAMILIES = ["Flat", "SQ8", "SQfp16", "HNSW32", "HNSW32,SQ8", "IVF{k},Flat", "IVF{k},SQ8", "IVF{k},RaBitQ"]
N, D = 4000, 32
_rng = np.random.default_rng(3)
X = _rng.standard_normal((N, D)).astype(np.float32)


def by_factory(found: list[Candidate]) -> dict[str, Candidate]:
    return {c.factory: c for c in found}


@pytest.mark.parametrize(("dim", "metric"), [(1, "ip"), (7, "l2"), (97, "ip"), (384, "l2"), (728, "ip"), (768, "ip")])
def test_every_family_is_there_and_valid_at_every_width(dim: int, metric: Any) -> None:
    found = by_factory(candidates(1_000_000, dim, metric))
    assert {family.format(k=4096) for family in FAMILIES} <= set(found)
    assert any(f.startswith("OPQ") and ",PQ" in f and not f.endswith("fs") for f in found)
    assert any(f.endswith("x4fs") for f in found)
    assert dim < 2 or f"PCA{dim // 2},IVF4096,SQ8" in found
    for factory, candidate in found.items():
        spec = parse_spec(factory, dim, metric)
        assert candidate.mergeable == spec.mergeable
        assert candidate.bytes_per_vector >= spec.bytes_per_vector


def test_the_sizes_of_a_product_quantizer_divide_the_width() -> None:
    assert pq_pieces(768, 96) == (96, 768)
    assert pq_pieces(728, 91) == (91, 728)
    assert pq_pieces(728, 48) == (52, 728)
    assert pq_pieces(97, 12) == (12, 96)  # a prime width: OPQ projects to a multiple
    found = by_factory(candidates(10**6, 728, "ip"))
    assert {"IVF4096,PQ182", "IVF4096,PQ91", "OPQ91,IVF4096,PQ91"} <= set(found)
    assert "OPQ12_96,IVF4096,PQ12" in by_factory(candidates(10**6, 97, "ip"))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_pieces_always_divide_the_width_they_come_with(dim: int, wanted: int) -> None:
    wanted = min(wanted, dim)
    pieces, width = pq_pieces(dim, wanted)
    assert width % pieces == 0
    assert width == dim or (pieces == wanted and dim - width < pieces)
    assert wanted / 1.5 <= pieces <= wanted * 1.5


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 10**10))
def test_lists_follow_the_root_of_the_rows_and_their_training_points(num_rows: int) -> None:
    lists = default_lists(num_rows)
    assert lists * 39 <= num_rows
    assert lists == 0 or 4 <= lists <= 2**18
    if 100_000 <= num_rows < 10**9:
        assert 2 * num_rows**0.5 <= lists <= 6 * num_rows**0.5


def test_known_corpora_get_usual_lists() -> None:
    assert [default_lists(n) for n in (100, 400_000, 4_000_000, 21_015_324)] == [0, 2048, 8192, 16384]


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_files_are_as_large_as_predicted(metric: Any, tmp_path: Path) -> None:
    found = candidates(N, D, metric)
    assert len(found) >= 14
    for candidate in found:
        if metric == "l2" and "OPQ" in candidate.factory:
            continue  # slow to train, and the metric changes only what the same code without OPQ shows
        path = tmp_path / "index.faiss"
        index = train(parse_spec(candidate.factory, D, metric), X[:600], num_threads=1)
        add(index, X, np.arange(N), num_threads=1)
        write(index, str(path))
        assert candidate.file_bytes == pytest.approx(path.stat().st_size, rel=0.03, abs=4096), candidate.factory
        assert (search(index, X[:3], 3)[1] >= 0).all(), candidate.factory
        assert candidate.memory_bytes - candidate.file_bytes == table_bytes(index), candidate.factory


def table_bytes(index: Any) -> int:
    """The bytes of what FAISS computes beforehand for an IVF-PQ, as it says itself."""
    import faiss

    from pipelines.index.structure import layers

    leaf = layers(index)[-1]
    return 4 * int(leaf.precomputed_table.size()) if type(leaf) is faiss.IndexIVFPQ else 0


def test_an_empty_index_is_as_large_as_its_fixed_part() -> None:
    """Wide vectors make matrices and centroids of megabytes: each is in the sum, by the file of the trained index."""
    import faiss

    from pipelines.index.candidates import _fixed_bytes

    rng = np.random.default_rng(0)
    sample = rng.standard_normal((300, 96)).astype(np.float32)
    for factory in ("PCA48,SQ8", "PCA48,IVF64,SQ8", "OPQ4_92,IVF64,PQ4", "IVF64,PQ48x4fs", "IVF64,RaBitQ"):
        index = train(parse_spec(factory, 96, "ip"), sample, num_threads=1)
        size = len(faiss.serialize_index(index))
        padding = 64 * int(index_code_size(index)) * 16 if "fs" in factory else 0
        predicted = _fixed_bytes(IndexSpec(factory, 96, "ip"))[0] - padding
        assert predicted == pytest.approx(size, rel=0.02), factory


def index_code_size(index: Any) -> int:
    from pipelines.index.structure import layers

    return int(layers(index)[-1].code_size)


def test_shards_repeat_the_fixed_part() -> None:
    one, four = (by_factory(candidates(10**6, 256, "ip", num)) for num in (1, 4))
    lists = 4 * 4096 * 256
    assert four["IVF4096,Flat"].file_bytes - one["IVF4096,Flat"].file_bytes == pytest.approx(3 * lists, rel=0.02)
    assert four["Flat"].file_bytes == one["Flat"].file_bytes


def test_the_best_recall_comes_first_then_the_least_memory() -> None:
    found = candidates(4_000_000, 384, "ip")
    order = [(RECALL_CLASSES.index(c.recall), c.memory_bytes) for c in found]
    assert order == sorted(order)
    assert found[0].factory == "Flat"
    assert {c.recall for c in found} == set(RECALL_CLASSES)
    fitting = [c.factory for c in found if c.fits(2 << 30)]
    assert fitting[0] == "SQ8"
    assert "HNSW32" not in fitting
    assert all(c.fits(None) for c in found)
    assert {c.search for c in found if c.recall in ("exact", "near exact")} == {"scan", "lists", "graph"}


def test_few_rows_leave_what_cannot_be_trained() -> None:
    fewest = {c.factory for c in candidates(3, 64, "ip")}
    assert fewest == {"Flat", "SQfp16", "SQ8", "HNSW32", "HNSW32,SQ8"}
    few = by_factory(candidates(200, 64, "ip"))
    assert "IVF4,Flat" in few
    assert all(f.endswith("x4fs") and "OPQ" not in f for f in few if "PQ" in f)  # 256 centroids want 256 rows
    for bad in ((0, 8, 1), (8, 0, 1), (8, 8, 0)):
        with pytest.raises(ConfigError):
            candidates(bad[0], bad[1], "ip", bad[2])


@pytest.mark.parametrize(
    ("factory", "offered"),
    [("Flat", []), ("SQfp16", ["Flat"]), ("SQ8", ["SQfp16", "Flat"]), ("IVF64,PQ8", ["IVF64,SQ8", "Flat"]),
     ("OPQ8,IVF64,PQ8x4fs", ["IVF64,SQ8", "Flat"]), ("IVF64,SQ8", ["IVF64,SQfp16", "Flat"]),
     ("IVF64,Flat", ["Flat"]), ("IVF64_HNSW16,SQ8", ["IVF64_HNSW16,SQfp16", "Flat"]), ("PQ8", ["SQ8", "Flat"]),
     ("HNSW16", ["HNSW64", "Flat"]), ("HNSW64", ["Flat"]), ("HNSW32,SQ8", ["HNSW32,SQfp16", "Flat"]),
     ("IVF64,PQ8,RFlat", ["IVF64,SQ8", "Flat"]), ("PCA16,SQ8", ["SQfp16", "Flat"])],
)  # fmt: skip
def test_what_loses_less_is_offered(factory: str, offered: list[str]) -> None:
    assert finer(parse_spec(factory, 32, "ip")) == offered


# Through the command


def test_the_command_lists_what_fits() -> None:
    shown = CliRunner().invoke(app, ["plan", "--rows", "21015324", "--dim", "728", "--memory", "32 GB", "--json"])
    result = json.loads(shown.stdout)
    assert (result["num_rows"], result["dim"], result["budget_bytes"]) == (21_015_324, 728, 32 * 10**9)
    assert (result["best"], result["best_without_scan"]) == ("SQfp16", "IVF16384,SQ8")
    fits = {c["factory"]: c["fits"] for c in result["candidates"]}
    assert (fits["Flat"], fits["SQ8"], fits["HNSW32"]) == (False, True, False)
    shown = CliRunner().invoke(app, ["plan", "--rows", "5000", "--dim", "64", "--memory", "1kB"], env={"COLUMNS": "80"})
    assert "Best that fits 1 kB: none" in shown.stdout
    assert "…" not in shown.stdout


def test_a_config_gives_rows_width_metric_and_shards(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"id": f"p{i}", "text": f"passage {i}"}) + "\n" for i in range(70))
    (tmp_path / "corpus.jsonl").write_text(rows)
    content: dict[str, Any] = {
        "root": str(tmp_path / "root"),
        "corpus": {"name": "c", "sources": [str(tmp_path / "corpus.jsonl")]},
        "encoder": {"checkpoint": write_sentence_transformer(str(tmp_path / "model"))},
        "index": {"metric": "l2", "num_shards": 3},
    }
    config = parse_config(content)
    with pytest.raises(ConfigError, match="no snapshot") as caught:
        candidates_for(config, None, None, None, None, None)
    assert "--rows" in caught.value.expected
    ingest(tmp_path / "root", **content["corpus"])
    result = candidates_for(config, None, None, None, None, None)
    dim = resolve(config.encoder).dim
    assert [result[key] for key in ("num_rows", "dim", "metric", "num_shards")] == [70, dim, "l2", 3]
    given = candidates_for(config, 10**7, 100, "ip", None, None)
    assert [given[key] for key in ("num_rows", "dim", "metric", "num_shards")] == [10**7, 100, "ip", 3]
    with pytest.raises(ConfigError, match="not clear"):
        candidates_for(None, 5, None, None, None, None)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 << 29), ("700", 700), ("3k", 3000), ("2tb", 2 * 10**12)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size
    for bad in ("", "GB", "-1GB", "8 XB", "0", "1i", "8GBs"):
        with pytest.raises(ConfigError, match="size"):
            parse_bytes(bad)
