"""Rebuilding the published snapshot under another encoder: 256-d beside 728-d, compared, promoted only when asked."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import jobs
from cluster.progress import Progress
from cluster.rebuild import rebuild
from pipelines import publish
from pipelines.config import Config, load_config
from pipelines.errors import ArtifactError, ConfigError
from pipelines.storage import Store
from tests.checkpoints import WORDS, write_paq
from tests.test_pipeline import pinakes, pinakes_json

_RNG = random.Random(11)
PAIRS = [{"question": " ".join(_RNG.choices(WORDS, k=9)) + "?", "answer": [f"answer {i}"]} for i in range(90)]


class Corpus:
    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, str(folder / "root")
        (folder / "paq.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
        (folder / "questions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS[::5]))
        for projection in (256, 728):
            write_paq(str(folder / f"paq{projection}"), projection)

    def path(self, width: int, questions: bool = True) -> str:
        content: dict[str, Any] = {
            "root": self.root,
            "corpus": {"name": "paq", "sources": [str(self.folder / "paq.jsonl")], "part_size": 40},
            "encoder": {"compute": "fp32", "storage": "fp32", "checkpoint": str(self.folder / f"paq{width}")},
            "index": {"name": "paq", "num_shards": 2, "recall_queries": 10, "factory": "SQ8"},
        }
        if questions:
            content["evaluate"] = {"questions": str(self.folder / "questions.jsonl"), "k": [1, 10]}
        path = self.folder / f"{width}-{questions}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    def config(self, width: int, questions: bool = True) -> Config:
        return load_config(self.path(width, questions))


@pytest.fixture(scope="module")
def made(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, dict[str, Any]]:
    import ray

    ray.init(address=ray_cluster, log_to_driver=False)
    found = Corpus(tmp_path_factory.mktemp("rebuild"))
    with pytest.raises(ArtifactError, match="no alias"):
        rebuild(found.config(256), found.config(728).encoder, Progress(quiet=True))
    return found, jobs.index(found.config(256), Progress(quiet=True))


def test_both_versions_side_by_side_and_the_switch_that_is_printed(made: tuple[Corpus, dict[str, Any]]) -> None:
    corpus, old = made
    (corpus.folder / "paq.jsonl").rename(corpus.folder / "gone.jsonl")  # the snapshot is enough
    result = pinakes_json("rebuild", corpus.path(256), "--encoder", corpus.path(728), "--quiet")
    (corpus.folder / "gone.jsonl").rename(corpus.folder / "paq.jsonl")
    assert [result[side]["dim"] for side in ("old", "new")] == [256, 728]
    assert result["old"]["version"] == old["version"] != result["new"]["version"]
    assert "ingest" not in result["stages"]
    assert publish.current(corpus.root, "paq") == old["version"]
    for side in ("old", "new"):
        facts = result[side]
        manifest = publish.read_version(corpus.root, "paq", facts["version"])
        folder = Store(corpus.root).child("indexes", "paq", facts["version"])
        assert facts["evaluation"] == publish.read_evaluation(corpus.root, manifest)
        assert facts["evaluation"]["num_questions"] == len(PAIRS[::5])
        assert facts["recall"] == manifest["recall"]
        assert facts["disk_bytes"] == sum(folder.size(name) for name in manifest["files"])
        assert facts["memory_bytes"] == sum(folder.size(f"shard-00{n}.faiss") for n in range(2))
        assert 0 < facts["latency"]["p50_ms"] <= facts["latency"]["p95_ms"]
    assert result["new"]["embedding_bytes"] > 2 * result["old"]["embedding_bytes"]
    pinakes(*shlex.split(result["promote"])[1:])
    assert publish.current(corpus.root, "paq") == result["new"]["version"]
    publish.rollback(corpus.root, "paq")


def test_a_second_run_reuses_the_version_and_both_evaluations(
    made: tuple[Corpus, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, old = made
    monkeypatch.setenv("COLUMNS", "200")
    pinakes("rebuild", corpus.path(256), "--encoder", corpus.path(728), "--quiet")
    shown = pinakes("rebuild", corpus.path(256), "--encoder", corpus.path(728), "--quiet")
    again = rebuild(corpus.config(256), corpus.config(728).encoder, Progress(quiet=True))
    assert "evaluate" not in again["stages"]
    assert again["stages"]["encode"]["made"] == 0
    for told in (old["version"], again["new"]["version"], "256", "728", "Exact match", "pinakes promote paq"):
        assert told in shown


def test_other_questions_are_asked_of_both_and_none_leave_quality_out(made: tuple[Corpus, dict[str, Any]]) -> None:
    corpus, _ = made
    other = corpus.config(256)
    (corpus.folder / "few.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS[:4]))
    settings = other.evaluate.model_copy(update={"questions": str(corpus.folder / "few.jsonl")})
    result = rebuild(other.model_copy(update={"evaluate": settings}), corpus.config(728).encoder, Progress(quiet=True))
    assert [result[side]["evaluation"]["num_questions"] for side in ("old", "new")] == [4, 4]
    bare = rebuild(corpus.config(256, questions=False), corpus.config(728).encoder, Progress(quiet=True))
    assert [bare[side]["evaluation"] for side in ("old", "new")] == [None, None]
    assert bare["old"]["latency"]["p50_ms"] > 0


def test_the_encoder_that_is_published_already_is_refused(made: tuple[Corpus, dict[str, Any]]) -> None:
    corpus, old = made
    with pytest.raises(ConfigError, match=old["version"]):
        rebuild(corpus.config(256), corpus.config(256).encoder, Progress(quiet=True))
