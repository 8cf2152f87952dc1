"""The whole job on a real Ray cluster, verb by verb, through the real command."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.cli import main
from pipelines.answer import answer, load_reader
from pipelines.config import RerankConfig, load_config
from pipelines.evaluate import score_retrieval
from pipelines.manifest import fingerprint, put_done
from pipelines.rerank import load_reranker, rerank
from pipelines.retrieve import Retriever
from pipelines.schema import Question
from pipelines.storage import Store
from tests.chaos.driver import PINAKES
from tests.checkpoints import write_cross_encoder, write_dpr, write_sentence_transformer
from tests.s3 import s3_server

# Random weights know no similarity, so questions repeat a text whose title is empty: its own vector must come first.
ROWS = [
    {"id": f"p{i}", "title": f"title {i}" if i % 7 == 0 else "", "text": f"the cat number {i} sat on mat {i * 7 % 13}"}
    for i in range(300)
]
QUESTIONS = [
    {"id": r["id"], "question": r["text"], "answer": [f"cat number {r['id'][1:]}"], "positive": [r["id"]]}
    for r in ROWS[1::10]
    if not r["title"]
]


def pinakes(*arguments: str, code: int = 0) -> str:
    """Run the command's entry point in this process (which saves seconds of imports); return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["pinakes", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    found = end.value.code or 0
    assert found == code, f"exit {found}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue() if code == 0 else out.getvalue() + err.getvalue()


