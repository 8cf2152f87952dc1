"""One passage kills the encoder, whoever encodes it: the run ends, and everything but that passage is encoded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.embeddings import read_vectors
from pipelines.storage import Store
from tests.chaos.conftest import NUM_ROWS, Undisturbed
from tests.chaos.driver import content_of, run, write_config
from tests.chaos.test_driver_killed import ids_of
from tests.deadly import WORD, write_sitecustomize

pytestmark = pytest.mark.chaos

GUILTY, PART = 777, 12
REASON = "the encoder process died (signal 9, SIGKILL), 2 times on this row alone"


def with_a_deadly_passage(corpus: str, target: Path) -> str:
    """Copy a corpus, with the deadly word in one passage."""
    lines = Path(corpus).read_text().splitlines()
    key, text, title = lines[GUILTY + 1].split("\t")
    lines[GUILTY + 1] = f"{key}\t{text} {WORD}\t{title}"
    target.write_text("\n".join(lines) + "\n")
    return str(target)


def vectors_of(root: Path) -> list[np.ndarray]:
    folder = next(root.glob("embeddings/*/*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    return [read_vectors(Store(str(folder)), entry, manifest["dim"]) for entry in manifest["parts"]]


def test_a_passage_that_kills_its_worker_goes_to_quarantine(undisturbed: Undisturbed, tmp_path: Path) -> None:
    corpus = with_a_deadly_passage(undisturbed.corpus, tmp_path / "corpus.tsv")
    config = write_config(tmp_path / "c.yaml", corpus, undisturbed.checkpoint, str(tmp_path / "root"))
    # Ray gives its workers the environment of the job, and they give it to the processes they start.
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": write_sitecustomize(tmp_path / "deadly", "killed")}}}
    result = run(config, RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job))

    folder = next((tmp_path / "root").glob("embeddings/*/*"))
    expected = [{"id": f"p{GUILTY}", "row": GUILTY, "part": f"part-{PART:05d}.parquet", "reason": REASON}]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["num_quarantined"], manifest["quarantined"]) == (1, expected)
    assert pq.read_table(folder / "quarantine.parquet").to_pylist() == expected
    assert not (folder / "attempts").exists()

    found, plain = vectors_of(tmp_path / "root"), vectors_of(Path(undisturbed.corpus).parent / "root")
    for part, (ours, theirs) in enumerate(zip(found, plain, strict=True)):
        if part != PART:
            np.testing.assert_array_equal(ours, theirs)
    row = GUILTY - 64 * PART
    assert not found[PART][row].any()
    others = np.delete(np.arange(64), row)
    np.testing.assert_allclose(found[PART][others], plain[PART][others], atol=1e-3)  # fp16, other micro-batches
    assert ids_of(tmp_path / "root") == [f"p{i}" for i in range(NUM_ROWS)]
    assert result["version"]["num_rows"] == NUM_ROWS

    content = content_of(tmp_path / "root")
    again = run(config)
    assert again["stages"]["encode"]["made"] == 0
    assert content_of(tmp_path / "root") == content
