"""The served API on a real Ray Serve: same results as offline, sharded or not, reranked, and clear refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster import jobs
from cluster.progress import Progress
from pipelines import publish
from pipelines.access_keys import KeyFile, default_url
from pipelines.answer import answer, load_reader
from pipelines.config import AnswerConfig, Config, EvaluateConfig, IndexConfig, RerankConfig, load_config
from pipelines.errors import CheckpointError
from pipelines.rerank import load_reranker, rerank
from pipelines.retrieve import Retriever
from tests import test_filtered_search as filtered
from tests.chaos.driver import PINAKES
from tests.checkpoints import write_cross_encoder, write_dpr, write_sentence_transformer
from tests.local_backend import build_root
from tests.test_pipeline import ROWS, Job

BAD: list[dict[str, Any]] = [{"rerank": True}, {"answer": True}, {"filter": {"yaer": 1990}}]
TOLD = ["no reranker", "no reader", "did you mean 'year'"]
QUERIES = [r["text"] for r in ROWS[3:40:5]]


def call(address: str, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any, str]:
    """Return (status, decoded body, content type)."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            content, kind = response.read(), response.headers["Content-Type"]
            return response.status, json.loads(content) if "json" in kind else content.decode(), kind
    except urllib.error.HTTPError as error:
        content, kind = error.read(), error.headers["Content-Type"] or ""
        return error.code, json.loads(content) if "json" in kind else content.decode(), kind


class Served:
    """An index built on the cluster, and what it takes to serve it."""

    def __init__(self, folder: Path) -> None:
        self.job = Job(folder)
        self.port = jobs.free_port()  # Serve keeps the port it was started with
        self.rerank = RerankConfig(checkpoint=write_cross_encoder(str(folder / "reranker")), depth=20)
        self.answer = AnswerConfig(reader=write_dpr(str(folder / "reader"), "reader"), depth=4)
        self.whole = load_config(self.job.config("whole", num_shards=1), ["index.name=cats1"])
        self.root = self.whole.root
        jobs.index(self.whole, Progress(True))

    def serving(self, config: Config, stages: dict[str, Any] | None = None, **serve: Any) -> Any:
        settings = {"port": self.port, "max_batch": 50, "max_query_chars": 500, "max_k": 200, **serve}
        update = {"serve": config.serve.model_copy(update=settings), **(stages or {})}
        return jobs.serving(config.model_copy(update=update))


@pytest.fixture(scope="module")
def served(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import ray

    ray.init(address=ray_cluster, log_to_driver=False)
    yield Served(tmp_path_factory.mktemp("served"))
    from ray import serve

    serve.shutdown()


@pytest.fixture(scope="module")
def address(served: Served) -> Iterator[str]:
    stages = {"rerank": served.rerank, "answer": served.answer}
    with served.serving(served.whole, stages, budget_ms=300_000) as address:
        yield address


def test_one_query_a_batch_and_offline_agree(served: Served, address: str) -> None:
    offline = Retriever.open(served.root, "cats1").search(QUERIES, 7)
    status, batch, _ = call(address, "/search", {"queries": QUERIES, "k": 7})
    assert status == 200
    for query, hits, found in zip(QUERIES, offline, batch["results"], strict=True):
        assert [h["row"] for h in found] == [h.row for h in hits]
        _, single, _ = call(address, "/search", {"query": query, "k": 7})
        assert [h["id"] for h in single["hits"]] == [h.passage.id for h in hits]
        assert [h["score"] for h in single["hits"]] == pytest.approx([h.score for h in hits], abs=1e-5)
        assert set(single["took_ms"]) >= {"encode", "search", "fetch", "total"}


def test_a_request_may_name_a_version_that_is_served(served: Served, address: str) -> None:
    version = publish.current(served.root, "cats1")
    _, named, _ = call(address, "/search", {"query": QUERIES[0], "k": 3, "version": version, "explain": True})
    _, plain, _ = call(address, "/search", {"query": QUERIES[0], "k": 3})
    assert (named["version"], named["hits"]) == (version, plain["hits"])
    assert named["explain"]["depth"] == 3
    assert "explain" not in plain
    status, problem, _ = call(address, "/search", {"query": "x", "version": "0123abcd"})
    assert status == 404
    assert version in problem["detail"]


def test_aliases_versions_and_reports_are_told(served: Served, address: str) -> None:
    version = publish.current(served.root, "cats1")
    told = call(address, "/aliases")[1]
    assert (told["default"], told["aliases"]["cats1"]["current"]) == ("cats1", version)
    (facts,) = call(address, "/versions")[1]["versions"]
    assert (facts["alias"], facts["version"], facts["state"], facts["num_rows"]) == ("cats1", version, "current", 300)
    status, report, kind = call(address, f"/reports/cats1/{version}")
    assert (status, kind.partition(";")[0]) == (200, "text/html")
    assert "cats1" in report
    assert call(address, "/reports/cats1/0123abcd")[0] == 404


def test_concurrent_callers_get_their_own_answers(address: str) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda q: call(address, "/search", {"query": q, "k": 1})[1], QUERIES * 8))
    expected = {q: call(address, "/search", {"query": q, "k": 1})[1]["hits"][0]["id"] for q in QUERIES}
    assert [a["hits"][0]["id"] for a in answers] == [expected[q] for q in QUERIES * 8]