def pinakes_json(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(pinakes(*arguments, "--json"))
    return result


class Job:
    """A folder with a corpus, questions, a tiny checkpoint and configs that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
        (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
        write_sentence_transformer(str(folder / "model"))

    def config(self, name: str = "c", root: str | None = None, **index: Any) -> str:
        content = {
            "root": root or str(self.folder / "root"),
            "corpus": {"name": "cats", "sources": [str(self.folder / "corpus.jsonl")], "part_size": 64},
            "encoder": {"checkpoint": str(self.folder / "model"), "compute": "fp32", "storage": "fp32"},
            "index": {"name": "cats", "num_shards": 2, "recall_queries": 20, **index},
            "evaluate": {"questions": str(self.folder / "questions.jsonl"), "k": [1, 5, 500]},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)


@pytest.fixture(scope="module")
def job(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def done(job: Job) -> dict[str, Any]:
    command = [PINAKES, "run", job.config(), "--quiet", "--json"]  # once as the real process that users start
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def version_folder(job: Job, result: dict[str, Any]) -> Path:
    return job.folder / "root" / "indexes" / "cats" / str(result["version"]["version"])


def test_the_job_gives_an_exact_evaluated_version(job: Job, done: dict[str, Any]) -> None:
    version, evaluation = done["version"], done["evaluation"]
    assert (version["num_rows"], version["num_shards"], version["recall"]["value"]) == (300, 2, 1.0)
    assert evaluation["gold_top@1"] > 0.9
    assert evaluation["answer_top@5"] >= evaluation["answer_top@1"]
    assert "gold_top@300" in evaluation  # k 500 was cut to the corpus
    assert 0 < evaluation["mrr@10"] <= 1
    assert done["alias"]["current"] == version["version"]
    report = (version_folder(job, done) / "report.html").read_text()
    assert version["version"] in report
    assert "<svg" in report


def test_reranking_and_reading_get_rows_of_their_own(job: Job, done: dict[str, Any]) -> None:
    """The stages on Ray score what a plain loop over the same hits gives."""
    config = load_config(job.config())
    retriever = Retriever.open(config.root, "cats")
    reranking = RerankConfig(checkpoint=write_cross_encoder(str(job.folder / "reranker")), depth=7)
    reader_at = write_dpr(str(job.folder / "reader"), "reader")
    reranker, reader = load_reranker(reranking), load_reader(reader_at)
    questions = [Question(q["id"], q["question"], q["answer"], q["positive"]) for q in QUESTIONS]
    hits = [
        rerank(reranker, q.text, h, 7)
        for q, h in zip(questions, retriever.search([q.text for q in questions], 20), strict=True)
    ]
    read = [answer(reader, q.text, h, 3)[0].text for q, h in zip(questions, hits, strict=True)]
    # A reader of random weights answers anything; take its answer to every other question for the right one.
    right = [{**q, "answer": [text]} if i % 2 else q for i, (q, text) in enumerate(zip(QUESTIONS, read, strict=True))]
    (job.folder / "read.jsonl").write_text("".join(json.dumps(q) + "\n" for q in right))
    result = pinakes_json(
        *("evaluate", job.config(), "--questions", str(job.folder / "read.jsonl"), "--quiet"),
        *("--set", f"rerank={{checkpoint: {reranking.checkpoint}, depth: 7}}"),
        *("--set", f"answer={{reader: {reader_at}, depth: 3}}", "--set", "evaluate.k=[1, 5]"),
    )
    expected = score_retrieval(questions, hits, ks=[1, 5])
    assert {k: result["rerank"][k] for k in ("gold_top@1", "gold_top@5", "mrr@10")} == pytest.approx(
        {k: expected[k] for k in ("gold_top@1", "gold_top@5", "mrr@10")}
    )
    assert expected["gold_top@1"] < result["gold_top@1"]  # random weights spoil a perfect order
    assert result["reader"]["answer_em"] == len(questions) // 2 / len(questions)
    shown = pinakes("search", questions[0].text, "--root", config.root, "-k", "2", "--answer", reader_at, "--rerank",
                    reranking.checkpoint)  # fmt: skip
    assert "answer: " in shown
    assert "rerank " in shown


def test_every_file_opens_with_plain_faiss_and_pyarrow(job: Job, done: dict[str, Any]) -> None:
    folder = version_folder(job, done)
    seen: list[int] = []
    for number in range(2):
        index = faiss.read_index(str(folder / f"shard-{number:03d}.faiss"))
        table = pa.ipc.open_file(str(folder / f"passages-{number:03d}.arrow")).read_all()
        assert index.ntotal == len(table) == 150
        seen += [int(p[1:]) for p in table["id"].to_pylist()]
        _, rows = index.search(np.zeros((1, index.d), np.float32), 150)
        assert sorted(rows[0].tolist()) == list(range(number * 150, number * 150 + 150))  # ids are global rows
    assert seen == list(range(300))
    part = next((job.folder / "root").glob("embeddings/*/*/part-00000.parquet"))
    assert pq.read_table(part)["id"].to_pylist() == [f"p{i}" for i in range(64)]
    assert faiss.read_index(str(folder / "trained.faiss")).ntotal == 0


def test_a_second_run_does_nothing_again(job: Job, done: dict[str, Any]) -> None:
    again = pinakes_json("run", job.config(), "--quiet")
    assert all(again["stages"][s]["made"] == 0 for s in ("ingest", "encode", "index"))
    assert again["version"] == done["version"]


def test_a_run_says_how_fast_it_encoded_and_what_held_it_back(job: Job, done: dict[str, Any]) -> None:
    """The figures are in the manifest, in both forms of the result, and stay those of the run that did the work."""
    found = done["stages"]["encode"]["throughput"]
    manifest = json.loads(next((job.folder / "root").glob("embeddings/*/*/manifest.json")).read_text())
    assert manifest["throughput"] == found
    assert (found["num_parts"], found["num_rows"]) == (5, 300)
    assert found["num_tokens"] == sum(part["num_tokens"] for part in manifest["parts"])
    assert set(manifest["parts"][0]) == {
        *("name", "num_bytes", "sha256", "num_rows", "num_tokens", "encode_seconds", "first_row")
    }
    assert found["padding_share"] < 0.02  # a BERT's texts are packed
    assert 0 < found["encoder_busy_share"] <= 1
    assert 0 < found["achieved_flops"] < found["limit_flops"]
    assert 0 < found["start_seconds"] < found["seconds"]
    assert found["bottleneck"] == "start-up"  # 300 rows are encoded long before the workers have started
    again = " ".join(pinakes("run", job.config(), "--quiet").split())
    assert f"encoded before: {found['num_tokens']:,} tokens" in again
    assert "bottleneck: start-up" in again


def test_a_resumed_run_says_what_it_did_itself(job: Job, done: dict[str, Any], tmp_path: Path) -> None:
    """Of five parts one is missing: as a killed run leaves them, with receipts and without a manifest."""
    root = shutil.copytree(job.folder / "root", tmp_path / "root")
    (folder,) = root.glob("embeddings/*/*")
    store, parts = Store(str(folder)), json.loads((folder / "manifest.json").read_text())["parts"]
    (folder / "manifest.json").unlink()
    (folder / "part-00003.parquet").unlink()
    for part in parts[:3] + parts[4:]:
        made_from = fingerprint([part["name"], part["num_rows"], folder.name])
        facts = {key: part[key] for key in ("num_rows", "num_tokens", "encode_seconds")}
        put_done(store, part["name"], store.read(part["name"]), made_from, facts)
    resumed = pinakes_json("encode", job.config("resumed", root=str(root)), "--quiet")
    stage, found = resumed["stages"]["encode"], resumed["throughput"]
    assert (stage["made"], stage["reused"], stage["rows"]) == (1, 4, 300)
    assert (found["num_parts"], found["num_rows"], found["num_encoders"]) == (1, 64, 1)
    assert found["num_tokens"] == parts[3]["num_tokens"]


def test_vectors_and_snapshot_do_not_depend_on_the_workers(job: Job, done: dict[str, Any]) -> None:
    other = job.folder / "one-worker"
    pinakes("encode", job.config("w", root=str(other)), "--set", "cluster.workers=1", "--quiet")
    first = sorted((job.folder / "root").glob("embeddings/*/*/part-*.parquet"))
    second = sorted(other.glob("embeddings/*/*/part-*.parquet"))
    assert [p.relative_to(job.folder / "root") for p in first] == [p.relative_to(other) for p in second]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


@pytest.mark.parametrize(
    ("factory", "params"), [("HNSW16", {"efSearch": 64}), ("IVF8,SQ8", {"nprobe": 8}), ("OPQ4,IVF8,PQ4", {})]
)
def test_other_factories_on_the_same_embeddings(
    job: Job, done: dict[str, Any], factory: str, params: dict[str, int]
) -> None:
    config = job.config("f", factory=factory, search_params=params, group_rows=70)
    result = pinakes_json("index", config, "--quiet")
    assert result["stages"]["encode"]["made"] == 0
    assert result["recall"]["value"] > (0.3 if "PQ4" in factory else 0.9)
    assert (
        pinakes_json(
            "search", ROWS[5]["text"], "--root", str(job.folder / "root"), "--version", result["version"], "-k", "5"
        )["version"]
        == result["version"]
    )


def test_search_status_inspect_promote_rollback(job: Job, done: dict[str, Any]) -> None:
    root = str(job.folder / "root")
    found = pinakes_json("search", ROWS[43]["text"], "--root", root, "-k", "3")
    assert found["hits"][0]["id"] == "p43"
    assert len(found["hits"]) == 3
    assert "p43" in pinakes("search", ROWS[43]["text"], "--root", root)
    config = job.config("g", num_shards=1)
    other = pinakes_json("index", config, "--quiet")["version"]
    assert (
        pinakes_json("status", "--root", root)["aliases"][0]["current"] == done["version"]["version"]
    )  # not moved by `index`
    refused = pinakes("promote", "cats", other, "--root", root, code=7)
    assert f"pinakes evaluate CONFIG --version {other}" in refused  # because the current version was evaluated
    pinakes("evaluate", config, "--version", other, "--quiet")
    assert pinakes_json("promote", "cats", other, "--root", root)["current"] == other
    assert pinakes_json("rollback", "cats", "--root", root)["current"] == done["version"]["version"]
    state = pinakes_json("status", "--root", root)
    assert {v["state"] for v in state["versions"]} == {"finished"}
    assert [s["num_rows"] for s in state["snapshots"]] == [300]
    assert "finished" in pinakes("status", "--root", root)
    shard = version_folder(job, done) / "shard-000.faiss"
    assert pinakes_json("inspect", str(shard))["matches_manifest"] is True
    assert pinakes_json("inspect", str(job.folder / "model"))["dim"] == done["version"]["dim"]


def test_quality_gate_publishes_nothing(job: Job, done: dict[str, Any]) -> None:
    before = pinakes_json("status", "--root", str(job.folder / "root"))
    config = job.config("q", factory="IVF32,SQ8", search_params={"nprobe": 1}, min_recall=1.0)
    told = pinakes("index", config, "--quiet", code=7)
    assert "recall@10 is" in told
    assert "index.min_recall" in told
    after = pinakes_json("status", "--root", str(job.folder / "root"))
    finished = [v["version"] for v in after["versions"] if v["state"] == "finished"]
    assert finished == [v["version"] for v in before["versions"] if v["state"] == "finished"]
    assert after["aliases"] == before["aliases"]


def test_bad_input_is_explained_with_its_exit_code(job: Job, done: dict[str, Any]) -> None:
    root = str(job.folder / "root")
    cases = [
        (("run", job.config("b"), "--set", "corpus.sources=[nowhere.tsv]"), 3, "nowhere.tsv"),
        (("run", job.config("b"), "--set", "corpus.columns={text: body}"), 3, "body"),
        (("run", job.config("b"), "--set", "encoder.checkpoint=/nowhere/model"), 4, "no such checkpoint"),
        (("run", job.config("b"), "--set", "index.factory=PQ7"), 2, "PQ7"),
        (("run", job.config("b"), "--set", "index.search_params={nprobee: 4}"), 2, "nprobee"),
        (("run", "nowhere.yaml"), 2, "no such config file"),
        (("search", "x", "--root", root, "-k", "301"), 2, "k is 301, but the index holds 300 passages"),
        (("search", "x", "--root", root, "--name", "cat"), 5, "did you mean 'cats'?"),
        (("search", " ", "--root", root), 3, "blank"),
        (("search", "x", "--root", root, "--name", "cats", "--version", "nope"), 5, "no published version 'nope'"),
        (
            ("evaluate", job.config("b"), "--set", "encoder.max_length=4"),
            5,
            "not the one that this version was built with",
        ),
        (("rollback", "cats", "--root", str(job.folder / "empty")), 5, "there is no alias 'cats'"),
        (("inspect", str(job.folder / "nope.faiss")), 5, "no such file"),
        (("run",), 2, "Missing argument"),
    ]
    for arguments, code, message in cases:
        told = pinakes(*arguments, code=code)
        assert message in told, told
        assert "Traceback" not in told


@pytest.mark.parametrize("victim", ["shard-000.faiss", "passages-001.arrow", "ids-000.arrow"])
def test_a_tampered_file_of_a_version_is_never_used(job: Job, done: dict[str, Any], victim: str) -> None:
    path = version_folder(job, done) / victim
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
        told = pinakes("search", "x", "--root", str(job.folder / "root"), code=5)
        assert "damaged" in told
        assert victim in told
        path.write_bytes(data[: len(data) // 2])
        assert "damaged" in pinakes("search", "x", "--root", str(job.folder / "root"), code=5)
    finally:
        path.write_bytes(data)


def test_the_whole_job_on_s3(job: Job, done: dict[str, Any]) -> None:
    """Same bytes on S3 as on disk, one request in 40 failing. The cluster is local: workers inherit the credentials."""
    with s3_server() as (url, faults), pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        patch.setenv("PINAKES_CACHE", str(job.folder / "cache"))
        faults.every = 40
        result = pinakes_json("run", job.config("s3", root=f"{url}/root"), "--quiet")
        faults.every = 0
        assert faults.hits
        local, remote = done["version"]["files"], result["version"]["files"]
        assert {n: f["sha256"] for n, f in local.items()} == {n: f["sha256"] for n, f in remote.items()}
        assert pinakes_json("search", ROWS[43]["text"], "--root", f"{url}/root")["hits"][0]["id"] == "p43"


def test_a_damaged_reranker_is_named_by_its_own_error(job: Job, done: dict[str, Any]) -> None:
    """It is read on a worker, and refused as it would be here."""
    from safetensors.numpy import load_file, save_file

    directory = Path(write_cross_encoder(str(job.folder / "damaged")))
    state = load_file(directory / "model.safetensors")
    del state["bert.pooler.dense.weight"]
    save_file(state, directory / "model.safetensors")
    said = pinakes("evaluate", job.config(), "--quiet", "--set", f"rerank.checkpoint={directory}", code=4)
    assert "lack bert.pooler.dense.weight" in said
