"""Who may ask, how much and how often: keys and scopes, rate, room and size; and what no route ever sees."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cluster.access import Access, exposure
from cluster.api import build_api
from cluster.telemetry import Metrics, Tracer
from pipelines.access_keys import KeyFile
from pipelines.config import ServeConfig
from pipelines.errors import ConfigError
from tests.local_backend import LocalBackend


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(str(tmp_path / "keys.json"))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# Who may ask


@pytest.fixture
def keyed(local_root: str, file: KeyFile) -> Callable[..., TestClient]:
    def make(**config: Any) -> TestClient:
        backend = LocalBackend(
            local_root, ["cats"], ServeConfig(**{"access_log": False, "require_key": True, **config})
        )
        return TestClient(build_api(lambda: backend, backend.config, file), raise_server_exceptions=False)

    return make


def test_only_keys_of_the_scope_may_search(keyed: Callable[..., TestClient], file: KeyFile) -> None:
    search, admin = file.create("a")[0], file.create("b", ["admin"])[0]
    expired, record = file.create("c", days=1)
    content = json.loads(Path(file.path).read_text())
    content["keys"][2]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    Path(file.path).write_text(json.dumps(content))
    client = keyed()

    def ask(**headers: str) -> tuple[int, str]:
        response = client.post("/search", json={"query": "x"}, headers=headers)
        assert (response.status_code == 401) == ("www-authenticate" in response.headers)
        return response.status_code, response.json().get("detail", "")

    assert ask(**bearer(search))[0] == 200
    assert ask(**{"X-Api-Key": search})[0] == 200
    assert ask(Authorization=f"bearer  {search}")[0] == 200
    assert ask() == (401, "send a key: Authorization: Bearer KEY, or X-Api-Key: KEY")
    assert ask(**bearer(search[:-1] + "~"))[1] == "the key is not known here"
    assert ask(**bearer(expired)) == (401, f"the key {record.id} has expired")
    assert ask(Authorization=f"Basic {search}")[0] == 401
    assert ask(**bearer(admin))[0] == 403


def test_without_a_key_only_what_tells_nothing_is_open(keyed: Callable[..., TestClient], file: KeyFile) -> None:
    key, _ = file.create("a")
    client = keyed()
    for path in ("/", "/health", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert client.get("/ready").json() == {"ready": True}
    assert "aliases" in client.get("/ready", headers=bearer(key)).json()
    for path in (
        "/aliases",
        "/versions",
        "/metrics",
        "/passages/p1",
        "/reports/cats/x",
        "/nowhere",
        "/%2e/",
        "/health/",
    ):
        assert client.get(path).status_code == 401, path
    assert client.get("/metrics", headers=bearer(file.create("b", ["admin"])[0])).status_code == 401  # not known yet


def test_a_server_learns_of_new_and_revoked_keys(keyed: Callable[..., TestClient], file: KeyFile) -> None:
    gone, record = file.create("a")
    client = keyed()
    with client:
        assert client.get("/aliases", headers=bearer(gone)).status_code == 200
        file.revoke(record.id)
        new = file.create("b")[0]
        ring = access_of(client).keys
        assert ring is not None
        ring.refresh_seconds = 0.0
        assert [client.get("/aliases", headers=bearer(key)).status_code for key in (gone, new)] == [401, 200]


def access_of(client: TestClient) -> Access:
    """Return the middleware of a client's application."""
    layer: Any = client.app
    layer = layer.middleware_stack
    while not isinstance(layer, Access):
        layer = layer.app
    return layer


def test_an_application_that_wants_keys_needs_their_file() -> None:
    with pytest.raises(ConfigError, match="no file of API keys"):
        build_api(lambda: pytest.fail("not asked"), ServeConfig(require_key=True))


@pytest.mark.parametrize(
    ("host", "require_key", "warned"),
    [("127.0.0.1", False, False), ("localhost", False, False), ("::1", False, False), ("0.0.0.0", False, True),
     ("10.1.2.3", False, True), ("search.example", False, True), ("0.0.0.0", True, False)],
)  # fmt: skip
def test_an_open_port_without_keys_is_warned_of(host: str, require_key: bool, warned: bool) -> None:
    told = exposure(ServeConfig(host=host, require_key=require_key))
    assert (told is not None) is warned
    assert told is None or ("pinakes keys create" in told and host in told)


# How much and how often


def test_the_rate_is_each_keys_own_and_counts_queries(keyed: Callable[..., TestClient], file: KeyFile) -> None:
    greedy, modest = bearer(file.create("a")[0]), bearer(file.create("b")[0])
    client = keyed(rate_per_second=0.001, rate_burst=4, hold_ms=0)
    assert client.post("/search", json={"queries": ["x"] * 3}, headers=greedy).status_code == 200
    assert client.post("/search/batch", json={"queries": ["x"] * 3}, headers=greedy).status_code == 200
    refused = client.post("/search", json={"query": "x"}, headers=greedy)
    assert (refused.status_code, int(refused.headers["retry-after"])) == (429, 3000)
    assert client.post("/search", json={"query": "x"}, headers=modest).status_code == 200
    assert client.get("/ready", headers=greedy).status_code == 200
    assert str(429) in client.get("/openapi.json").json()["paths"]["/search"]["post"]["responses"]


