"""Vectors in and out: files in the released layouts, hostile ones, and the whole way through the real command."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import corpus, embeddings
from pipelines.config import CorpusConfig, EncoderConfig
from pipelines.encode import Encoder, resolve
from pipelines.errors import ArtifactError, ConfigError, InputError, PinakesError, QualityError, StorageError
from pipelines.interchange import arrays, dpr, paq
from pipelines.interchange.index_in import import_index, plan_import
from pipelines.interchange.matching import RowLookup, Scatter
from pipelines.interchange.sources import BY_POSITION, find_sources, id_source, settle_ids
from pipelines.interchange.vectors_in import ImportPlan, find_snapshot, import_vectors
from pipelines.interchange.vectors_out import Export, export_vectors
from pipelines.retrieve import Retriever
from pipelines.storage import Store
from tests.checkpoints import write_dpr, write_sentence_transformer
from tests.test_pipeline import pinakes, pinakes_json

DIM, NUM = 32, 150
IDS = ["wiki:1", "é\u2028ü", "北京", *(f"p{i}" for i in range(3, NUM))]  # one holds a line end of Unicode
PROTOCOLS = (2, 3, 4, 5)
RNG = np.random.default_rng(0)


def read_all(blocks: Any) -> tuple[list[str], Any]:
    found = list(blocks)
    ids = [i for ids, _ in found if ids is not None for i in ids]
    return ids, np.concatenate([vectors for _, vectors in found])


def write_pickle(path: Path, content: Any, protocol: int = 4) -> str:
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


# DPR's pickles


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_a_dpr_pickle_is_read_as_numpy_wrote_it(tmp_path: Path, protocol: int, dtype: str) -> None:
    vectors = RNG.normal(size=(5000, 3)).astype(dtype)
    rows: list[Any] = list(zip(map(str, range(5000)), vectors, strict=True))
    rows[0], rows[1], rows[2] = ("北京", vectors[0]), (17, vectors[1]), (np.int64(-18), vectors[2])
    rows[3] = ["é", np.asfortranarray(vectors[3])]
    ids, found = read_all(dpr.read_pickle(write_pickle(tmp_path / "wikipedia_passages_0.pkl", rows, protocol)))
    assert ids == ["北京", "17", "-18", "é", *map(str, range(4, 5000))]
    np.testing.assert_array_equal(found, vectors)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names_of_the_older_numpy_are_known(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps([("a", np.arange(4, dtype=np.float32))], protocol)
    if protocol < 4:  # a longer name in place, where no length precedes it
        data = data.replace(b"numpy._core.", b"numpy.core.")
    else:
        name = b"numpy._core.multiarray" if protocol == 4 else b"numpy._core.numeric"
        old = name.replace(b"_core", b"core")
        data = data.replace(bytes([len(name)]) + name, bytes([len(old)]) + old)
    (tmp_path / "old.pkl").write_bytes(data)
    assert b"numpy.core" in data
    ids, found = read_all(dpr.read_pickle(str(tmp_path / "old.pkl")))
    assert (ids, found.tolist()) == (["a"], [[0, 1, 2, 3]])


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("place", ["item", "id", "vector", "deep", "whole"])
def test_code_in_a_pickle_is_named_and_not_run(tmp_path: Path, protocol: int, place: str) -> None:
    target = tmp_path / "ran"
    vector = np.zeros(4, np.float32)
    for evil, name in (
        (Evil(os.mkdir, str(target)), "posix.mkdir"),
        (Evil(eval, f"__import__('os').mkdir({str(target)!r})"), "eval"),
    ):
        content: Any = {
            "item": [("a", vector), evil],
            "id": [(evil, vector)],
            "vector": [("a", evil)],
            "deep": [("a", vector), ("b", [[(evil,)]])],
            "whole": evil,
        }[place]
        path = write_pickle(tmp_path / "evil.pkl", content, protocol)
        with pytest.raises(InputError, match=rf"refused: it names .*{name}"):
            list(dpr.read_pickle(path))
        assert not target.exists()
        pickle.loads(Path(path).read_bytes())  # the file is real: Python itself would have run it
        assert target.exists()
        target.rmdir()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "EMPTY_DICT"),
        ({"a"}, "EMPTY_SET"),
        (("a", np.zeros(2, np.float32)), "holds a tuple"),
        ("text", "holds a str"),
        (["a", "b"], "item 0 is a str, no pair"),
        ([("a",)], "no pair"),
        ([("a", "b")], "no vector but a str"),
        ([(1.5, np.zeros(2, np.float32))], "id of item 0 is a float"),
        ([(True, np.zeros(2, np.float32))], "id of item 0 is a bool"),
        ([("a", np.zeros((2, 2), np.float32))], r"float32 of shape \(2, 2\)"),
        ([("a", np.zeros(2, np.int32))], "int32"),
        ([("a", np.zeros(0, np.float32))], r"shape \(0,\)"),
        ([("a", np.array([None, "x"], object))], "O8"),
        ([("a", np.array(["x"]))], "U1"),
        ([("a", np.zeros(2, np.float32)), ("b", np.zeros(3, np.float32))], "another width"),
        ([("a", np.ma.zeros(2))], "refused: it names numpy.ma"),
        ([("a", torch.zeros(2))], "refused: it names torch"),
        ([("a", 1j)], "refused: it names builtins.complex"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(dpr.read_pickle(write_pickle(tmp_path / "x.pkl", content)))


def test_a_crafted_length_allocates_nothing(tmp_path: Path) -> None:
    head = b"\x80\x04]("
    for huge in (b"\x8e" + (1 << 40).to_bytes(8, "little"), b"\x8d" + (1 << 40).to_bytes(8, "little")):
        (tmp_path / "x.pkl").write_bytes(head + huge + b"abc")
        with pytest.raises(InputError, match="damaged: a value of 1,099,511,627,776 bytes"):
            list(dpr.read_pickle(str(tmp_path / "x.pkl")))


def test_a_list_in_one_piece_and_a_vector_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02](" + b"N" * 30_000 + b"e.")
    with pytest.raises(InputError, match="in one piece"):
        list(dpr.read_pickle(str(tmp_path / "x.pkl")))
    vector = np.zeros(2, np.float32)
    with pytest.raises(InputError, match="refers back to a vector"):
        list(dpr.read_pickle(write_pickle(tmp_path / "y.pkl", [("a", vector), ("b", vector)])))


def test_what_is_cut_or_goes_on_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps([(i, RNG.normal(size=4).astype(np.float32)) for i in IDS[:6]], 4)
    path = tmp_path / "x.pkl"
    for length in range(2, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            list(dpr.read_pickle(str(path)))
    path.write_bytes(data + data)
    with pytest.raises(InputError, match="goes on behind"):
        list(dpr.read_pickle(str(path)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_pickle_gives_our_error_or_vectors(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    whole = bytearray(
        pickle.dumps([(i, np.ones(3, np.float32)) for i in IDS[:3]], data.draw(st.sampled_from(PROTOCOLS)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x.pkl"
    path.write_bytes(bytes(whole))
    try:
        for ids, vectors in dpr.read_pickle(str(path)):
            assert len(ids) == len(vectors)
    except InputError:
        pass


def test_memory_does_not_grow_with_the_pickle(tmp_path: Path) -> None:
    """The reader hands on each run of a thousand items before it reads the next."""
    path = write_pickle(tmp_path / "x.pkl", [(str(i), np.full(8, i, np.float32)) for i in range(12_000)])
    reader = dpr.read_pickle(path)
    ids, vectors = next(reader)
    assert (ids[-1], vectors.shape) == ("4095", (4096, 8))
    assert [len(ids) for ids, _ in reader] == [4096, 12_000 - 8192]


def test_the_ids_beside_an_index_are_read(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "index_meta.dpr", [*IDS, 7, np.int64(8)], 3)
    assert list(dpr.read_id_list(path)) == [*IDS, "7", "8"]
    with pytest.raises(InputError, match="id of item 0 is a tuple"):
        list(dpr.read_id_list(write_pickle(tmp_path / "x.dpr", [("a", "b")])))


# PAQ's tensors


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_paq_tensor_is_read(tmp_path: Path, old_format: bool, dtype: torch.dtype) -> None:
    tensor = torch.randn(40, 8).to(dtype)
    torch.save(tensor, tmp_path / "embeddings.pt.0", _use_new_zipfile_serialization=not old_format)
    (source,) = find_sources([str(tmp_path)])
    assert source.kind == "pt"
    ids, found = read_all(paq.read_tensor(source.path))
    assert ids == []
    np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Evil(print, "ran"), "holds code"),
        ({"a": torch.zeros(2, 2)}, "holds a dict"),
        ([torch.zeros(2, 2)], "holds a list"),
        (torch.zeros(4), r"holds a Tensor of shape \(4,\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "int64"),
        (torch.zeros(2, 2).to_sparse(), "holds a Tensor"),
        (torch.nn.Parameter(torch.zeros(2, 2)), "holds a Parameter"),
    ],
)
def test_other_torch_files_are_refused(
    tmp_path: Path, content: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=words):
        list(paq.read_tensor(str(tmp_path / "x.pt")))
    assert capsys.readouterr().out == ""


def test_a_tensor_file_cut_short_is_refused(tmp_path: Path) -> None:
    torch.save(torch.randn(100, 8), tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    for length in (10, len(data) // 2, len(data) - 1):
        (tmp_path / "x.pt").write_bytes(data[:length])
        with pytest.raises(InputError, match="damaged"):
            list(paq.read_tensor(str(tmp_path / "x.pt")))


# Arrays, Parquet, ids


def test_arrays_that_are_no_vectors_are_refused(tmp_path: Path) -> None:
    path, target = str(tmp_path / "x.npy"), tmp_path / "ran"
    np.save(path, np.array([[Evil(os.mkdir, str(target))]], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"[Oo]bject"):
        list(arrays.read_npy(path))
    assert not target.exists()
    for wrong, words in (
        (np.zeros(4), "shape"),
        (np.zeros((2, 2), int), "int64"),
        (np.zeros((2, 2), complex), "complex"),
    ):
        np.save(path, wrong)
        with pytest.raises(InputError, match=words):
            list(arrays.read_npy(path))
    np.save(path, np.zeros((10, 4), np.float32))
    whole = Path(path).read_bytes()
    for data in (whole[:-1], whole[:40], whole.replace(b"'descr'", b"'d scr'"), b"\x93NUMPY\x09\x00" + whole[8:]):
        Path(path).write_bytes(data)
        with pytest.raises(InputError):
            list(arrays.read_npy(path))


@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_in_blocks(tmp_path: Path, order: Any) -> None:
    array = RNG.normal(size=(40_000, 3)).astype(">f4", order=order)
    np.save(tmp_path / "x.npy", array)
    blocks = list(arrays.read_npy(str(tmp_path / "x.npy")))
    assert [len(vectors) for _, vectors in blocks] == [16_384, 16_384, 7_232]
    np.testing.assert_array_equal(np.concatenate([v for _, v in blocks]), array)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 4), pa.list_(pa.float64()), pa.large_list(pa.float16())])
def test_parquet_of_other_tools_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    vectors = RNG.normal(size=(10, 4)).astype(np.float16)
    columns = {
        "vector": pa.array(list(vectors.astype(kind.value_type.to_pandas_dtype())), kind),
        "id": pa.array(range(10)),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    ids, found = read_all(arrays.read_vector_parquet(str(tmp_path / "x.parquet")))
    assert ids == [str(i) for i in range(10)]
    np.testing.assert_array_equal(found.astype(np.float16), vectors)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"id": ["a"], "text": ["b"]}, "no column 'vector'"),
        ({"vector": [[1.0]]}, "no column 'id'"),
        ({"id": ["a", None], "vector": [[1.0], [2.0]]}, "one is null"),
        ({"id": ["a", "b"], "vector": [[1.0], None]}, "one is null"),
        ({"id": ["a", "b"], "vector": [[1.0], [None]]}, "one is null"),
        ({"id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, "different lengths"),
        ({"id": ["a"], "vector": [[1]]}, "list<"),
        ({"id": ["a"], "vector": ["x"]}, "string"),
        ({"id": [1.5], "vector": [[1.0]]}, "ids are double"),
    ],
)
def test_parquet_without_vectors_is_refused(tmp_path: Path, columns: Any, words: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=words):
        list(arrays.read_vector_parquet(str(tmp_path / "x.parquet")))


def test_ids_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("".join(f"{i}\r\n" for i in IDS).encode())
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"id": i} if i[0] == "p" else i) + "\n" for i in IDS))
    np.save(tmp_path / "x.npy", np.array(IDS))
    for name in ("x.txt", "x.jsonl", "x.npy"):
        assert list(arrays.read_ids(str(tmp_path / name))) == IDS
    np.save(tmp_path / "n.npy", np.arange(3))
    assert list(arrays.read_ids(str(tmp_path / "n.npy"))) == ["0", "1", "2"]
    bad = {"a.txt": b"a\n\nb\n", "b.txt": b"\xff\n", "c.jsonl": b"[1]\n", "d.jsonl": b"{\n", "e.csv": b"a\n"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            list(arrays.read_ids(str(tmp_path / name)))
    np.save(tmp_path / "o.npy", np.array(["a", None], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"[Oo]bject"):
        list(arrays.read_ids(str(tmp_path / "o.npy")))


def test_sources_are_recognised_and_ordered_by_number(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        torch.save(torch.zeros(1, 2), tmp_path / f"embeddings.pt.{number}")
    names = [os.path.basename(s.path) for s in find_sources([str(tmp_path / "embeddings.pt.*")])]
    assert names == ["embeddings.pt.1", "embeddings.pt.2", "embeddings.pt.10"]
    (tmp_path / "readme").write_text("hello")
    for pattern, words in ((str(tmp_path / "readme"), "no file of vectors"), (str(tmp_path / "none*"), "no such file")):
        with pytest.raises(InputError, match=words):
            find_sources([pattern])


def test_ids_must_be_settled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 2), np.float32))
    array, pickled = find_sources([str(tmp_path / "a.npy")]), find_sources([write_pickle(tmp_path / "b.pkl", [])])
    for sources, ids, by_position in ((array, None, False), (array, "x.txt", True), (pickled, "x.txt", False)):
        with pytest.raises(ConfigError):
            settle_ids(sources, ids, by_position)
    with pytest.raises(InputError, match="no such file of ids"):
        settle_ids(array, str(tmp_path / "x.txt"), False)
    assert settle_ids(pickled, None, False) is None


# Into a snapshot


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with a snapshot of NUM passages in parts of 64, made in a plain loop."""
    folder = tmp_path_factory.mktemp("interchange")
    rows = [{"id": i, "title": "", "text": f"the cat number {n} sat on mat {n * 7 % 13}"} for n, i in enumerate(IDS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CorpusConfig(name="cats", sources=[str(folder / "corpus.jsonl")], part_size=64)
    root, plan = str(folder / "root"), corpus.plan_ingest(config)
    staging = corpus.staging_store(root, plan)
    staged = [corpus.stage_split(staging, plan, split) for split in plan.splits]
    resolved = corpus.resolve(staging, plan, staged)
    store = corpus.corpus_store(root, "cats").child(resolved.snapshot)
    parts = [corpus.cut_part(staging, store, resolved, n) for n in range(-(-NUM // 64))]
    corpus.publish_snapshot(root, plan, resolved, parts, 0, {})
    write_dpr(str(folder / "dpr"), "passage", DIM)
    write_dpr(str(folder / "dpr-query"), "query", DIM)
    write_sentence_transformer(str(folder / "st"), DIM)
    return root


def encoder(root: str, model: str = "dpr", storage: Any = "fp32") -> Any:
    folder = Path(root).parent
    query = str(folder / "dpr-query") if model == "dpr" else None
    return resolve(
        EncoderConfig(checkpoint=str(folder / model), query_checkpoint=query, compute="fp32", storage=storage)
    )


@pytest.fixture(scope="module")
def vectors(root: str) -> Any:
    """(NUM, DIM) float32: what the DPR encoder makes of the passages, in row order."""
    return own_vectors(root, "dpr")


def own_vectors(root: str, model: str) -> Any:
    table = snapshot_table(root)
    return Encoder(encoder(root, model), "passage").encode_passages(table["title"], table["text"])


def snapshot_table(root: str) -> dict[str, list[str]]:
    manifest = find_snapshot(root, "cats")
    store = corpus.corpus_store(root, "cats").child(manifest["snapshot"])
    tables = [corpus.read_part(store, part) for part in manifest["parts"]]
    found: dict[str, list[str]] = pa.concat_tables(tables).to_pydict()
    assert found["id"] == IDS
    return found


def plan_of(root: str, sources: list[str], spec: Any = None, ids: str | None = None, **more: Any) -> ImportPlan:
    found = tuple(find_sources(sources))
    settled = settle_ids(found, ids, more.pop("by_position", False))
    return ImportPlan(root, find_snapshot(root, "cats"), spec or encoder(root), found, settled, **more)


def fresh(root: str, tmp_path: Path) -> str:
    """Return a root of its own that shares the snapshot."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "corpora").symlink_to(Path(root) / "corpora")
    for model in ("dpr", "dpr-query", "st"):
        (tmp_path / model).symlink_to(Path(root).parent / model)
    return str(tmp_path / "root")


def imported(plan: ImportPlan) -> Any:
    """Import, and return the (N, D) vectors in row order."""
    manifest = import_vectors(plan, lambda _: None)
    return np.concatenate([embeddings.read_vectors(plan.store, entry, DIM) for entry in manifest["parts"]])


def write_source(folder: Path, kind: str, ids: list[str], rows: Any) -> list[str]:
    """Write vectors as `kind`; return the files to import."""
    if kind == "dpr":
        half = len(ids) // 2
        pairs = list(zip(ids, rows, strict=True))
        return [write_pickle(folder / f"x_{n}.pkl", part) for n, part in enumerate((pairs[half:], pairs[:half]))]
    if kind == "npy":
        np.save(folder / "x.npy", rows)
        (folder / "ids.txt").write_bytes("".join(f"{i}\n" for i in ids).encode())
        return [str(folder / "x.npy")]
    pq.write_table(pa.table({"id": ids, "vector": list(rows)}), folder / "x.parquet")
    return [str(folder / "x.parquet")]


@pytest.mark.parametrize("kind", ["dpr", "npy", "parquet"])
def test_vectors_in_any_order_come_to_their_rows(root: str, vectors: Any, tmp_path: Path, kind: str) -> None:
    order = np.random.default_rng(1).permutation(NUM)
    sources = write_source(tmp_path, kind, [IDS[i] for i in order], vectors[order])
    plan = plan_of(fresh(root, tmp_path), sources)
    told: list[int] = []
    manifest = import_vectors(plan, told.append)
    assert sum(told) == NUM
    np.testing.assert_array_equal(imported(plan), vectors)
    assert manifest["imported"]["checked"] == {"num_passages": 24, "min_cosine": 1.0}
    assert [s["name"] for s in manifest["imported"]["sources"]] == sorted(map(os.path.basename, sources))
    assert import_vectors(plan, told.append) == manifest  # again: nothing to do
    assert sum(told) == NUM
    part = pq.read_table(plan.store.path("part-00002.parquet"))
    assert part["id"].to_pylist() == IDS[128:]
    assert sorted(os.listdir(plan.store.path())) == ["manifest.json", *(f"part-0000{n}.parquet" for n in range(3))]


def test_paq_tensors_come_by_position(root: str, vectors: Any, tmp_path: Path) -> None:
    for number, piece in enumerate(np.array_split(vectors, 12)):
        torch.save(torch.from_numpy(piece).half(), tmp_path / f"embeddings.pt.{number}")
    plan = plan_of(fresh(root, tmp_path), [str(tmp_path / "embeddings.pt.*")], by_position=True)
    np.testing.assert_array_equal(imported(plan), vectors.astype(np.float16))


def test_an_imported_folder_is_what_encode_would_have_written(root: str, vectors: Any, tmp_path: Path) -> None:
    plan = plan_of(fresh(root, tmp_path), write_source(tmp_path, "npy", IDS, vectors), encoder(root, storage="fp16"))
    import_vectors(plan, lambda _: None)
    part = Path(plan.store.path("part-00001.parquet")).read_bytes()
    assert part == embeddings.to_parquet(IDS[64:128], vectors[64:128], "fp16")


def test_a_cosine_encoders_vectors_are_brought_to_length_one(root: str, tmp_path: Path) -> None:
    unit, spec = own_vectors(root, "st"), encoder(root, "st")
    scaled = unit * np.linspace(0.5, 20, NUM, dtype=np.float32)[:, None]
    found = imported(plan_of(fresh(root, tmp_path), write_source(tmp_path, "npy", IDS, scaled), spec))
    np.testing.assert_allclose(found, unit, atol=1e-6)


def wrong(ids: list[str], rows: Any, how: str) -> tuple[list[str], Any]:
    ids, rows = list(ids), rows.copy()
    if how == "missing":
        return ids[:-2], rows[:-2]
    if how == "unknown":
        return [*ids, "nobody", "\x00"], np.concatenate([rows, rows[:2]])
    if how == "doubled":
        return [*ids, ids[3]], np.concatenate([rows, rows[3:4]])
    if how == "prefix":
        return [f"wiki:{i}" for i in ids], rows
    rows[7, 3] = np.nan if how == "nan" else 1e6
    return ids, rows


@pytest.mark.parametrize("kind", ["dpr", "npy", "parquet"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", r"2 \('p148', 'p149'\) passages without a vector"),
        ("unknown", r"2 \('nobody', '\\x00'\) vectors of unknown passages"),
        ("doubled", r"1 \('p3'\) passages with more than one vector"),
        ("prefix", r"150 \(.*…\) passages without.*\n.*150 .*unknown(.|\n)*--strip-prefix wiki:"),
        ("nan", r"1 \('p7'\) vectors that are not finite"),
        ("overflow", r"1 \('p7'\) vectors that are not finite in fp16(.|\n)*storage fp32"),
    ],
)
def test_what_does_not_fit_is_counted_and_refused(
    root: str, vectors: Any, tmp_path: Path, kind: str, how: str, words: str
) -> None:
    ids, rows = wrong(IDS, vectors, how)
    plan = plan_of(
        fresh(root, tmp_path), write_source(tmp_path, kind, ids, rows), encoder(root, storage="fp16"), trust=True
    )
    with pytest.raises(InputError, match=words):
        import_vectors(plan, lambda _: None)
    assert plan.store.files() == []


def test_a_prefix_is_taken_off(root: str, vectors: Any, tmp_path: Path) -> None:
    ids = [f"wiki:{i}" for i in IDS]
    plan = plan_of(fresh(root, tmp_path), write_source(tmp_path, "dpr", ids, vectors), strip_prefix="wiki:")
    np.testing.assert_array_equal(imported(plan), vectors)


def test_too_few_and_too_many_without_ids_are_refused(root: str, vectors: Any, tmp_path: Path) -> None:
    own = fresh(root, tmp_path)
    for rows, words in (
        (vectors[:-1], "'p149'"),
        (np.concatenate([vectors, vectors[:1]]), r"1 \('150'\) vectors of unk"),
    ):
        np.save(tmp_path / "x.npy", rows)
        with pytest.raises(InputError, match=words):
            import_vectors(plan_of(own, [str(tmp_path / "x.npy")], by_position=True), lambda _: None)
    np.save(tmp_path / "x.npy", vectors)
    for number, words in ((NUM - 1, "fewer ids"), (NUM + 1, "more ids")):
        np.save(tmp_path / "i.npy", np.array([*IDS, "one more"])[:number])
        with pytest.raises(InputError, match=words):
            import_vectors(plan_of(own, [str(tmp_path / "x.npy")], ids=str(tmp_path / "i.npy")), lambda _: None)


def test_vectors_of_another_encoder_are_refused(root: str, vectors: Any, tmp_path: Path) -> None:
    own = fresh(root, tmp_path)
    cases = {
        "width": (vectors[:, :-1], "width 31"),
        "other": (RNG.normal(size=vectors.shape).astype(np.float32), "not what this encoder makes.*cosine"),
        "order": (np.roll(vectors, 1, axis=0), "not what this encoder makes.*cosine"),
        "length": (vectors * 2, "not what this encoder makes.*lengths"),
        "zero": (vectors * 0, "not what this encoder makes.*cosine 0.0000"),
    }
    for name, (rows, words) in cases.items():
        (tmp_path / name).mkdir()
        plan = plan_of(own, write_source(tmp_path / name, "npy", IDS, rows))
        with pytest.raises(InputError, match=words):
            import_vectors(plan, lambda _: None)
        assert plan.store.files() == []
    trusted = plan_of(own, write_source(tmp_path / "length", "npy", IDS, vectors * 2), trust=True)
    np.testing.assert_array_equal(imported(trusted), vectors * 2)


def test_embeddings_that_are_there_stay(root: str, vectors: Any, tmp_path: Path) -> None:
    own = fresh(root, tmp_path)
    plan = plan_of(own, write_source(tmp_path, "npy", IDS, vectors))
    import_vectors(plan, lambda _: None)
    (tmp_path / "b").mkdir()
    other = plan_of(own, write_source(tmp_path / "b", "parquet", IDS, vectors))
    with pytest.raises(ArtifactError, match="already"):
        import_vectors(other, lambda _: None)


def test_a_part_of_another_import_is_made_again(root: str, vectors: Any, tmp_path: Path) -> None:
    """A killed import leaves parts and receipts; only the same import takes them over."""
    own = fresh(root, tmp_path)
    plan = plan_of(own, write_source(tmp_path, "npy", IDS, vectors * 3), trust=True)
    import_vectors(plan, lambda _: None)
    left = Path(plan.store.path("part-00000.parquet")).read_bytes()
    plan.store.remove_all()
    from pipelines.interchange.vectors_in import _put_part

    _put_part(plan, plan.parts[0], vectors * 3)
    assert Path(plan.store.path("part-00000.parquet")).read_bytes() == left
    (tmp_path / "b").mkdir()
    again = plan_of(own, write_source(tmp_path / "b", "npy", IDS, vectors))
    np.testing.assert_array_equal(imported(again), vectors)


def test_a_snapshot_must_be_clear(root: str, tmp_path: Path) -> None:
    for name, snapshot in (("dogs", None), ("cats", "0123")):
        with pytest.raises(ConfigError, match="not clear"):
            find_snapshot(root, name, snapshot)


def test_rows_are_found_by_id_even_when_half_a_digest_is_shared(root: str) -> None:
    manifest = find_snapshot(root, "cats")
    store = corpus.corpus_store(root, "cats").child(manifest["snapshot"])
    lookup = RowLookup(store, manifest["parts"])
    assert lookup.rows([*IDS[::-1], "nobody", "\ud800"]).tolist() == [*range(NUM - 1, -1, -1), -1, -1]
    assert lookup.rows([]).tolist() == []
    lookup.digest_N2 = lookup.digest_N2.copy()
    wanted = lookup.rows(["p5"])[0]
    place = int(np.flatnonzero(lookup.row_N == wanted)[0])
    for neighbour in (place - 1, place - 2):
        lookup.digest_N2[neighbour, 0] = lookup.digest_N2[place, 0]
    assert lookup.rows(["p5"]).tolist() == [wanted]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot reserve"):
        Scatter(str(tmp_path / "x"), 1 << 40, 1 << 16, "fp32", False)


# Out


@pytest.fixture(scope="module")
def exported(root: str, vectors: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A root of its own with embeddings, and their manifest."""
    folder = tmp_path_factory.mktemp("out")
    plan = plan_of(fresh(root, folder), write_source(folder, "npy", IDS, vectors))
    return plan.root, import_vectors(plan, lambda _: None)


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_export_and_import_give_the_same_vectors(
    root: str, exported: Any, vectors: Any, tmp_path: Path, form: Any
) -> None:
    own, manifest = exported
    told: list[int] = []
    found = export_vectors(Export(own, manifest, str(tmp_path / "to"), form), told.append)
    assert (sum(told), found["num_rows"]) == (NUM, NUM)
    back = plan_of(fresh(root, tmp_path), [str(tmp_path / "to")])
    np.testing.assert_array_equal(imported(back), vectors)
    assert not [name for name in os.listdir(tmp_path / "to") if name.startswith(".") or name == "receipts"]


def test_the_exported_array_is_what_numpy_would_have_saved(exported: Any, vectors: Any, tmp_path: Path) -> None:
    export_vectors(Export(*exported, str(tmp_path / "to"), "npy"), lambda _: None)
    np.save(tmp_path / "own.npy", vectors)
    assert (tmp_path / "to" / "vectors.npy").read_bytes() == (tmp_path / "own.npy").read_bytes()
    assert (tmp_path / "to" / "ids.txt").read_bytes().decode().split("\n") == [*IDS, ""]


def test_exported_parquet_carries_titles_where_asked(exported: Any, vectors: Any, tmp_path: Path) -> None:
    export_vectors(Export(*exported, str(tmp_path / "to"), "parquet", titles=True), lambda _: None)
    table = pq.read_table([str(p) for p in sorted((tmp_path / "to").glob("*.parquet"))])
    assert table.column_names == ["id", "title", "vector"]
    assert (table["id"].to_pylist(), set(table["title"].to_pylist())) == (IDS, {""})
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), vectors)
    with pytest.raises(ConfigError, match="Parquet only"):
        export_vectors(Export(*exported, str(tmp_path / "b"), "npy", titles=True), lambda _: None)


def test_an_export_is_whole_or_not_there(exported: Any, tmp_path: Path) -> None:
    own, manifest = exported
    export = Export(own, manifest, str(tmp_path / "to"), "npy")
    export_vectors(export, lambda _: None)
    with pytest.raises(ConfigError, match="holds a finished export"):
        export_vectors(export, lambda _: None)
    short = {**manifest, "parts": [{**entry, "sha256": "0" * 64} for entry in manifest["parts"]]}
    damaged = replace(export, embeddings=short, to=str(tmp_path / "damaged"))
    with pytest.raises(ArtifactError, match="damaged"):
        export_vectors(damaged, lambda _: None)
    assert Store(damaged.to).files() == []


def test_an_id_with_a_line_end_goes_to_parquet_only(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "root")).child("embeddings", "s", "e")
    data = embeddings.to_parquet(["a\nb"], np.zeros((1, 2), np.float32), "fp32")
    store.put("part-00000.parquet", data)
    entry = {"name": "part-00000.parquet", "num_rows": 1, "sha256": store.sha256("part-00000.parquet")}
    content = {"snapshot": "s", "corpus": "c", "dim": 2, "num_rows": 1, "parts": [entry]}
    manifest = {**content, "encoder": {"fingerprint": "e", "storage": "fp32"}}
    export = Export(str(tmp_path / "root"), manifest, str(tmp_path / "to"), "npy")
    with pytest.raises(InputError, match=r"'a\\nb' is no line(.|\n)*parquet"):
        export_vectors(export, lambda _: None)
    export_vectors(replace(export, format="parquet"), lambda _: None)


# The whole way


def test_import_then_index_then_search_equals_encode_then_index_then_search(
    ray_cluster: str, root: str, tmp_path: Path
) -> None:
    folder = Path(root).parent
    content = {
        "corpus": {"name": "cats", "sources": [str(folder / "corpus.jsonl")], "part_size": 64},
        "encoder": {
            "checkpoint": str(folder / "dpr"),
            "query_checkpoint": str(folder / "dpr-query"),
            "compute": "fp32",
            "storage": "fp32",
        },
        "index": {"name": "cats", "recall_queries": 20},
    }
    configs = {}
    for name in ("direct", "imported"):
        configs[name] = str(tmp_path / f"{name}.yaml")
        Path(configs[name]).write_text(yaml.safe_dump({"root": str(tmp_path / name), **content}))
    pinakes("index", configs["direct"], "--quiet")
    out = str(tmp_path / "to")
    pinakes("export-vectors", "--root", str(tmp_path / "direct"), "--to", out, "--quiet")
    pinakes("ingest", configs["imported"], "--quiet")
    arguments = ("--root", str(tmp_path / "imported"), "--corpus", "cats", "--encoder", configs["imported"], "--quiet")
    told = pinakes_json("import-vectors", out, *arguments)
    assert told["imported"]["checked"]["min_cosine"] > 0.999
    version = pinakes_json("index", configs["imported"], "--quiet")
    assert version["recall"]["value"] == 1.0
    query = "the cat number 7 sat on mat 10"
    hits = [
        pinakes_json("search", query, "--root", str(tmp_path / name), "-k", "20")["hits"]
        for name in ("direct", "imported")
    ]
    assert [hit["row"] for hit in hits[0]] == [hit["row"] for hit in hits[1]]
    np.testing.assert_allclose(*([hit["score"] for hit in found] for found in hits), rtol=1e-6)
    assert version["version"] == os.listdir(tmp_path / "direct" / "indexes" / "cats")[0]
    code = InputError.exit_code
    assert "no such file" in pinakes("import-vectors", str(tmp_path / "none"), *arguments, code=code)


def test_no_instruction_beyond_those_of_plain_data_is_known() -> None:
    from pipelines.interchange import pickled

    known = set(pickled._ACTIONS)
    assert known <= {opcode.name for opcode in pickletools.opcodes}
    assert not known & {
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
        "EXT1",
        "EXT2",
        "EXT4",
        "PERSID",
        "BINPERSID",
        "NEXT_BUFFER",
    }
    assert issubclass(InputError, PinakesError)


# A foreign index (its scores: tests/test_foreign_index.py)


def write_hnsw(path: Path, rows: Any) -> str:
    """Write the L2-augmented HNSW-SQ8 that DPR builds of these vectors."""
    squared = (rows**2).sum(axis=1, keepdims=True)
    augmented = np.hstack([rows, np.sqrt(np.maximum(squared.max() - squared, 0))])
    index = faiss.IndexHNSWSQ(DIM + 1, faiss.ScalarQuantizer.QT_8bit, 32)
    index.train(augmented)
    index.add(augmented)
    index.hnsw.efSearch = 128
    faiss.write_index(index, str(path))
    return str(path)


@pytest.fixture(scope="module")
def foreign(root: str, vectors: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with DPR's index and ids of the passages, in an order of its own; and that order."""
    folder, order = tmp_path_factory.mktemp("foreign"), np.random.default_rng(2).permutation(NUM)
    write_hnsw(folder / "x.index.dpr", vectors[order])
    write_pickle(folder / "x.index_meta.dpr", [f"wiki:{IDS[i]}" for i in order], 3)
    return folder, order


def foreign_plan(root: str, folder: Path, ids: Any = None, **more: Any) -> Any:
    settled = ids or id_source(str(folder / "x.index_meta.dpr"))
    given = {"strip_prefix": "wiki:", **more}
    snapshot = find_snapshot(root, "cats")
    return plan_import(root, "foreign", snapshot, encoder(root), str(folder / "x.index.dpr"), settled, **given)


def test_a_foreign_index_becomes_a_version_that_is_served(
    root: str, vectors: Any, foreign: Any, tmp_path: Path
) -> None:
    plan = foreign_plan(fresh(root, tmp_path), foreign[0], min_recall=0.8)
    manifest = import_index(plan)
    assert manifest["recall"]["value"] > 0.95
    assert (manifest["factory"], manifest["metric"], manifest["dim"]) == ("HNSW32,SQ8", "ip", DIM)
    assert manifest["imported"]["checked"]["min_cosine"] > 0.99
    assert import_index(plan) == manifest  # again: nothing to do
    retriever = Retriever.open(plan.root, "foreign")
    query = retriever.encoder.encode_queries(["the cat number 7 sat on mat 10"])
    (hits,) = retriever.search(["the cat number 7 sat on mat 10"], 10)
    exact = (query[0] @ vectors.T).tolist()
    tolerance = 0.02 * abs(max(exact))  # of 8-bit codes
    assert hits[0].score == pytest.approx(max(exact), abs=tolerance)
    for hit in hits:
        assert hit.passage.id == IDS[hit.row]
        assert hit.score == pytest.approx(exact[hit.row], abs=tolerance)
    assert {"trained.faiss", "shard-000.faiss", "report.html"} <= set(plan.store.files())
    assert not [name for name in plan.store.files() if name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids[:-1], "149 ids only"),
        (lambda ids: [*ids, "x"], "more ids than vectors"),
        (lambda ids: ["nobody", *ids[1:]], r"1 \('nobody'\) vectors of unknown"),
        (lambda ids: [ids[1], *ids[1:]], "passages with more than one vector"),
        (lambda ids: ids[::-1], "not what this encoder makes"),
    ],
)
def test_a_foreign_index_of_other_passages_is_refused(
    root: str, foreign: Any, tmp_path: Path, change: Any, words: str
) -> None:
    folder, order = foreign
    path = write_pickle(tmp_path / "ids.dpr", change([f"wiki:{IDS[i]}" for i in order]))
    plan = foreign_plan(fresh(root, tmp_path), folder, id_source(path))
    with pytest.raises(InputError, match=words):
        import_index(plan)
    assert plan.store.files() == []


def test_a_foreign_index_by_position_and_its_gates(root: str, vectors: Any, tmp_path: Path) -> None:
    own = fresh(root, tmp_path)
    write_hnsw(tmp_path / "x.index.dpr", vectors)
    with pytest.raises(QualityError, match="recall"):
        import_index(foreign_plan(own, tmp_path, BY_POSITION, min_recall=1.0, trust=True, params={"efSearch": 1}))
    manifest = import_index(foreign_plan(own, tmp_path, BY_POSITION))
    assert manifest["num_rows"] == NUM
    write_hnsw(tmp_path / "x.index.dpr", vectors[:-1])
    with pytest.raises(InputError, match="holds 149 vectors, the snapshot 150"):
        import_index(foreign_plan(own, tmp_path, BY_POSITION))
    (tmp_path / "x.index.dpr").write_bytes(b"IHNs" + b"\x00" * 100)
    with pytest.raises(ArtifactError):
        foreign_plan(own, tmp_path, BY_POSITION)


def test_an_index_name_that_leads_elsewhere_is_refused(root: str, foreign: Any, tmp_path: Path) -> None:
    snapshot, path = find_snapshot(root, "cats"), str(foreign[0] / "x.index.dpr")
    with pytest.raises(ConfigError, match=r"cannot be a version of '\.\./x'"):
        plan_import(root, "../x", snapshot, encoder(root), path, BY_POSITION)
