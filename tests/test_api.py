"""The HTTP API over real tiny versions, in this process: what it gives, how it refuses, and what it never tells."""

from __future__ import annotations

import asyncio
import json
import logging
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from starlette.testclient import TestClient

from cluster.api import Backend, SearchRequest, build_api
from cluster.api_stream import GROUP
from pipelines import publish
from pipelines.access_keys import KeyFile
from pipelines.config import RerankConfig, ServeConfig
from pipelines.errors import BusyError, QualityError, StorageError
from pipelines.rerank import load_reranker, rerank
from pipelines.retrieve import Retriever, encoder_name
from tests.checkpoints import write_cross_encoder, write_sentence_transformer
from tests.fuzz import PROBLEM, REQUESTS, Asked, faults
from tests.local_backend import TEXTS, LocalBackend, build_root

SETTINGS: dict[str, Any] = {"access_log": False, "max_batch": 50, "max_query_chars": 500, "max_k": 50}


def served(backend: Backend, keys: KeyFile | None = None) -> TestClient:
    return TestClient(build_api(lambda: backend, backend.config, keys), raise_server_exceptions=False)


class Odd:
    """A backend that does `act` with each request before the real one answers; `act` may raise."""

    def __init__(self, backend: LocalBackend, act: Callable[[SearchRequest], None]) -> None:
        self.backend, self.config, self.act = backend, backend.config, act

    async def search(self, request: SearchRequest, deadline: float) -> dict[str, Any]:
        self.act(request)
        return await self.backend.search(request, deadline)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@pytest.fixture(scope="module")
