"""`verify` on real versions: a sound one passes; whatever is damaged in a copy of it is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import embeddings
from pipelines.index.build import add, read, train, write
from pipelines.index.spec import parse_spec
from pipelines.verify import Finding, verify
from tests.chaos.driver import PINAKES
from tests.checkpoints import write_sentence_transformer
from tests.s3 import s3_server
from tests.test_pipeline import Job, pinakes, pinakes_json

CHECKS = {"manifest", "files", "leftovers", "snapshot", "shards", "passages", "embeddings", "encoders", "sample"}
# What no other part of a version repeats, so that a change of it alone cannot be seen.
FREE = ["created", "timings_seconds", "throughput", "packages", "recall", "factory", "corpus", "config.name",
        "config.min_recall", "config.recall_queries", "config.max_memory_gb", "config.max_ms", "config.pilot_rows",
        "files.trained.faiss.train_rows", "build", "lists", "forecast"]  # fmt: skip
# What a fingerprint repeats of the encoder; where its files are can change.
ENCODER = ["family", "query_family", "dim", "similarity", "max_length", "compute", "storage", "formatting", "digest",
           "query_digest", "fingerprint", "query_fingerprint"]  # fmt: skip


class Built:
    """A root with an exact index (`flat`) and an approximate one (`ivf`) over the same passages, two shards each."""

    def __init__(self, folder: Path) -> None:
        self.job = Job(folder)
        self.root = folder / "root"
        self.versions: dict[str, str] = {}
        for name, factory, params in (("flat", "Flat", {}), ("ivf", "IVF8,SQ8", {"nprobe": 4})):
            config = self.job.config(name, factory=factory, search_params=params)
            result = pinakes_json("index", config, "-q", "--set", f"index.name={name}")
            self.versions[name] = str(result["version"])


class Copy:
    """A copy of the root that a test may damage, seen from one of its indexes."""

    def __init__(self, built: Built, folder: Path, name: str) -> None:
        self.root = folder / "root"
        shutil.copytree(built.root, self.root)
        self.name, self.version = name, built.versions[name]
        self.folder = self.root / "indexes" / name / self.version
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.vectors = self.root / "embeddings" / self.manifest["snapshot"] / self.manifest["embeddings"]
        self.snapshot = self.root / "corpora" / "cats" / self.manifest["snapshot"]

    def verify(self, num_sampled: int = 16, deep: bool = False) -> list[Finding]:
        return verify(str(self.root), self.name, self.version, num_sampled, deep)

    def failed(self, num_sampled: int = 16, deep: bool = False) -> list[tuple[str, str]]:
        """Return (check, what) of every fault, after seeing that each says where it is and what to do."""
        faults = [f for f in self.verify(num_sampled, deep) if f.state == "failed"]
        assert all(f.where and f.next for f in faults)
        return [(f.check, f.what) for f in faults]

    def forge(self, *names: str) -> None:
        """Make the manifest agree with the files as they are now."""
        for name in names:
            data = (self.folder / name).read_bytes()
            sums = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self.manifest["files"][name].update(sums)
        (self.folder / "manifest.json").write_text(json.dumps(self.manifest))

    def rewrite(self, name: str, change: Callable[[Any], Any]) -> None:
        """Replace a FAISS file by what `change` makes of its index."""
        path = str(self.folder / name)
        write(change(read(path)), path)


@pytest.fixture(scope="module")
def built(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def flat(built: Built, tmp_path: Path) -> Copy:
    return Copy(built, tmp_path, "flat")


@pytest.fixture
def ivf(built: Built, tmp_path: Path) -> Copy:
    return Copy(built, tmp_path, "ivf")


@pytest.fixture
def no_model(built: Built) -> Iterator[Path]:
    """The checkpoint is away for the length of a test; gives the place where it belongs."""
    model, away = built.job.folder / "model", built.job.folder / "away"
    model.rename(away)
    yield model
    shutil.rmtree(model, ignore_errors=True)
    away.rename(model)


def flip(path: Path, at: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= bits
    path.write_bytes(data)


# Sound


@pytest.mark.parametrize("name", ["flat", "ivf"])
def test_a_sound_version_passes_every_check(built: Built, name: str) -> None:
    findings = verify(str(built.root), name, built.versions[name], 16, deep=True)
    assert [f for f in findings if f.state != "ok"] == []
    assert {f.check for f in findings} == CHECKS
    assert [f.what for f in findings if f.check == "sample"][-1].startswith("searched: 16 of 16 passages")


def test_what_a_version_no_longer_needs_may_be_gone(flat: Copy, no_model: Path) -> None:
    shutil.rmtree(flat.vectors)
    shutil.rmtree(flat.snapshot)
    findings = flat.verify()
    assert {f.state for f in findings} == {"ok", "skipped"}
    skipped = [f.what for f in findings if f.state == "skipped"]
    assert sum("no longer in the root" in what for what in skipped) == 2
    assert sum("is not to be had here" in what for what in skipped) == 2
    assert skipped[-1] == "searching is skipped, because no vector of the sample is known"


def test_without_the_encoder_the_stored_vectors_are_searched(flat: Copy, no_model: Path) -> None:
    assert flat.verify()[-1].what == "searched: 16 of 16 passages in the first 10 of their own vectors"


def test_twins_may_stand_in_front_of_a_passage(flat: Copy) -> None:
    """Under the inner product a longer vector of the same direction rightly comes first."""
    from pipelines.verify_sample import _found

    own = np.ones((1, 4), np.float32)
    twins = np.array([[4.0, 4.0]], np.float32), np.array([[7, 8]])
    shorter = np.array([[4.0, 3.0]], np.float32), np.array([[7, 8]])
    assert _found(twins, own, np.array([9]), "ip", True).all()
    assert not _found(shorter, own, np.array([9]), "ip", True).any()


# Damaged files


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "names", "what"),
    [
        (lambda c: flip(c.folder / "shard-001.faiss", 5000), {"shard-001.faiss"}, "checksum"),
        (lambda c: cut_short(c.folder / "passages-000.arrow"), {"passages-000.arrow"}, "not as long"),
        (lambda c: (c.folder / "ids-001.arrow").unlink(), {"ids-001.arrow"}, "not there"),
        (lambda c: flip(c.folder / "trained.faiss", 10), {"trained.faiss"}, "checksum"),
    ],
)
def test_a_damaged_file_is_named(flat: Copy, damage: Callable[[Copy], Any], names: set[str], what: str) -> None:
    damage(flat)
    findings = [f for f in flat.verify() if f.state == "failed"]
    assert {f.where.rpartition("/")[2] for f in findings} == names
    assert all(f.check == "files" and what in f.what and f.expected and f.found and f.next for f in findings)


def test_swapped_shards_are_both_named(flat: Copy) -> None:
    one, other = flat.folder / "shard-000.faiss", flat.folder / "shard-001.faiss"
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    assert [check for check, _ in flat.failed()] == ["files", "files"]
    flat.forge("shard-000.faiss", "shard-001.faiss")
    assert flat.failed() == [("shards", f"the row ids of shard-00{n}.faiss is wrong") for n in (0, 1)]


def test_all_faults_are_told_not_only_the_first(flat: Copy) -> None:
    flip(flat.folder / "shard-000.faiss", 3000)
    cut_short(flat.folder / "passages-001.arrow")
    (flat.folder / ".tmp-0123").write_bytes(b"half")
    (flat.vectors / "part-00002.parquet").unlink()
    checks = [check for check, _ in flat.failed()]
    assert checks[:4] == ["files", "files", "leftovers", "embeddings"]


@pytest.mark.parametrize("left", [".tmp-5b1f", "receipts/shard-000.faiss.json", "work/group-000-0001.faiss"])
def test_what_a_killed_writer_left_is_named(flat: Copy, left: str) -> None:
    path = flat.folder / left
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    assert flat.failed(0) == [("leftovers", "a half-written thing lies beside the version")]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2**32), bit=st.integers(0, 7), pick=st.integers(0, 2**16))
def test_any_flipped_byte_of_any_listed_file_is_found(flat: Copy, place: int, bit: int, pick: int) -> None:
    names = sorted(flat.manifest["files"])
    path = flat.folder / names[pick % len(names)]
    before = path.read_bytes()
    flip(path, place, 1 << bit)
    try:
        assert ("files", "the file is damaged: its checksum is not the recorded one") in flat.failed(0)
    finally:
        path.write_bytes(before)


# The manifest


def without_free(manifest: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(json.dumps(manifest))
    kept["encoder"] = {key: kept["encoder"][key] for key in ENCODER}
    for key in FREE:
        outer, _, inner = key.partition(".")
        if not inner:
            kept.pop(outer, None)
        elif outer == "files":
            entry = kept["files"]["trained.faiss"]
            kept["files"]["trained.faiss"] = {key: entry[key] for key in ("num_bytes", "sha256", "quantizer")}
        else:
            kept[outer].pop(inner, None)
    return kept


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2**32), bit=st.integers(0, 7))
def test_a_flipped_byte_of_the_manifest_is_found_where_it_means_something(flat: Copy, place: int, bit: int) -> None:
    path = flat.folder / "manifest.json"
    before = path.read_bytes()
    flip(path, place, 1 << bit)
    try:
        faults = flat.failed(2)
        try:
            found = {key: value for key, value in json.loads(path.read_bytes()).items() if key in flat.manifest}
            same = without_free(found) == without_free(flat.manifest)  # an unknown key means nothing
        except (ValueError, KeyError, AttributeError):
            same = False
        assert faults or same
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": "0123456789abcdef"}, "version"),
        ({"name": "dogs"}, "index name"),
        ({"dim": 31}, "dim"),
        ({"metric": "l2"}, "settings"),
        ({"snapshot": "0123456789abcdef"}, "settings"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_named(flat: Copy, change: dict[str, Any], named: str) -> None:
    (flat.folder / "manifest.json").write_text(json.dumps({**flat.manifest, **change}))
    if "name" in change:  # the files are looked for where the manifest says they are
        shutil.copytree(flat.root / "indexes" / "flat", flat.root / "indexes" / "dogs")
    if "version" in change:
        shutil.copytree(flat.folder, flat.folder.parent / change["version"])
    assert ("manifest", f"the manifest's {named} is not what the rest of it says") in flat.failed(0)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"kind": "version"}', b'{"kind": "snapshot"}'])
def test_a_manifest_that_does_not_read_is_the_one_fault(flat: Copy, content: bytes) -> None:
    (flat.folder / "manifest.json").write_bytes(content)
    assert [check for check, _ in flat.failed()] == ["manifest"]


# Files whose checksums hold, but that do not belong together


def test_a_changed_passage_id_is_found(flat: Copy) -> None:
    def change(table: pa.Table) -> pa.Table:
        ids = table.column("id").to_pylist()
        return table.set_column(0, table.schema.field("id"), pa.array(["someone else", *ids[1:]]))

    rewrite_table(flat, "passages-001.arrow", change)
    assert flat.failed() == [("passages", "the lookup of ids of passages-001.arrow is wrong")]


def test_a_changed_text_is_found_in_the_snapshot_and_by_its_vector(flat: Copy) -> None:
    def change(table: pa.Table) -> pa.Table:
        texts = pa.array(["on the mat sat another cat"] * len(table))
        return table.set_column(2, table.schema.field("text"), texts)

    rewrite_table(flat, "passages-000.arrow", change)
    faults = flat.failed()
    assert faults[0] == ("snapshot", "the text of row 0 of passages-000.arrow is wrong")
    assert faults[-1] == ("sample", "the encoder does not give the stored vectors again")


def rewrite_table(copy: Copy, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    path = str(copy.folder / name)
    table = change(pa.ipc.open_file(pa.BufferReader((copy.folder / name).read_bytes())).read_all())
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    copy.forge(name)


@pytest.mark.parametrize("name", ["flat", "ivf"])
def test_a_changed_row_id_in_a_shard_is_found(built: Built, tmp_path: Path, name: str) -> None:
    copy = Copy(built, tmp_path, name)

    def change(index: Any) -> Any:
        fresh = read(str(copy.folder / "trained.faiss"))
        vectors = np.random.default_rng(0).standard_normal((150, 32)).astype(np.float32)
        add(fresh, vectors, np.arange(1, 151))
        return fresh

    copy.rewrite("shard-000.faiss", change)
    copy.forge("shard-000.faiss")
    faults = copy.failed()
    assert faults[0] == ("shards", "the row ids of shard-000.faiss is wrong")


@pytest.mark.parametrize("is_embedded", [True, False])
def test_vectors_under_each_others_rows_are_found(flat: Copy, is_embedded: bool) -> None:
    def change(index: Any) -> Any:
        vectors = index.index.reconstruct_n(0, index.ntotal)
        fresh = read(str(flat.folder / "trained.faiss"))
        add(fresh, np.roll(vectors, 40, axis=0), np.arange(150, 300))
        return fresh

    flat.rewrite("shard-001.faiss", change)
    flat.forge("shard-001.faiss")
    if not is_embedded:
        shutil.rmtree(flat.vectors)
    ((check, what),) = flat.failed()
    assert check == "sample"
    assert what.startswith("the index does not find its own passages: row ")


def test_a_shard_of_another_quantizer_is_found(ivf: Copy) -> None:
    def change(index: Any) -> Any:
        vectors = np.random.default_rng(0).standard_normal((150, 32)).astype(np.float32)
        other = train(parse_spec("IVF8,SQ8", 32, "ip"), vectors, seed=9)
        add(other, vectors, np.arange(150, 300))
        return other

    ivf.rewrite("shard-001.faiss", change)
    ivf.forge("shard-001.faiss")
    assert ("shards", "the quantizer of shard-001.faiss is wrong") in ivf.failed()


def test_an_index_of_another_type_width_and_metric_is_found(flat: Copy) -> None:
    def change(index: Any) -> Any:
        other = train(parse_spec("SQfp16", 16, "l2"), np.zeros((0, 16), np.float32))
        add(other, np.ones((150, 16), np.float32), np.arange(150))
        return other

    flat.rewrite("shard-000.faiss", change)
    flat.forge("shard-000.faiss")
    named = [what.split()[1] for check, what in flat.failed() if check == "shards"]
    assert named == ["width", "metric", "type", "quantizer"]


def test_a_file_that_is_no_index_is_found(flat: Copy) -> None:
    (flat.folder / "shard-000.faiss").write_bytes(b"not an index")
    (flat.folder / "ids-000.arrow").write_bytes(b"not a table")
    flat.forge("shard-000.faiss", "ids-000.arrow")
    checks = {check for check, _ in flat.failed()}
    assert checks == {"shards", "passages", "sample"}


# Embeddings and encoders


def test_a_lost_embedding_part_is_named(flat: Copy) -> None:
    (flat.vectors / "part-00003.parquet").unlink()
    assert flat.failed(0) == [("embeddings", "part-00003.parquet is not there")]


def test_a_flipped_vector_is_found_by_deep(flat: Copy) -> None:
    flip(flat.vectors / "part-00001.parquet", 4000)
    assert flat.failed(0) == []
    assert flat.failed(0, deep=True) == [("embeddings", "the file is damaged: its checksum is not the recorded one")]


def test_vectors_of_another_model_are_found(flat: Copy) -> None:
    """The part and its manifest agree; only encoding again tells that the vectors are not this encoder's."""
    path, manifest_path = flat.vectors / "part-00000.parquet", flat.vectors / "manifest.json"
    ids = pq.read_table(path).column("id").to_pylist()
    other = np.random.default_rng(1).standard_normal((len(ids), 32)).astype(np.float32)
    path.write_bytes(embeddings.to_parquet(ids, other, "fp32"))
    manifest = json.loads(manifest_path.read_text())
    data = path.read_bytes()
    manifest["parts"][0].update(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest_path.write_text(json.dumps(manifest))
    what = [what for check, what in flat.failed(64, deep=True) if check == "sample"]
    assert what[0] == "the encoder does not give the stored vectors again"
    assert what[1].startswith("the index does not find its own passages")


def test_embeddings_of_another_encoder_or_cut_are_named(flat: Copy) -> None:
    path = flat.vectors / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["encoder"]["digest"] = "0" * 64
    manifest["parts"][0]["num_rows"] -= 1
    path.write_text(json.dumps(manifest))
    named = [what for check, what in flat.failed(0) if check == "embeddings"]
    assert named[0] == "the encoder's digest of the embeddings is not the version's"
    assert "the parts of the embeddings is not the version's" in named
    assert "the embedding part is another one" in named


def test_another_checkpoint_under_the_same_path_is_found(built: Built, no_model: Path) -> None:
    """In a process of its own, as users run it."""
    write_sentence_transformer(str(no_model), seed=3)
    command = [PINAKES, "verify", "--root", str(built.root), "--name", "flat", "--json", "-q", "--sample", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    result = json.loads(done.stdout)
    assert result["state"] == "damaged"
    failed = [f for f in result["findings"] if f["state"] == "failed"]
    assert [f["check"] for f in failed] == ["encoders", "encoders", "sample"]
    assert "files are not those that made these embeddings" in failed[0]["what"]


# The command


def test_the_command_resolves_aliases_and_versions(built: Built, ray_cluster: str) -> None:
    root = ["--root", str(built.root), "-q", "--sample", "4"]
    by_alias = pinakes_json("verify", "--name", "ivf", *root)
    by_version = pinakes_json("verify", built.versions["ivf"], *root)
    spread = pinakes_json("verify", built.versions["ivf"], *root, "--address", ray_cluster)
    # Cosines and scores of a re-encoding differ in their last digits with the number of threads.
    told_by = [
        [(f["check"], f["state"], f.get("where")) for f in found["findings"]]
        for found in (by_alias, by_version, spread)
    ]
    assert told_by[0] == told_by[1] == told_by[2]
    assert (by_alias["state"], by_alias["counts"]["failed"]) == ("sound", 0)
    told = pinakes("verify", "--name", "flat", *root)
    assert "sound" in told
    assert "searched: 4 of 4 passages" in told
    assert "no version 'nope'" in pinakes("verify", "nope", *root, code=5)
    assert "which index" in pinakes("verify", *root, code=2)
    assert "no alias 'dogs'" in pinakes("verify", "--name", "dogs", *root, code=5)


def test_the_command_prints_every_fault(flat: Copy) -> None:
    flip(flat.folder / "shard-000.faiss", 3000)
    (flat.folder / ".tmp-0123").write_bytes(b"half")
    told = pinakes("verify", flat.version, "--root", str(flat.root), "-q", "--sample", "0", code=5)
    for piece in ("damaged; ", "shard-000.faiss", "expected:", "found:", "next:", ".tmp-0123"):
        assert piece in told


def test_a_version_on_an_object_store(flat: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("PINAKES_CACHE", str(tmp_path / "cache"))
    with s3_server() as (url, _):
        root = f"{url}/root"
        store = s3fs.S3FileSystem()
        store.put(f"{flat.root}/", f"{root}/", recursive=True)
        findings = verify(root, flat.name, flat.version, 8, deep=True)
        assert {f.state for f in findings} == {"ok"}
        flip(flat.folder / "shard-001.faiss", 5000)
        store.put(str(flat.folder / "shard-001.faiss"), f"{root}/indexes/flat/{flat.version}/shard-001.faiss")
        (fault,) = [f for f in verify(root, flat.name, flat.version, 8) if f.state == "failed"]
        assert fault.where.endswith("shard-001.faiss")