def test_rerank_through_http_equals_rerank_offline(served: Served, address: str) -> None:
    hits = Retriever.open(served.root, "cats1").search(QUERIES[:1], 20)[0]
    expected = rerank(load_reranker(served.rerank), QUERIES[0], hits)[:5]
    _, answer, _ = call(address, "/search", {"query": QUERIES[0], "k": 5, "rerank": True})
    assert [h["id"] for h in answer["hits"]] == [h.passage.id for h in expected]
    assert [h["rerank_score"] for h in answer["hits"]] == pytest.approx([h.rerank_score for h in expected], abs=1e-4)


def test_answer_through_http_equals_answer_offline(served: Served, address: str) -> None:
    reader = load_reader(served.answer.reader, "fp32", "cpu")
    found = Retriever.open(served.root, "cats1").search(QUERIES[:2], 20)
    expected = [answer(reader, query, hits, 4)[:5] for query, hits in zip(QUERIES, found, strict=False)]
    _, one, _ = call(address, "/search", {"query": QUERIES[0], "k": 2, "answer": True})
    assert len(one["hits"]) == 2
    assert [a["text"] for a in one["answers"]] == [a.text for a in expected[0]]
    assert [a["passage"] for a in one["answers"]] == [found[0][a.passage].passage.id for a in expected[0]]
    assert [a["score"] for a in one["answers"]] == pytest.approx([a.score for a in expected[0]], abs=1e-4)
    assert one["complete"] is True
    assert set(one["took_ms"]) == {"receive", "encode", "search", "fetch", "answer", "total"}
    _, both, _ = call(address, "/search", {"queries": QUERIES[:2], "k": 2, "answer": True, "rerank": True})
    reranked = [rerank(load_reranker(served.rerank), q, h) for q, h in zip(QUERIES, found, strict=False)]
    expected = [answer(reader, query, hits, 4)[:5] for query, hits in zip(QUERIES, reranked, strict=False)]
    assert [[a["text"] for a in given] for given in both["results_answers"]] == [[a.text for a in e] for e in expected]


def test_what_does_not_fit_the_time_is_left_out_and_named(address: str) -> None:
    many = {
        "queries": [((query + " ") * 20)[:500] for query in QUERIES for _ in range(6)],
        "k": 3,
    }  # 960 pairs to rerank
    status, late, _ = call(address, "/search", {**many, "rerank": True, "answer": True, "budget_ms": 500})
    _, plain, _ = call(address, "/search", many)
    assert status == 200
    assert (late["complete"], late["skipped"]) == (False, ["rerank", "answer"])
    assert late["results"] == plain["results"]
    assert "results_answers" not in late


def test_passages_health_ready_docs_and_page(address: str) -> None:
    assert call(address, "/passages/p43")[1]["text"] == ROWS[43]["text"]
    assert call(address, "/health")[1] == {"status": "ok"}
    ready = call(address, "/ready")[1]
    assert ready["ready"] is True
    assert (ready["reranker"], ready["reader"]) == (True, True)
    assert ready["aliases"]["cats1"]["num_rows"] == 300
    assert {"/search", "/passages/{passage_id}", "/health", "/ready"} <= set(call(address, "/openapi.json")[1]["paths"])
    status, page, kind = call(address, "/")
    assert (status, kind.partition(";")[0]) == (200, "text/html")
    assert "<form" in page


def test_refusals_come_through_as_the_api_words_them(address: str) -> None:
    """`test_api` has the whole table; this is about what Serve makes of it."""
    for body, status, message in (({"query": "x", "k": 301}, 422, "at most 200"), (b"{", 422, "JSON")):
        found, problem, kind = call(address, "/search", body)
        assert (found, kind, problem["status"]) == (status, "application/problem+json", status)
        assert message in problem["detail"]


def test_unknown_passages_and_paths_are_404(address: str) -> None:
    for path in ("/passages/nope", "/passages/..%2F..%2Fetc%2Fpasswd", "/nowhere"):
        status, problem, _ = call(address, path)
        assert (status, problem["status"]) == (404, 404)


