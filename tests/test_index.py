"""The index package: specs, building, merging, files and search, over every family of FAISS index it offers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import ArtifactError, ConfigError, InputError, StorageError
from pipelines.index.build import add, clone_empty, finish, read, train, write
from pipelines.index.exact import exact_topk
from pipelines.index.identity import quantizer_digest
from pipelines.index.merge import merge, merge_files
from pipelines.index.search import check_params, merge_topk, parameter_names, search
from pipelines.index.spec import IndexSpec, parse_spec
from pipelines.index.structure import layers

ROOT = Path(__file__).resolve().parents[1]
D, N, K = 32, 1500, 10
MERGEABLE = [
    "Flat", "SQ8", "SQfp16", "PQ8", "PQ8x4fs", "RaBitQ", "RaBitQfs4", "PCA16,SQ8", "IVF16,Flat", "IVF16,SQ8",
    "IVF16,PQ8", "IVF16,PQ8x4fs", "OPQ8,IVF16,PQ8", "PCA16,IVF16,SQ8", "IVF16,RaBitQ", "IVF16,RaBitQfs",
    "IVF16_HNSW8,SQ8",
]  # fmt: skip
WHOLE = [
    "HNSW16",
    "HNSW16,SQ8",
    "NSG16",
    "IVF16,SQ8,RFlat",
    "PQ8x4fs,RFlat",
    "PCA16,HNSW16",
    "RQ4x4",
    "IVF16,FlatPanorama4",
]
METRICS = ["ip", "l2"]
WIDE = {"nprobe": 8, "efSearch": 2 * N, "search_L": N}

_rng = np.random.default_rng(7)
X = _rng.standard_normal((N, D)).astype(np.float32)
Q = _rng.standard_normal((12, D)).astype(np.float32)
ROWS = _rng.permutation(50_000)[:N].astype(np.int64)


def every(factories: list[str]) -> Any:
    return pytest.mark.parametrize(("factory", "metric"), [(f, m) for f in factories for m in METRICS])


@lru_cache
def trained_bytes(factory: str, metric: str, seed: int = 0) -> Any:
    spec = parse_spec(factory, D, metric)  # type: ignore[arg-type]
    return faiss.serialize_index(train(spec, X, seed, num_threads=1))


def trained(factory: str, metric: str, seed: int = 0) -> Any:
    return faiss.deserialize_index(trained_bytes(factory, metric, seed))


def built(factory: str, metric: str, rows: slice = slice(None)) -> Any:
    index = trained(factory, metric)
    add(index, X[rows], ROWS[rows], num_threads=1)
    finish(index)
    return index


def ask(index: Any, k: int = K) -> tuple[Any, Any]:
    params = {name: value for name, value in WIDE.items() if name in parameter_names(index)}
    return search(index, Q, k, params, num_threads=1)


def assert_same_hits(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """Scores within 1e-6 of their size; the same rows, except that rows of equal score may change places."""
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6, atol=1e-6)
    for score, rows_1, rows_2 in zip(one[0], one[1], other[1], strict=True):
        clear = score > score[-1] + 1e-5  # a tie at the k-th place may be cut either way
        assert set(rows_1[clear]) <= set(rows_2)
        assert len(set(rows_2)) == len(rows_2)


# Specs


@pytest.mark.parametrize(
    ("factory", "dim", "suggested"),
    [
        ("PQ16", 728, ["'PQ14'", "'PQ13'", "'PQ26'"]),
        ("OPQ16,IVF4096,PQ16", 728, ["'OPQ14,IVF4096,PQ14'"]),
        ("PQ16x4fs", 728, ["'PQ14x4fs'"]),
        ("OPQ16_64,IVF64,PQ12", 728, ["'OPQ16_64,IVF64,PQ16'", "'OPQ16_64,IVF64,PQ8'"]),
        ("Flatt", 728, ["'Flat'", "'OPQ56,IVF1024,PQ56'"]),
        ("", 32, ["'SQ8'"]),
        ("IVF0,Flat", 32, []),
        ("PCA64,Flat", 32, []),
        ("PCA16,NSG16", 32, []),
        ("Flat,IDMap", 32, []),
    ],
)
def test_an_impossible_factory_is_refused_with_the_nearest_possible_ones(
    factory: str, dim: int, suggested: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(factory, dim, "l2")
    assert repr(factory) in caught.value.what
    assert all(word in caught.value.hint for word in suggested)
    offered = [word.strip("'") for word in caught.value.hint.removeprefix("try ").split("; ")]
    assert offered
    assert all(parse_spec(other, dim, "l2").factory == other for other in offered)


@pytest.mark.parametrize("factory", ["IDMap,IVF16,Flat", "IDMap2,IVF16,Flat", "IDMap2,OPQ8,IVF16,PQ8"])
def test_an_id_map_over_an_inverted_file_is_refused(factory: str) -> None:
    with pytest.raises(ConfigError, match="wrong ids"):
        parse_spec(factory, D, "ip")


def test_bad_metric_and_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="ip or l2"):
        parse_spec("Flat", D, "cosine")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="width 0"):
        parse_spec("Flat", 0, "ip")


def test_an_asked_for_id_map_is_dropped_where_it_is_harmless() -> None:
    assert parse_spec("IDMap2,Flat", D, "ip") == IndexSpec("Flat", D, "ip")


@pytest.mark.parametrize("factory", MERGEABLE + WHOLE)
def test_mergeable_says_what_the_law_below_proves(factory: str) -> None:
    assert parse_spec(factory, D, "ip").mergeable == (factory in MERGEABLE)


@pytest.mark.parametrize(
    ("factory", "fewest", "default"),
    [("Flat", 0, 0), ("SQfp16", 0, 0), ("HNSW16", 0, 0), ("SQ8", 1, 65_536), ("PQ8", 256, 65_536),
     ("PCA16,Flat", 16, 65_536), ("OPQ8,IVF16,SQ8", 256, 65_536), ("IVF4096,Flat", 4096, 256 * 4096),
     ("IVF65536,Flat", 65_536, 39 * 65_536)],
)  # fmt: skip
def test_how_many_rows_training_takes(factory: str, fewest: int, default: int) -> None:
    spec = parse_spec(factory, D, "l2")
    assert (spec.min_train_rows, spec.default_train_rows(10**9)) == (fewest, default)
    assert spec.needs_training == (fewest > 0)
    assert spec.default_train_rows(50) == min(50, default)


@every([f for f in MERGEABLE + WHOLE if "Panorama" not in f])  # Panorama pads its lists
def test_the_size_estimate_is_close(factory: str, metric: str) -> None:
    estimate = parse_spec(factory, D, metric).bytes_per_vector  # type: ignore[arg-type]
    size = len(faiss.serialize_index(built(factory, metric))) - len(trained_bytes(factory, metric))
    assert estimate * N == pytest.approx(size, rel=0.1, abs=8192)


# Building


@every(MERGEABLE + WHOLE)
def test_the_same_input_gives_the_same_bytes(factory: str, metric: str) -> None:
    spec = parse_spec(factory, D, metric)  # type: ignore[arg-type]
    again = train(spec, X.copy(), 0, num_threads=1)
    assert (faiss.serialize_index(again) == trained_bytes(factory, metric)).all()
    builds = []
    for num_threads in (1, 1 if "PCA" in factory or "OPQ" in factory else 2):
        index = clone_empty(again)
        for start in (0, 600):
            rows = slice(start, 600 if start == 0 else N)
            add(index, X[rows], ROWS[rows], num_threads=num_threads)
        finish(index)
        contents = faiss.serialize_index(index)
        builds.append(contents.tobytes())
    assert builds[0] == builds[1]


def test_the_seed_decides_the_quantizer() -> None:
    for factory in ("IVF16,SQ8", "PQ8", "OPQ8,IVF16,PQ8"):
        assert quantizer_digest(trained(factory, "ip", 0)) != quantizer_digest(trained(factory, "ip", 1))


@pytest.mark.parametrize(
    ("factory", "rows"), [("IVF256,Flat", 255), ("PQ8", 200), ("PCA16,Flat", 10), ("SQ8", 0), ("NSG16", 50)]
)
def test_too_few_rows_are_refused_with_numbers(factory: str, rows: int) -> None:
    spec = parse_spec(factory, D, "l2")
    with pytest.raises(InputError, match=f"{rows} rows") as caught:
        _train_and_build(spec, rows)
    assert caught.value.expected
    assert caught.value.hint


def _train_and_build(spec: IndexSpec, rows: int) -> None:
    index = train(spec, X[:rows], 0)
    add(index, X[:rows], ROWS[:rows])
    finish(index)


@pytest.mark.parametrize("factory", MERGEABLE + WHOLE)
def test_the_fewest_rows_are_enough(factory: str) -> None:
    spec = parse_spec(factory, D, "l2")
    assert train(spec, X[: spec.min_train_rows], 0).is_trained


def test_training_prints_no_warning(capfd: pytest.CaptureFixture[str]) -> None:
    train(parse_spec("OPQ8,IVF16,PQ8", D, "ip"), X[:300], 0)
    train(parse_spec("HNSW16,PQ8", D, "ip"), X[:300], 0)
    assert capfd.readouterr() == ("", "")


def test_bad_vectors_are_refused() -> None:
    index = trained("IVF16,SQ8", "ip")
    with pytest.raises(ArtifactError, match="width 32"):
        add(index, X[:, :16], ROWS)
    with pytest.raises(InputError, match="rows for"):
        add(index, X, ROWS[:-1])
    with pytest.raises(InputError, match="negative"):
        add(index, X[:2], np.array([3, -1]))
    broken = X[:5].copy()
    broken[3, 2] = np.nan
    with pytest.raises(InputError, match="vector 3"):
        add(index, broken, ROWS[:5])
    with pytest.raises(ArtifactError, match="not trained"):
        add(faiss.index_factory(D, "IVF16,Flat"), X, ROWS)
    assert index.ntotal == 0


@every(MERGEABLE + WHOLE)
def test_adding_nothing_changes_nothing(factory: str, metric: str) -> None:
    index = trained(factory, metric)
    add(index, X[:0], ROWS[:0])
    score_BK, row_BK = ask(index)
    assert (row_BK == -1).all()
    assert np.isneginf(score_BK).all()
    assert (faiss.serialize_index(index) == trained_bytes(factory, metric)).all()


@every([f for f in MERGEABLE + WHOLE if f != "NSG16"])
def test_zero_vectors_and_half_precision_are_taken(factory: str, metric: str) -> None:
    index = trained(factory, metric)
    vectors = np.concatenate([np.zeros((3, D)), X[:100]]).astype(np.float16)
    add(index, vectors, np.arange(103))
    score_BK, row_BK = search(index, np.zeros((1, D), np.float16), 103)
    assert not np.isnan(score_BK).any()
    assert set(row_BK[0]) <= {-1, *range(103)}


def test_an_nsg_graph_takes_no_rows_once_built() -> None:
    index = built("NSG16", "l2")
    with pytest.raises(ArtifactError, match="once built"):
        add(index, X, ROWS)
    staged = trained("NSG16", "l2")
    add(staged, X, ROWS)
    with pytest.raises(ArtifactError, match="not built"):
        search(staged, Q, 1)


# Merging: merged shards are the index of all rows


@every(MERGEABLE)
@settings(max_examples=4, deadline=None)
@given(cuts=st.lists(st.integers(0, N), min_size=1, max_size=4).map(sorted))
def test_shards_merged_or_side_by_side_equal_one_index(factory: str, metric: str, cuts: list[int]) -> None:
    bounds = [0, *cuts, N]
    shards = [built(factory, metric, slice(a, b)) for a, b in pairwise(bounds)]
    expected = ask(built(factory, metric))
    assert_same_hits(merge_topk([ask(shard) for shard in shards], K), expected)
    assert {quantizer_digest(shard) for shard in shards} == {quantizer_digest(trained(factory, metric))}
    with TemporaryDirectory() as folder:
        contents = from_files(Path(folder), trained(factory, metric), shards)
    merged = clone_empty(trained(factory, metric))
    for shard in shards:
        merge(merged, shard, num_threads=1)
        assert layers(shard)[-1].ntotal == 0
    assert merged.ntotal == N
    assert_same_hits(ask(merged), expected)
    assert quantizer_digest(merged) == quantizer_digest(trained(factory, metric))
    assert contents == faiss.serialize_index(merged).tobytes()
    if "PCA" not in factory and "OPQ" not in factory:  # a matrix product's last bits depend on the rows beside a row
        assert contents == faiss.serialize_index(built(factory, metric)).tobytes()


def from_files(folder: Path, empty: Any, shards: list[Any]) -> bytes:
    """Return the bytes of the file that the shards' files are merged into."""
    paths = [str(folder / f"{n}.faiss") for n in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        write(shard, path)
    assert merge_files(empty, paths, str(folder / "merged.faiss")) == sum(shard.ntotal for shard in shards)
    return (folder / "merged.faiss").read_bytes()


@pytest.mark.parametrize("factory", ["SQ8", "IVF16,SQ8", "PQ8x4fs", "IVF16,PQ8x4fs"])
def test_files_that_do_not_belong_together_are_refused(factory: str, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("one", "other", "cut")]
    other = train(parse_spec(factory, D, "ip"), X[:700] * 3, 1)
    add(other, X, ROWS)
    write(built(factory, "ip"), paths[0])
    write(other, paths[1])
    Path(paths[2]).write_bytes(Path(paths[0]).read_bytes()[:-9])
    for path, why in ((paths[1], "not trained together"), (paths[2], "damaged"), (str(tmp_path / "no"), "no index")):
        with pytest.raises(ArtifactError, match=why) as caught:
            merge_files(trained(factory, "ip"), [paths[0], path], str(tmp_path / "merged"))
        assert path in str(caught.value)


def test_sparse_lists_are_merged_as_faiss_writes_them(tmp_path: Path) -> None:
    """Few rows in many lists: FAISS then writes the sizes of those alone that hold any."""
    index = train(parse_spec("IVF64,SQ8", D, "l2"), X, 0, num_threads=1)
    pieces = [clone_empty(index) for _ in range(2)]
    for piece, rows in zip(pieces, (slice(0, 3), slice(3, 9)), strict=True):
        add(piece, X[rows], ROWS[rows], num_threads=1)
    add(whole := clone_empty(index), X[:9], ROWS[:9], num_threads=1)
    assert from_files(tmp_path, index, pieces) == faiss.serialize_index(whole).tobytes()
    assert from_files(tmp_path, index, [clone_empty(index)]) == faiss.serialize_index(index).tobytes()


@every(["HNSW16", "HNSW16,SQ8", "NSG16"])
def test_graph_shards_side_by_side_find_what_exact_search_finds(factory: str, metric: str) -> None:
    shards = [built(factory, metric, slice(a, b)) for a, b in ((0, 500), (500, N))]
    _, row_BK = merge_topk([ask(shard) for shard in shards], K)
    _, exact_BK = exact_topk(Q, [(X, ROWS)], K, metric)  # type: ignore[arg-type]
    found = sum(len(set(a) & set(b)) for a, b in zip(row_BK, exact_BK, strict=True))
    assert found >= 0.95 * exact_BK.size


@pytest.mark.parametrize("factory", [f for f in MERGEABLE if f not in ("Flat", "SQfp16")])
def test_shards_of_different_quantizers_are_refused(factory: str) -> None:
    one = built(factory, "ip")
    other = train(parse_spec(factory, D, "ip"), X[:700] * 3, 1)
    add(other, X, ROWS)
    assert quantizer_digest(one) != quantizer_digest(other)
    with pytest.raises(ArtifactError, match="not trained together"):
        merge(one, other)
    assert (one.ntotal, other.ntotal) == (N, N)


def test_shards_of_different_types_metrics_and_widths_are_refused() -> None:
    narrow = train(parse_spec("Flat", 16, "ip"), X[:0, :16])
    for other in (built("Flat", "l2"), built("SQ8", "ip"), built("IVF16,Flat", "ip"), narrow):
        with pytest.raises(ArtifactError, match="not trained together"):
            merge(built("Flat", "ip"), other)


@pytest.mark.parametrize("factory", WHOLE)
def test_types_without_a_merge_are_refused(factory: str) -> None:
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge(built(factory, "l2"), built(factory, "l2"))


def test_an_id_map_over_an_inverted_file_from_elsewhere_is_refused() -> None:
    shards = [faiss.index_factory(D, "IDMap2,IVF16,Flat") for _ in range(2)]
    for shard in shards:
        shard.train(X)
        shard.add_with_ids(X, ROWS)
    with pytest.raises(ConfigError, match="IndexIDMap2 over IndexIVFFlat cannot be merged"):
        merge(*shards)


def test_only_empty_indexes_are_cloned_or_digested_whole() -> None:
    with pytest.raises(ArtifactError, match=f"{N} rows"):
        clone_empty(built("SQ8", "ip"))
    with pytest.raises(ArtifactError, match=f"{N} rows"):
        quantizer_digest(built("HNSW16", "ip"))
    assert quantizer_digest(trained("HNSW16,SQ8", "ip")) != quantizer_digest(trained("HNSW16,SQ8", "l2"))


# Files


@every(MERGEABLE + WHOLE)
def test_a_file_opens_with_plain_faiss_and_mapped_with_the_same_answers(
    factory: str, metric: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "shard.faiss")
    index = trained(factory, metric)
    add(index, X, ROWS)
    write(index, path)
    plain = faiss.read_index(path)
    _, row_BK = plain.search(Q, K)
    assert plain.ntotal == N
    assert np.isin(row_BK, ROWS).mean() > 0.9
    expected, loaded, mapped = ask(index), read(path), read(path, mmap=True)
    for other in (loaded, mapped):
        score_BK, row_BK = ask(other)
        np.testing.assert_array_equal(score_BK, expected[0])
        np.testing.assert_array_equal(row_BK, expected[1])
    with pytest.raises(ArtifactError, match="read-only"):
        add(mapped, X, ROWS)
    if factory in MERGEABLE:
        for pair in ((mapped, loaded), (loaded, mapped)):
            with pytest.raises(ArtifactError, match="read-only"):
                merge(*pair)


@pytest.mark.parametrize(
    ("factory", "row_bytes"),
    [("Flat", 8), ("SQ8", 8), ("IVF64,Flat", 0), ("IVF64,SQ8", 0), ("IVF64,RaBitQ", 0), ("HNSW8", 20)],
)
def test_a_mapped_index_takes_no_memory_but_what_is_told(factory: str, row_bytes: int, tmp_path: Path) -> None:
    """Searched once, its pages are the file's, but for an id map's ids and a graph's levels and offsets."""
    spec, path = parse_spec(factory, 64, "ip"), str(tmp_path / "shard.faiss")
    vectors = np.random.default_rng(0).standard_normal((50_000, 64)).astype(np.float32)
    index = train(spec, vectors[:3000], 0)
    for start in range(0, 1 if factory == "HNSW8" else 200_000, len(vectors)):
        add(index, vectors, np.arange(len(vectors)) + start)
    write(index, path)
    code = f"""
import re, numpy as np
from pipelines.index.build import read
from pipelines.index.search import search
def anonymous(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
query = np.ones((1, 64), np.float32)
search(read({str(tmp_path / "small.faiss")!r}, mmap=True), query, 10, num_threads=1)
before = anonymous()
index = read({path!r}, mmap=True)
mapped = anonymous() - before
search(index, query, 10, num_threads=1)
print(mapped, anonymous() - before)
"""
    write(train(spec, vectors[:3000], 0), str(tmp_path / "small.faiss"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    most = 0.06 * os.path.getsize(path) + row_bytes * index.ntotal
    assert all(int(grown) < most for grown in done.stdout.split()), (done.stdout, most)


@every(MERGEABLE + WHOLE)
def test_a_file_cut_short_is_refused(factory: str, metric: str, tmp_path: Path) -> None:
    path, cut = tmp_path / "shard.faiss", tmp_path / "cut.faiss"
    write(built(factory, metric), str(path))
    contents = path.read_bytes()
    for length in (0, 3, 40, len(contents) // 2, *(len(contents) - missing for missing in range(1, 17))):
        cut.write_bytes(contents[:length])
        for mmap in (False, True):
            with pytest.raises(ArtifactError, match="damaged"):
                read(str(cut), mmap=mmap)


def test_an_empty_index_is_written_and_mapped(tmp_path: Path) -> None:
    for factory in MERGEABLE + WHOLE:
        path = str(tmp_path / "empty.faiss")
        write(trained(factory, "ip"), path)
        assert read(path, mmap=True).ntotal == 0


@pytest.mark.parametrize("contents", [b"", b"IxFI", b"IwFl" + bytes(range(256)) * 9, b"no index" * 500])
@pytest.mark.parametrize("mmap", [False, True])
def test_garbage_is_refused(contents: bytes, mmap: bool, tmp_path: Path) -> None:
    (tmp_path / "bad.faiss").write_bytes(contents)
    with pytest.raises(ArtifactError, match="damaged"):
        read(str(tmp_path / "bad.faiss"), mmap=mmap)
    with pytest.raises(ArtifactError, match="no index file"):
        read(str(tmp_path / "absent.faiss"), mmap=mmap)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_told() -> None:
    with pytest.raises(StorageError, match="disk full"):
        write(built("Flat", "ip"), "/dev/full")


# Search


@every(["Flat", "IVF16,SQ8", "HNSW16", "NSG16", "PQ8x4fs", "IVF16,SQ8,RFlat"])
def test_more_hits_than_rows_are_padded(factory: str, metric: str) -> None:
    score_BK, row_BK = ask(built(factory, metric, slice(0, 200)), k=250)
    assert score_BK.shape == row_BK.shape == (len(Q), 250)
    assert (score_BK.dtype, row_BK.dtype) == (np.float32, np.int64)
    padding = row_BK == -1
    assert padding[:, 200:].all()
    assert np.isneginf(score_BK[padding]).all()
    assert np.isfinite(score_BK[~padding]).all()
    assert (score_BK[:, :-1] >= score_BK[:, 1:]).all()


@every(MERGEABLE + WHOLE)
def test_scores_are_higher_for_better(factory: str, metric: str) -> None:
    score_BK, row_BK = ask(built(factory, metric))
    exact = Q @ X.T if metric == "ip" else -((Q[:, None] - X[None]) ** 2).sum(-1)
    column = {row: n for n, row in enumerate(ROWS.tolist())}
    mean = np.mean([exact[b, column[row]] for b in range(len(Q)) for row in row_BK[b].tolist()])
    assert mean > exact.mean() + exact.std()
    assert (score_BK[:, 0] > score_BK[:, -1]).all()


def test_queries_of_another_width_are_refused() -> None:
    with pytest.raises(ArtifactError, match="width 16, the index 32: another encoder"):
        search(built("Flat", "ip"), Q[:, :16], K)
    with pytest.raises(InputError, match="shape"):
        search(built("Flat", "ip"), Q[0], K)
    with pytest.raises(InputError, match="finite"):
        search(built("Flat", "ip"), Q * np.nan, K)
    with pytest.raises(ConfigError, match="k is 0"):
        search(built("Flat", "ip"), Q, 0)
    assert search(built("Flat", "ip"), Q[:0], K)[1].shape == (0, K)


@pytest.mark.parametrize(
    ("factory", "names"),
    [("Flat", []), ("IVF16,SQ8", ["nprobe", "max_codes"]), ("OPQ8,IVF16,PQ8", ["nprobe", "max_codes"]),
     ("HNSW16", ["efSearch"]), ("NSG16", ["search_L"]), ("IVF16,SQ8,RFlat", ["k_factor", "nprobe", "max_codes"]),
     ("IVF16_HNSW8,SQ8", ["nprobe", "max_codes", "quantizer_efSearch"])],
)  # fmt: skip
def test_parameters_are_checked_by_name_and_value(factory: str, names: list[str]) -> None:
    index = built(factory, "ip")
    assert parameter_names(index) == names
    with pytest.raises(ConfigError, match="unknown search parameter 'nprobes'") as caught:
        search(index, Q, K, {"nprobes": 4})
    assert all(name in caught.value.expected for name in names)
    assert ("nprobe'" in caught.value.hint) == ("nprobe" in names)
    for name in names:
        for value in (-1, "8", True, float("nan"), *([0, 2.5] if name not in ("k_factor", "max_codes") else [])):
            with pytest.raises(ConfigError, match=name):
                check_params(index, {name: value})  # type: ignore[dict-item]


@every(
    [
        "IVF16,PQ8",
        "OPQ8,IVF16,PQ8",
        "IVF16,RaBitQ",
        "HNSW16",
        "PCA16,HNSW16",
        "NSG16",
        "IVF16,SQ8,RFlat",
        "IVF16_HNSW8,SQ8",
    ]
)
def test_parameters_hold_for_one_call_also_among_threads(factory: str, metric: str) -> None:
    index = built(factory, metric)
    before = faiss.serialize_index(index)
    wide = {name: value for name, value in WIDE.items() if name in parameter_names(index)}
    narrow: dict[str, float] = dict.fromkeys(wide, 1)
    expected = [search(index, Q, K, params, num_threads=1)[1] for params in (narrow, wide)]
    assert (expected[0] != expected[1]).any()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: search(index, Q, K, (narrow, wide)[n % 2], num_threads=1)[1], range(40)))
    assert all((answer == expected[n % 2]).all() for n, answer in enumerate(answers))
    assert (faiss.serialize_index(index) == before).all()


def test_a_refinement_reranks_more_candidates() -> None:
    index = built("PQ8x4fs,RFlat", "ip")
    _, exact_BK = exact_topk(Q, [(X, ROWS)], K, "ip")
    overlap = [np.mean(np.sort(search(index, Q, K, {"k_factor": f})[1]) == np.sort(exact_BK)) for f in (1, N / K)]
    assert overlap[0] < overlap[1] == 1.0


# Merging results, exact search


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_merged_results_are_the_best_of_all_in_any_order(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    k = data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    rows = rng.permutation(100)[: sum(sizes)]
    pairs = [(float(rng.integers(-3, 4)), int(row)) for row in rows]
    parts, start = [], 0
    for size in sizes:
        mine = [*sorted(pairs[start : start + size], key=lambda p: (-p[0], p[1])), (3.4e38, -1)]
        start += size
        parts.append((np.array([[s for s, _ in mine]], np.float32), np.array([[r for _, r in mine]], np.int64)))
    best = sorted(pairs, key=lambda p: (-p[0], p[1]))[:k]
    best += [(-np.inf, -1)] * (k - len(best))
    for order in (parts, parts[::-1]):
        score_BK, row_BK = merge_topk(order, k)
        assert list(zip(score_BK[0].tolist(), row_BK[0].tolist(), strict=True)) == best


def test_results_that_cannot_be_merged_are_refused() -> None:
    part = (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64))
    with pytest.raises(ConfigError, match="no results"):
        merge_topk([], 3)
    with pytest.raises(ConfigError, match="k is 0"):
        merge_topk([part], 0)
    with pytest.raises(ArtifactError, match="different numbers"):
        merge_topk([part, (part[0][:1], part[1][:1])], 3)


@settings(max_examples=40, deadline=None)
@given(
    metric=st.sampled_from(METRICS),
    k=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 50), max_size=4).map(sorted),
    half=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_exact_search_is_exact_and_breaks_ties_by_row(
    metric: Any, k: int, cuts: list[int], half: bool, seed: int
) -> None:
    # Small integers: every product is exact, and ties abound.
    rng = np.random.default_rng(seed)
    vectors, queries = rng.integers(-2, 3, (50, 4)).astype(np.float32), rng.integers(-2, 3, (3, 4)).astype(np.float32)
    rows = rng.permutation(1000)[:50]
    exact = queries @ vectors.T if metric == "ip" else -((queries[:, None] - vectors[None]) ** 2).sum(-1)
    bounds = [0, *cuts, 50]
    blocks = [(vectors[a:b].astype(np.float16 if half else np.float32), rows[a:b])
              for a, b in pairwise(bounds)]  # fmt: skip
    score_BK, row_BK = exact_topk(queries, blocks, k, metric, num_threads=1)
    for b in range(3):
        best = np.lexsort((rows, -exact[b]))[:k]
        assert row_BK[b, : len(best)].tolist() == rows[best].tolist()
        assert score_BK[b, : len(best)].tolist() == exact[b, best].tolist()
        assert (row_BK[b, len(best) :] == -1).all()
    halves = [exact_topk(queries, part, k, metric, num_threads=1) for part in (blocks[:1], blocks[1:])]
    np.testing.assert_array_equal(merge_topk(halves, k)[1], row_BK)


@pytest.mark.parametrize("metric", METRICS)
def test_exact_search_equals_a_flat_index_over_many_chunks(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(built("Flat", metric))
    monkeypatch.setattr("pipelines.index.exact._ROWS_AT_ONCE", 97)
    score_BK, row_BK = exact_topk(Q, [(X[:700], ROWS[:700]), (X[700:], ROWS[700:])], K, metric)
    np.testing.assert_array_equal(row_BK, expected[1])
    np.testing.assert_allclose(score_BK, expected[0], rtol=1e-5)


def test_exact_search_of_nothing_and_of_other_widths() -> None:
    score_BK, row_BK = exact_topk(Q, [], 3, "ip")
    assert (row_BK == -1).all()
    assert np.isneginf(score_BK).all()
    assert exact_topk(Q[:0], [(X, ROWS)], 3, "ip")[1].shape == (0, 3)
    with pytest.raises(ArtifactError, match="block has shape"):
        exact_topk(Q, [(X[:, :8], ROWS)], 3, "ip")
    with pytest.raises(ConfigError, match="k is 0"):
        exact_topk(Q, [(X, ROWS)], 0, "ip")