def backend(local_root: str, tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    checkpoint = write_cross_encoder(str(tmp_path_factory.mktemp("reranker")))
    reranker = load_reranker(RerankConfig(checkpoint=checkpoint))
    return LocalBackend(local_root, ["cats"], ServeConfig(**SETTINGS), reranker)


@pytest.fixture(scope="module")
def client(backend: LocalBackend) -> TestClient:
    return served(backend)


def problem(response: Any, status: int) -> str:
    """Check that a response is a whole problem of this status; return its detail."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    told = response.json()
    assert set(told) == {"type", "title", "status", "detail", "instance"}
    assert (told["type"], told["status"]) == (f"/docs#problem-{status}", status)
    assert told["instance"] == f"urn:pinakes:request:{response.headers['x-request-id']}"
    return str(told["detail"])


@contextmanager
def logged() -> Iterator[list[dict[str, Any]]]:
    """Give the lines that are logged meanwhile."""
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("pinakes.access")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


# Searching


def test_one_query_a_batch_and_lines_agree_with_the_retriever(client: TestClient, local_root: str) -> None:
    queries = TEXTS[:5]
    expected = [[h.passage.id for h in hits] for hits in Retriever.open(local_root, "cats").search(queries, 7)]
    batch = client.post("/search", json={"queries": queries, "k": 7}).json()
    lines = client.post("/search/batch", json={"queries": queries, "k": 7}).text.splitlines()
    for i, query in enumerate(queries):
        one = client.post("/search", json={"query": query, "k": 7}).json()
        line = json.loads(lines[i])
        assert (line["index"], line["version"], line["complete"]) == (i, one["version"], True)
        assert one["hits"] == line["hits"] == batch["results"][i]
        assert [h["id"] for h in one["hits"]] == expected[i]
    assert set(batch["took_ms"]) == {"encode", "search", "fetch", "total"}


def test_a_version_may_be_named(client: TestClient, backend: LocalBackend) -> None:
    for _, version in backend.opened:
        answer = client.post("/search", json={"query": TEXTS[0], "version": version, "explain": True}).json()
        assert (answer["version"], answer["explain"]["depth"]) == (version, 10)
        assert client.get("/passages/p3", params={"version": version}).json()["text"] == TEXTS[3]
    unknown = client.post("/search", json={"query": "x", "alias": "cats", "version": "0" * 16})
    assert "no version" in problem(unknown, 404)


def test_lines_of_a_batch_are_explained_with_their_times(client: TestClient) -> None:
    for explain in (True, False):
        lines = client.post("/search/batch", json={"queries": TEXTS[:3], "explain": explain}).text.splitlines()
        told = [json.loads(line) for line in lines]
        assert [set(line.get("took_ms", {})) for line in told] == [
            {"encode", "search", "fetch", "total"} if explain else set()
        ] * 3
        assert all(("explain" in line) is explain for line in told)


def test_reranked_hits_carry_both_scores(client: TestClient, backend: LocalBackend, local_root: str) -> None:
    hits = Retriever.open(local_root, "cats").search([TEXTS[3]], 50)[0]
    expected = rerank(backend.reranker, TEXTS[3], hits, 50)[:5]
    found = client.post("/search", json={"query": TEXTS[3], "k": 5, "rerank": True}).json()["hits"]
    assert [h["id"] for h in found] == [h.passage.id for h in expected]
    assert [h["rerank_score"] for h in found] == pytest.approx([h.rerank_score for h in expected], abs=1e-4)


def test_a_batch_longer_than_a_group_keeps_its_order_and_its_errors_apart(client: TestClient) -> None:
    queries = [TEXTS[i % len(TEXTS)] for i in range(2 * GROUP + 5)]
    queries[1], queries[GROUP + 1] = "  ", "x" * 501
    response = client.post("/search/batch", json={"queries": queries, "k": 2, "rerank": True})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["index"] for line in lines] == list(range(len(queries)))
    bad = {i: line["error"]["detail"] for i, line in enumerate(lines) if "error" in line}
    assert bad == {
        1: "a query is blank; expected some text",
        GROUP + 1: "a query of 501 characters; expected at most 500",
    }
    assert all("rerank_score" in line["hits"][0] for i, line in enumerate(lines) if i not in bad)


def test_what_a_whole_batch_comes_to_is_its_status(client: TestClient) -> None:
    assert "no alias 'dogs'" in problem(client.post("/search/batch", json={"queries": ["x"] * 3, "alias": "dogs"}), 404)
    assert "k is 51" in problem(client.post("/search/batch", json={"queries": ["x"], "k": 51}), 422)
    assert "10001 queries" in problem(client.post("/search/batch", json={"queries": ["x"] * 10_001}), 422)
    assert "no reader" in problem(client.post("/search/batch", json={"queries": ["x", "y"], "answer": True}), 422)


def test_bad_queries_at_the_start_do_not_refuse_the_others(client: TestClient) -> None:
    lines = client.post("/search/batch", json={"queries": [" "] * GROUP + TEXTS[:1], "k": 1}).text.splitlines()
    assert [json.loads(line).get("error", {}).get("status") for line in lines] == [422] * GROUP + [None]
    assert "blank" in problem(client.post("/search/batch", json={"queries": [" "] * (GROUP + 1)}), 422)


def test_a_poisonous_query_costs_its_own_line_alone(backend: LocalBackend) -> None:
    def act(request: SearchRequest) -> None:
        if "poison" in (request.queries or []):
            raise RuntimeError("the tokeniser died")

    with logged() as told:
        answer = served(Odd(backend, act)).post("/search/batch", json={"queries": [TEXTS[0], "poison", TEXTS[1]]})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line.get("error", {}).get("status") for line in lines] == [None, 500, None]
    assert "tokeniser" not in answer.text
    assert any("the tokeniser died" in line.get("error", "") for line in told)


def test_a_batch_stays_on_the_version_it_began_with(local_root: str, backend: LocalBackend, tmp_path: Path) -> None:
    checkpoint = write_sentence_transformer(str(tmp_path / "model"))
    build_root(tmp_path, checkpoint, num_shards=2)
    root = build_root(tmp_path, checkpoint)
    mine = LocalBackend(root, ["cats"], backend.config)
    first = [v["version"] for v in asyncio.run(mine.catalogue())["versions"] if v["state"] == "current"]
    asked = []

    def act(request: SearchRequest) -> None:
        asked.append(request.version)
        if len(asked) == 2:
            publish.rollback(root, "cats")

    answer = served(Odd(mine, act)).post("/search/batch", json={"queries": TEXTS * 3})
    assert asked[:2] == [None, first[0]]
    assert {json.loads(line)["version"] for line in answer.text.splitlines()} == set(first)
    assert served(mine).post("/search", json={"query": "x"}).json()["version"] != first[0]


def test_a_server_too_busy_for_a_later_group_says_so_in_its_lines(backend: LocalBackend) -> None:
    groups = iter(range(100))

    def act(request: SearchRequest) -> None:
        if next(groups) == 1:
            raise BusyError("the queue is full", retry_seconds=3)

    lines = served(Odd(backend, act)).post("/search/batch", json={"queries": ["x"] * 120}).text.splitlines()
    statuses = [json.loads(line).get("error", {}).get("status") for line in lines]
    assert statuses == [None] * 50 + [503] * 50 + [None] * 20
    assert json.loads(lines[50])["error"]["retry_after"] == 3


# Everything else that is served


def test_aliases_versions_and_readiness(client: TestClient, backend: LocalBackend) -> None:
    told = client.get("/aliases").json()
    state = told["aliases"][told["default"]]
    versions = {v["state"]: v for v in state["versions"]}
    assert (versions["current"]["version"], versions["previous"]["version"]) == (state["current"], state["previous"])
    assert (versions["current"]["num_shards"], versions["previous"]["num_shards"]) == (2, 1)
    assert client.get("/versions").json()["versions"] == state["versions"]
    ready = client.get("/ready").json()
    assert (ready["ready"], ready["reranker"], ready["reader"]) == (True, True, False)
    assert ready["aliases"]["cats"]["version"] == state["current"]
    assert client.get("/health").json() == {"status": "ok"}


def test_no_answer_tells_where_a_model_lies(client: TestClient, local_root: str) -> None:
    checkpoint = publish.read_version(local_root, "cats")["encoder"]["checkpoint"]
    told = [client.get(path) for path in ("/ready", "/aliases", "/versions")]
    told.append(client.post("/search", json={"query": "cats", "explain": True}))
    for answer in told:
        assert (f'"encoder":"{Path(checkpoint).name}"' in answer.text, checkpoint in answer.text) == (True, False)
    names = {"a/b": "a/b", "s3://bucket/models/x/": "x", "./mine": "mine", "/srv/models/x": "x"}
    assert {given: encoder_name({"encoder": {"checkpoint": given}}) for given in names} == names


def test_a_report_may_run_nothing(client: TestClient, backend: LocalBackend) -> None:
    version = client.get("/ready").json()["aliases"]["cats"]["version"]
    shown = client.get(f"/reports/cats/{version}")
    assert shown.headers["content-type"].startswith("text/html")
    assert version in shown.text
    assert "sandbox" in shown.headers["content-security-policy"]
    assert "script-src" not in shown.headers["content-security-policy"]
    problem(client.get("/reports/dogs/abc"), 404)


def test_no_path_of_a_request_leads_anywhere(client: TestClient) -> None:
    for path in ("/passages/nope", "/passages/..%2F..%2Fetc%2Fpasswd", "/passages/%ED%A0%80", "/nowhere", "/search/"):
        problem(client.get(path), 404)
    for name in ("..%2Fcats", ".hidden", "a%2Fb", "x" * 101, "a b", "%00"):
        assert client.get(f"/reports/{name}/abc").status_code in (404, 422)
        problem(client.get(f"/passages/p3?alias={name}"), 422)
        problem(client.post("/search", json={"query": "x", "version": name}), 422)


def test_docs_describe_every_route_and_need_nothing(client: TestClient) -> None:
    page = client.get("/docs")
    told = client.get("/openapi.json").json()
    assert all(path in page.text for path in told["paths"])
    assert "http" not in page.text.replace("http-equiv", "").lower().split("<body")[0].split("<h1")[0]
    assert "<script" not in page.text
    for methods in told["paths"].values():
        for operation in methods.values():
            for status in operation["responses"]:
                assert status == "200" or f'id="problem-{status}"' in page.text


def test_the_page_comes_with_its_own_policy(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-security-policy"].count("sha256-") >= 2
    assert "unsafe" not in page.headers["content-security-policy"]


# Refusals


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"query": "x", "k": 51}, 422, "at most 50"),
        ({"query": "x", "k": 0}, 422, "k:"),
        ({}, 422, "either `query` or `queries`"),
        ({"query": "x", "queries": ["y"]}, 422, "exactly one"),
        ({"query": " "}, 422, "blank"),
        ({"queries": []}, 422, "queries"),
        ({"query": "x", "kk": 3}, 422, "kk"),
        ({"query": "x" * 501}, 422, "501 characters"),
        ({"queries": ["x"] * 51}, 422, "51 queries"),
        ({"query": "x", "budget_ms": 0}, 422, "budget_ms"),
        ({"query": "x", "answer": True}, 422, "no reader"),
        ({"query": "x", "alias": "dogs"}, 404, "no alias 'dogs'"),
        ({"query": "x", "filter": {"colour": 1}}, 422, "no metadata"),
        (b"{", 422, "JSON"),
        (b'{"query": "\\ud800"}', 422, "unicode"),
        (b'{"\\ud800": 1}', 422, ""),
        (b"[" * 100_000, 400, ""),
        (b'{"\xff": 1}', 400, ""),
        (b"", 422, ""),
        (b'{"query": "x", "k": 1e999}', 422, "k:"),
    ],
)
def test_bad_requests_are_explained(client: TestClient, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/search", content=content, headers={"Content-Type": "application/json"})
    assert message in problem(response, status)


@pytest.mark.parametrize("path", ["/search", "/search/batch"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"queries": [0] * 200_000}, "queries.0: "),
        ({str(i): i for i in range(100_000)}, "100000 fields"),
        ({"x" * 1_000_000: 1}, "body.xxx"),
    ],
)
def test_a_body_full_of_mistakes_is_refused_at_the_first(
    client: TestClient, path: str, body: dict[str, Any], message: str
) -> None:
    content = json.dumps(body)
    tracemalloc.start()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    told = problem(response, 422)
    assert message in told
    assert len(told) < 1000
    assert peak < 30 * len(content)


def test_hits_of_one_answer_are_limited_and_streams_search_fewer_at_a_time(local_root: str) -> None:
    config = ServeConfig(**{**SETTINGS, "max_hits": 100})
    asked: list[int] = []
    odd = Odd(LocalBackend(local_root, ["cats"], config), lambda request: asked.append(len(request.queries or [])))
    client = served(odd)
    assert client.post("/search", json={"queries": TEXTS[:5], "k": 20}).status_code == 200
    refused = problem(client.post("/search", json={"queries": TEXTS[:5], "k": 21}), 422)
    assert refused == "5 queries with k 21 ask for 105 hits; expected at most 100 in one answer"
    for k, sizes in ((50, [2, 2, 1]), (30, [3, 2])):
        asked.clear()
        lines = client.post("/search/batch", json={"queries": TEXTS[:5], "k": k}).text.splitlines()
        assert [len(json.loads(line)["hits"]) for line in lines] == [k] * 5
        assert asked == sizes


def test_other_methods_and_kinds_of_bodies_are_refused(client: TestClient) -> None:
    refused = client.delete("/search")
    assert (problem(refused, 405), refused.headers["allow"]) == ("Method Not Allowed", "POST")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        sent = client.post("/search", content=b'{"query": "x"}', headers={"Content-Type": kind})
        assert "application/json" in problem(sent, 415)
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json", "APPLICATION/JSON"):
        sent = client.post("/search", content=b'{"query": "x"}', headers={"Content-Type": kind})
        assert sent.status_code == 200


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("secret /srv/root/keys"), 500),
        (StorageError("cannot read x", where="secret"), 500),
        (QualityError("recall is 0.5", where="secret"), 409),
        (BusyError("the queue is full", retry_seconds=2.1, where="secret"), 503),
        (BusyError("more than your share", status=429, hint="secret"), 429),
    ],
)
def test_failures_tell_nothing_of_the_inside(backend: LocalBackend, error: Exception, status: int) -> None:
    def act(request: SearchRequest) -> None:
        raise error

    with logged() as lines:
        response = served(Odd(backend, act)).post("/search", json={"query": "x"})
    problem(response, status)
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == {503: "3", 429: "1"}.get(status)
    causes = [line for line in lines if line["event"] == "failure"]
    assert [("secret" in line["error"], line["request_id"]) for line in causes] == (
        [(True, response.headers["x-request-id"])] if status == 500 else []
    )


def test_every_answer_bears_the_same_headers(client: TestClient) -> None:
    for response in (client.get("/"), client.get("/health"), client.get("/nowhere"), client.post("/search", json={})):
        headers = response.headers
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert len(headers.get_list("x-request-id")) == 1


def test_request_ids_are_taken_if_they_are_harmless(client: TestClient) -> None:
    given = client.get("/health", headers={"X-Request-Id": "job-7.3:a"}).headers["x-request-id"]
    assert given == "job-7.3:a"
    for odd in ('a"b', "a b", "x" * 200, "-", ""):
        found = client.get("/health", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert (found != odd, len(found)) == (True, 32)


# Logs, metrics, admin


@pytest.mark.parametrize("told", [False, True])
def test_logs_hold_queries_only_when_asked_to(local_root: str, told: bool) -> None:
    config = ServeConfig(**{**SETTINGS, "access_log": True, "log_queries": told})
    with logged() as lines:
        client = served(LocalBackend(local_root, ["cats"], config))
        client.post("/search", json={"query": "a private matter", "k": 3}, headers={"X-Request-Id": "mine"})
        client.post("/search/batch", json={"queries": ["a private matter"] * 60, "k": 3})
    one, many = lines
    assert (one["request_id"], one["route"], one["status"], one["k"], one["num_queries"]) == (
        "mine",
        "/search",
        200,
        3,
        1,
    )
    assert (many["route"], many["num_queries"], many["version"]) == ("/search/batch", 60, one["version"])
    assert [len(line.get("queries", [])) for line in lines] == ([1, 60] if told else [0, 0])
    assert ("private" in json.dumps(lines)) is told


def test_metrics_count_what_happened(local_root: str) -> None:
    backend = LocalBackend(local_root, ["cats"], ServeConfig(**SETTINGS))
    client = served(backend)
    client.post("/search", json={"queries": TEXTS[:5]})
    client.get("/passages/p1")
    client.post("/search", json={"query": ""})
    client.get("/a/path/of/its/own")
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    version = client.get("/ready").json()["aliases"]["cats"]["version"]
    assert "pinakes_requests_in_flight" in page.text
    assert _value(page.text, "pinakes_queries_total", alias="cats", version=version) == 5
    assert _value(page.text, "pinakes_requests_total", route="/search", method="POST", status="200") == 1
    assert _value(page.text, "pinakes_requests_total", route="/search", method="POST", status="422") == 1
    assert _value(page.text, "pinakes_requests_total", route="/passages/{passage_id:path}", status="200") == 1
    assert _value(page.text, "pinakes_requests_total", route="none", status="404") == 1
    assert _value(page.text, "pinakes_refused_requests_total", reason="invalid") == 1
    assert _value(page.text, "pinakes_stage_seconds_count", stage="encode") == 1
    assert _value(page.text, "pinakes_version_info", version=version, state="current") == 1


def _value(page: str, name: str, **labels: str) -> float:
    """Return the value of the one series with these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    lines = [line for line in page.splitlines() if line.startswith(name + "{") and all(w in line for w in wanted)]
    assert len(lines) == 1, lines
    return float(lines[0].rpartition(" ")[2])


def test_admin_routes_are_there_for_admin_keys_alone(backend: LocalBackend, tmp_path: Path) -> None:
    problem(served(backend).post("/admin/promote", json={"alias": "cats", "version": "x"}), 404)
    root = build_root(tmp_path, write_sentence_transformer(str(tmp_path / "model")))
    build_root(tmp_path, str(tmp_path / "model"), num_shards=2)
    mine = LocalBackend(root, ["cats"], ServeConfig(**SETTINGS, admin_routes=True))
    file = KeyFile(str(tmp_path / "keys.json"))
    admin, search = file.create("boss", ["admin"])[0], file.create("reader")[0]
    client = served(mine, file)
    assert client.post("/search", json={"query": "x"}).status_code == 200  # searching stays open
    now = client.get("/aliases").json()["aliases"]["cats"]
    move = {"alias": "cats", "version": now["previous"]}
    problem(client.post("/admin/promote", json=move), 401)
    problem(client.post("/admin/promote", json=move, headers={"X-Api-Key": search}), 403)
    problem(client.post("/admin/promote", json={**move, "version": "../x"}, headers={"X-Api-Key": admin}), 422)
    moved = client.post("/admin/promote", json=move, headers={"X-Api-Key": admin}).json()
    assert (moved["current"], moved["previous"]) == (now["previous"], now["current"])
    back = client.post("/admin/rollback", json={"alias": "cats"}, headers={"Authorization": f"Bearer {admin}"}).json()
    assert back["current"] == now["current"]
    responses = client.get("/openapi.json").json()["paths"]["/admin/promote"]["post"]["responses"]
    assert {"200", "401", "403", "404", "409", "422"} <= set(responses)


# Anything at all


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=REQUESTS)
def test_any_request_gets_an_answer_that_the_document_tells_of(client: TestClient, asked: Asked) -> None:
    headers = {name.encode(): value.strip().encode("latin-1") for name, value in asked.headers.items()}
    response = client.request(asked.method, f"http://testserver{asked.path}", content=asked.body, headers=headers)
    app: Any = client.app
    assert faults(asked, response.status_code, response.headers, response.content, app.openapi()) == []


@pytest.mark.parametrize(
    ("body", "status", "kind", "fault"),
    [
        (b"{}", 500, PROBLEM, "failed with 500"),
        (b"{}", 418, PROBLEM, "not documented"),
        (b"{}", 422, PROBLEM, "members"),
        (b"oops", 422, "text/html", "of type text/html"),
        (b'{"type": "", "title": "", "status": 422, "detail": "in /usr/x.py", "instance": ""}', 422, PROBLEM, "/usr/"),
        (b'{"type": "", "title": "", "status": 404, "detail": "", "instance": ""}', 422, PROBLEM, "status 404"),
    ],
)
def test_the_judge_of_answers_sees_what_is_wrong(
    client: TestClient, body: bytes, status: int, kind: str, fault: str
) -> None:
    app: Any = client.app
    headers = {"content-type": kind, "x-request-id": "1"}
    assert any(fault in told for told in faults(Asked("POST", "/search"), status, headers, body, app.openapi()))
