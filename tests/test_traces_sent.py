"""Traces over OTLP: what a collector gets of a request, and that one which is not there hinders nothing."""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cluster.api import build_api
from cluster.jobs import free_port
from pipelines.config import ServeConfig
from tests.local_backend import LocalBackend
from tests.test_access import access_of

QUERY = "a private matter"


class Collector:
    """A collector on a port of this machine, that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        keep = self.requests.append

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                keep((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def spans(self) -> dict[str, Span]:
        return {
            span.name: span
            for _, request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def search(local_root: str) -> None:
    """Answer one search by an application that is traced as the environment says, and send what is left to send."""
    backend = LocalBackend(local_root, ["cats"], ServeConfig(access_log=False))
    client = TestClient(build_api(lambda: backend, backend.config))
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    assert client.post("/search", json={"query": QUERY}, headers=parent).status_code == 200
    tracer = access_of(client).tracer
    assert tracer is not None
    tracer.close()


def test_a_collector_gets_the_spans_of_a_request(
    local_root: str, collector: Collector, clean: pytest.MonkeyPatch
) -> None:
    clean.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    clean.setenv("OTEL_SERVICE_NAME", "the library")
    search(local_root)
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    request, encode = collector.spans["POST /search"], collector.spans["encode"]
    assert request.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert request.parent_span_id.hex() == "b7ad6b7169203331"
    assert (encode.parent_span_id, encode.trace_id) == (request.span_id, request.trace_id)
    facts = {fact.key: fact.value for fact in request.attributes}
    assert facts["http.response.status_code"].int_value == 200
    resource = collector.requests[0][1].resource_spans[0].resource
    assert {fact.key: fact.value.string_value for fact in resource.attributes}["service.name"] == "the library"
    assert not any(QUERY.encode() in request.SerializeToString() for _, request in collector.requests)


def test_a_collector_that_is_not_there_costs_no_answer(
    local_root: str, collector: Collector, clean: pytest.MonkeyPatch
) -> None:
    clean.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    clean.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    search(local_root)
    assert collector.requests == []
