"""Our side of the encode benchmark, each run in a fresh process: `python -m tests.bench.encode_ours JOB.json`.

Tasks: prepare (a snapshot, and its texts as every peer gets them), encode (the whole pipeline on Ray, from a cluster
that is not up yet), cross (pairs scored on actors, as `evaluate` does).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cluster.progress import Progress
from cluster.session import session
from pipelines import corpus, embeddings
from pipelines.config import ClusterConfig, CorpusConfig, EncoderConfig, RerankConfig
from pipelines.encode import EncoderSpec, load_tokeniser, resolve
from pipelines.models.tokens import join_title
from pipelines.rerank import load_reranker
from pipelines.schema import Passage
from tests.bench.encode_jobs import WORKERS, Result, steady

_PAIRS = 64  # of one piece of work


def prepare(job: dict[str, Any]) -> Result:
    """Ingest job["source"] and write, under job["folder"], texts.json, texts/*.parquet and lengths.npy."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cluster.ingest import ingest

    spec, folder = _spec(job), Path(job["folder"])
    config = CorpusConfig(name=job["name"], sources=[job["source"]], part_size=job["part_size"])
    with session(ClusterConfig()):
        snapshot = ingest(job["root"], config, Progress(quiet=True))
    store = corpus.corpus_store(job["root"], snapshot["corpus"]).child(snapshot["snapshot"])
    tokeniser = load_tokeniser(spec, "passage")
    (folder / "texts").mkdir(parents=True)
    texts: list[str] = []
    lengths = []
    for part in snapshot["parts"]:
        table = corpus.read_part(store, part)
        titles, bodies = table["title"].to_pylist(), table["text"].to_pylist()
        lengths.append(tokeniser.passages(titles, bodies).lengths)
        joined = [_joined(job["form"], title.strip(), body.strip()) for title, body in zip(titles, bodies, strict=True)]
        pq.write_table(pa.table({"text": joined}), folder / "texts" / part["name"])
        texts += joined
    (folder / "texts.json").write_text(json.dumps(texts))
    np.save(folder / "lengths.npy", np.concatenate(lengths))
    return {"snapshot": snapshot, "compute": spec.compute, "dim": spec.dim, "formatting": spec.formatting}


def _joined(form: str, title: str, text: str) -> str:
    """Return the one string that stands for a passage; "separated" is DPR's pair under all-zero token types."""
    return join_title(title, text) if form == "joined" or not title else f"{title} [SEP] {text}"


def encode(job: dict[str, Any]) -> Result:
    """Encode the snapshot from nothing, on a cluster of its own."""
    from cluster import encode as verb

    spec, snapshot = _spec(job), job["snapshot"]
    store = verb.embedding_store(job["root"], snapshot["snapshot"], spec)
    store.remove_all()
    with session(ClusterConfig()):
        manifest = verb.encode(job["root"], snapshot, spec, ClusterConfig(), Progress(quiet=True))
    spans = []
    for entry in manifest["parts"]:
        landed = os.stat(store.path(entry["name"])).st_mtime
        spans.append((landed - entry["encode_seconds"], landed, entry["num_rows"]))
    last = max(landed for _, landed, _ in spans)
    rate, ready = steady(spans, last, min(WORKERS, len(spans)))
    if job.get("vectors"):
        entries = manifest["parts"]
        np.save(job["vectors"], np.concatenate([embeddings.read_vectors(store, e, spec.dim) for e in entries]))
    return {
        "rate": rate,
        "startup": ready - job["started"],
        "seconds": last - ready,
        "wall_seconds": last - job["started"],
        "num_rows": manifest["num_rows"],
        "num_tokens": sum(entry["num_tokens"] for entry in manifest["parts"]),
        "manifest": {key: value for key, value in manifest.items() if key not in ("parts", "encoder", "packages")},
    }


def cross(job: dict[str, Any]) -> Result:
    """Score job["pairs"], a file of (question, title, text), on one actor a core."""
    from cluster.pools import run_on_actors

    pairs = json.loads(Path(job["pairs"]).read_text())
    items = [pairs[start : start + _PAIRS] for start in range(0, len(pairs), _PAIRS)]
    with session(ClusterConfig()):
        found = dict(run_on_actors(_Scorer, (job["checkpoint"],), items))
    spans = [(begun, ended, len(scores)) for begun, ended, scores in found.values()]
    last = max(ended for _, ended, _ in spans)
    rate, ready = steady(spans, last, min(WORKERS, len(spans)))
    np.save(job["vectors"], np.array([score for i in range(len(items)) for score in found[i][2]], np.float32))
    return {"rate": rate, "startup": ready - job["started"], "seconds": last - ready, "num_rows": len(pairs)}


class _Scorer:
    """Hold a cross-encoder, loaded by the first piece of work, and score pairs."""

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint
        self.model: Any = None

    def work(self, pairs: list[list[str]]) -> tuple[float, float, list[float]]:
        """Return (begun, ended, scores) of (question, title, text) pairs."""
        if self.model is None:
            self.model = load_reranker(RerankConfig(checkpoint=self.checkpoint, compute="auto"))
        begun = time.time()
        scores = self.model.score([q for q, _, _ in pairs], [Passage("", title, text) for _, title, text in pairs])
        return begun, time.time(), scores.tolist()


def _spec(job: dict[str, Any]) -> EncoderSpec:
    return resolve(EncoderConfig(checkpoint=job["checkpoint"], query_checkpoint=job.get("query_checkpoint")))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result = {"prepare": prepare, "encode": encode, "cross": cross}[job["task"]](job)
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