@pytest.fixture(scope="module")
def with_metadata(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root with the same passages and their metadata under two aliases, unsharded and in three shards."""
    folder = tmp_path_factory.mktemp("metadata")
    checkpoint = write_sentence_transformer(str(folder / "model"))
    build_root(folder, checkpoint, filtered.ROWS, filtered.METADATA, name="whole")
    return build_root(folder, checkpoint, filtered.ROWS, filtered.METADATA, name="sharded", num_shards=3, metric="l2")


@pytest.mark.parametrize("placement", ["together", "spread"])
def test_shards_and_filters_find_what_an_unsharded_brute_force_finds(
    served: Served, with_metadata: str, placement: str
) -> None:
    """Three L2 shards and one inner-product index of the same unit vectors: the same passages in the same order."""
    whole = Retriever.open(with_metadata, "whole")
    filters = [None, filtered.SOME, {"tags": "t2"}, {"year": {"lt": 1981}}, {"score": {"gt": 21.9}}, {"lang": "xx"}]
    config = served.whole.model_copy(update={"root": with_metadata, "index": IndexConfig(name="sharded")})
    with served.serving(config, placement=placement, aliases=["whole"]) as address:
        for content in filters:
            expected = filtered.by_brute_force(whole, content or {}, 8)
            for alias in ("sharded", "whole"):
                body = {"queries": filtered.QUERIES, "k": 8, "alias": alias, "filter": content}
                status, answer, _ = call(address, "/search", body)
                assert (status, answer["complete"]) == (200, True)
                assert [[hit["row"] for hit in hits] for hits in answer["results"]] == expected
        _, answer, _ = call(address, "/search", {"query": filtered.QUERIES[0], "k": 5})
        refused = [call(address, "/search", {"query": "x", **field}) for field in BAD]
    # |a - b|² = 2 - 2 a·b for unit vectors.
    inner = [2 * hit.score - 2 for hit in whole.search(filtered.QUERIES[:1], 5)[0]]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(inner, abs=1e-4)
    for (status, problem, kind), told in zip(refused, TOLD, strict=True):
        assert (status, kind) == (422, "application/problem+json")
        assert told in problem["detail"]


def test_what_keeps_a_deployment_from_starting_is_told_as_its_replica_raised_it(served: Served, tmp_path: Path) -> None:
    config = Path(write_cross_encoder(str(tmp_path / "model"))) / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "num_hidden_layers": told["num_hidden_layers"] + 1}))
    with (
        pytest.raises(CheckpointError, match="the application did not start: Reranker: ") as caught,
        served.serving(served.whole, {"rerank": RerankConfig(checkpoint=str(config.parent))}),
    ):
        pass
    assert str(tmp_path) in str(caught.value)
    from ray import serve

    assert not serve.status().applications


def test_too_many_callers_are_refused_by_the_api_and_not_by_serve(served: Served) -> None:
    with served.serving(served.whole, max_ongoing=1, max_queued=1, hold_ms=20) as address:
        ask_too_much(address)


def ask_too_much(address: str) -> None:
    """Have 48 callers ask at once, and once more when they are gone."""
    with ThreadPoolExecutor(48) as pool:
        found = list(pool.map(lambda i: call(address, "/search", {"queries": QUERIES * 5, "k": 50}), range(96)))
    assert {status for status, _, _ in found} == {200, 503}
    assert {kind for status, _, kind in found if status == 503} == {"application/problem+json"}
    assert call(address, "/search", {"query": QUERIES[0]})[0] == 200


def test_the_demo_asks_its_question_of_a_server_that_wants_a_key(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "free_port", lambda: served.port)
    settings = served.whole.serve.model_copy(update={"require_key": True})
    config = served.whole.model_copy(update={"serve": settings, "evaluate": EvaluateConfig()})
    jobs.demo(config, True, Progress(True))
    told = capsys.readouterr().out
    assert "How do I read a Parquet file" in told
    assert "[p" in told  # the hits' ids
    assert KeyFile(default_url(served.root)).read() == []


def test_serve_command_is_found_by_promote_and_stops_on_ctrl_c(served: Served, tmp_path: Path) -> None:
    config = served.job.config("whole", num_shards=1)
    port = str(jobs.free_port())
    # As users have it: without RAY_AUTH_MODE, Ray has a cluster that we start ask for the token in the home folder.
    alone = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")} | {"HOME": str(tmp_path)}
    limits = ("--set", "serve.max_ongoing=2", "--set", "serve.hold_ms=20")
    with subprocess.Popen(
        [PINAKES, "serve", config, "--set", "index.name=cats1", "--set", f"serve.port={port}", *limits],
        stderr=subprocess.PIPE, text=True, env=alone,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            assert any("curl -s" in line for line in lines), "the server never said that it serves"
            ask_too_much(
                f"http://127.0.0.1:{port}"
            )  # the door before Serve's proxy refuses, on the server's own cluster
            command = [
                PINAKES,
                "promote",
                "cats1",
                publish.current(served.root, "cats1"),
                "--root",
                served.root,
                "--json",
            ]
            done = subprocess.run(command, env=alone, check=True, capture_output=True, text=True)
            assert json.loads(done.stdout)["replicas"] == 1  # the server's cluster is found, by the word it left
            assert done.stderr == ""  # nothing of Ray's
        finally:
            process.send_signal(signal.SIGINT)
            told = process.communicate()[1]
    assert process.returncode == 0, told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("cpus", "replicas", "threads", "expected"),
    [(16, 1, None, 15), (16, (1, 4), None, 3), (2, 1, None, 1), (2, 8, None, 1), (1, 1, None, 1), (2, 1, 2, 2)],
)
def test_a_gateway_leaves_a_core_to_the_rest(
    cpus: int, replicas: Any, threads: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.serve import _num_threads
    from pipelines.config import ServeConfig

    monkeypatch.setattr("cluster.pools.largest_node_cpus", lambda: cpus)
    assert _num_threads(ServeConfig(replicas=replicas, threads=threads)) == expected
