"""Switching the retriever: the same corpus under a 256-d and a 728-d PAQ encoder, and a DPR pair; forth and back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cluster import jobs
from cluster.progress import Progress
from pipelines import publish
from pipelines.config import load_config
from pipelines.encode import Encoder, resolve
from pipelines.errors import ArtifactError
from pipelines.retrieve import Retriever
from tests.checkpoints import WORDS, write_dpr, write_paq

_RNG = random.Random(5)
PAIRS = [{"question": " ".join(_RNG.choices(WORDS, k=9)) + "?", "answer": [f"answer {i}"]} for i in range(120)]


@pytest.fixture(scope="module")
def folder(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import ray

    ray.init(address=ray_cluster, log_to_driver=False)
    folder = tmp_path_factory.mktemp("switch")
    (folder / "paq.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    (folder / "questions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS[::4]))
    for projection in (256, 728):
        write_paq(str(folder / f"paq{projection}"), projection)
    write_dpr(str(folder / "ctx"), "passage", dim=32)
    write_dpr(str(folder / "question"), "query", dim=32, seed=1)
    return folder


def run(folder: Path, name: str, **encoder: Any) -> dict[str, Any]:
    content = {
        "root": str(folder / "root"),
        "corpus": {"name": "paq", "sources": [str(folder / "paq.jsonl")], "part_size": 50},
        "encoder": {"compute": "fp32", "storage": "fp32", **encoder},
        "index": {"name": name, "num_shards": 2, "recall_queries": 10},
        "evaluate": {"questions": str(folder / "questions.jsonl"), "k": [1, 10]},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return jobs.run(load_config(str(path)), Progress(quiet=True))


def expected_em(folder: Path) -> float:
    """Compute by hand how many questions have themselves as their best inner product, and with it their answer."""
    encoder = Encoder(resolve(load_config(str(folder / "config.yaml")).encoder), "query")
    emb_ND = encoder.encode_queries([p["question"] for p in PAIRS])
    asked = np.arange(0, len(PAIRS), 4)
    return float(np.mean(np.argmax(emb_ND[asked] @ emb_ND.T, axis=1) == asked))


def test_from_256_to_728_dimensions_and_back(folder: Path) -> None:
    root = str(folder / "root")
    narrow = run(folder, "paq", checkpoint=str(folder / "paq256"))
    assert narrow["evaluation"]["em"] == pytest.approx(expected_em(folder))
    wide = run(folder, "paq", checkpoint=str(folder / "paq728"))
    assert (narrow["version"]["dim"], wide["version"]["dim"]) == (256, 728)
    assert narrow["version"]["snapshot"] == wide["version"]["snapshot"]
    assert wide["stages"]["ingest"]["made"] == 0
    assert publish.current(root, "paq") == wide["version"]["version"]
    assert Retriever.open(root, "paq").search([PAIRS[7]["question"]], 1)[0][0].passage.answers == ["answer 7"]
    publish.rollback(root, "paq")
    old = Retriever.open(root, "paq")
    assert old.manifest["dim"] == 256
    with pytest.raises(ArtifactError, match="256"):
        old.search_vectors(np.zeros((1, 728), np.float32), 1)  # a query of the other encoder never passes


def test_dpr_passages_and_questions_each_have_their_tower(folder: Path) -> None:
    made = run(folder, "dpr", checkpoint=str(folder / "ctx"), query_checkpoint=str(folder / "question"))
    assert made["version"]["dim"] == 32
    spec = resolve(load_config(str(folder / "config.yaml")).encoder)
    texts = [p["question"] for p in PAIRS]
    passages = Encoder(spec, "passage").encode_passages([""] * len(texts), texts)
    query = Encoder(spec, "query").encode_queries(["who wrote the book"])
    expected = np.argsort(-(query @ passages.T)[0])[:5]
    hits = Retriever.open(str(folder / "root"), "dpr").search(["who wrote the book"], 5)[0]
    assert [h.row for h in hits] == expected.tolist()