def test_bodies_have_a_limit_announced_or_not(local_root: str) -> None:
    backend = LocalBackend(local_root, ["cats"], ServeConfig(access_log=False, max_body_bytes=2000))
    client = TestClient(build_api(lambda: backend, backend.config))
    headers = {"Content-Type": "application/json"}
    large = json.dumps({"query": "x" * 3000}).encode()
    assert client.post("/search", content=large, headers=headers).status_code == 413
    assert (
        client.post("/search", content=(large[i : i + 500] for i in range(0, 4000, 500)), headers=headers).status_code
        == 413
    )
    assert client.post("/search", content=iter([b'{"query":', b'"x"}']), headers=headers).status_code == 200


# The middleware around any application


async def asked(app: Any, scope: dict[str, Any] | None = None, messages: list[dict[str, Any]] | None = None) -> Any:
    """Send one request to an ASGI application; return (status, headers, body), status 0 when nothing was answered."""
    sent: list[Any] = []
    waiting = list(messages or [{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    base = {"type": "http", "method": "GET", "path": "/x", "headers": [], "client": ("10.0.0.1", 1)}
    await app({**base, **(scope or {})}, receive, send)
    if not sent:
        return 0, {}, b""
    names = [name for name, _ in sent[0]["headers"]]
    assert len(set(names)) == len(names)
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


async def fine(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"fine"})


def test_a_caller_that_goes_away_is_forgotten() -> None:
    post = {"method": "POST", "headers": [(b"content-type", b"application/json")]}

    async def leave() -> None:
        metrics = Metrics()
        app = Access(fine, ServeConfig(access_log=False), None, metrics)
        partly = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
        assert (await asked(app, post, partly))[0] == 0
        assert app.room.working == 0
        assert b'status="499"' in metrics.page({"versions": []})

    asyncio.run(leave())


def test_batches_let_in_together_are_refused_once_the_caller_is_in_debt() -> None:
    answered = asyncio.Event()

    async def batch(scope: Any, receive: Any, send: Any) -> None:
        await answered.wait()
        scope["pinakes"].charge(100)
        await fine(scope, receive, send)

    async def crowd() -> None:
        config = ServeConfig(access_log=False, hold_ms=0, rate_per_second=1, rate_burst=5)
        app = Access(batch, config, None, Metrics())
        tasks = [asyncio.create_task(asked(app)) for _ in range(5)]
        while app.room.working < 5:
            await asyncio.sleep(0)
        answered.set()
        answers = [await task for task in tasks]
        assert [status for status, _, _ in answers] == [200] + [429] * 4
        assert int(answers[-1][1][b"retry-after"]) > 90

    asyncio.run(crowd())


def test_an_answer_that_breaks_off_is_cut_and_not_passed_off_as_whole() -> None:
    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("broken")

    app = Access(half, ServeConfig(access_log=False), None, Metrics())
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(asked(app))
    assert app.room.working == 0


def test_nothing_that_callers_think_up_grows_the_metrics() -> None:
    metrics = Metrics()
    app = Access(fine, ServeConfig(access_log=False), None, metrics)

    async def ask() -> None:
        for i in range(50):
            await asked(app, {"method": f"ODD{i}", "path": f"/{i}", "headers": [(b"x-request-id", b"%d" % i)]})

    asyncio.run(ask())
    lines = [line for line in metrics.page({"versions": []}).decode().splitlines() if "requests_total{" in line]
    assert len(lines) == 1
    assert 'method="other"' in lines[0]


def test_a_length_beyond_all_numbers_is_too_large() -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"9" * 5000)]
    app = Access(fine, ServeConfig(access_log=False), None, Metrics())
    status, _, body = asyncio.run(asked(app, {"method": "POST", "headers": headers}))
    assert (status, json.loads(body)["type"]) == (413, "/docs#problem-413")


def test_other_protocols_pass() -> None:
    seen: list[str] = []

    async def lifespan(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def run() -> None:
        await Access(lifespan, ServeConfig(), None, Metrics())({"type": "lifespan"}, None, None)  # type: ignore[arg-type]

    asyncio.run(run())
    assert seen == ["lifespan"]


# Traces


def test_spans_tell_of_requests_and_stages(local_root: str) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    backend = LocalBackend(local_root, ["cats"], ServeConfig(access_log=False))
    client = TestClient(build_api(lambda: backend, backend.config))
    client.get("/health")
    access_of(client).tracer = Tracer(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.post("/search", json={"query": "a private matter"}, headers={"traceparent": parent})
    spans = {span.name: span for span in kept.get_finished_spans()}
    request = spans["POST /search"]
    assert f"{request.context.trace_id:032x}" == parent.split("-")[1]
    assert request.attributes["http.response.status_code"] == 200
    assert {"encode", "search", "fetch"} <= set(spans)
    assert spans["encode"].parent.span_id == request.context.span_id
    assert request.start_time <= spans["encode"].start_time <= spans["fetch"].end_time
    assert "private" not in json.dumps([str(span.attributes) for span in spans.values()])


@pytest.mark.parametrize(
    ("environment", "traced"),
    [({}, False), ({"OTEL_TRACES_EXPORTER": "none"}, False), ({"OTEL_TRACES_EXPORTER": "console"}, True),
     ({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}, False)],
)  # fmt: skip
def test_there_are_traces_only_where_they_are_configured(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], traced: bool
) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (Tracer.from_environment() is not None) is traced
