"""What operators see of the API: Prometheus metrics, JSON log lines, and OpenTelemetry spans where they are configured.

Every replica counts for itself. Behind one port with several replicas a scrape reaches any one of them: the label
`replica` keeps their series apart.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_log = logging.getLogger("pinakes.access")
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one replica, in a registry of their own."""

    def __init__(self, replica: str = "") -> None:
        self.replica = replica or f"{socket.gethostname()}:{os.getpid()}"
        self.registry = CollectorRegistry()

        def make(kind: Any, name: str, told: str, *labels: str, **more: Any) -> Any:
            return kind(f"pinakes_{name}", told, (*labels, "replica"), registry=self.registry, **more)

        self._requests = make(Counter, "requests", "Requests answered.", "route", "method", "status")
        self._seconds = make(Histogram, "request_seconds", "Time to the last byte.", "route", buckets=_BUCKETS)
        self._stages = make(Histogram, "stage_seconds", "Time of a search's stages.", "stage", buckets=_BUCKETS)
        self._queries = make(Counter, "queries", "Queries answered.", "alias", "version")
        self._incomplete = make(Counter, "incomplete_answers", "Answers that lack a stage or a shard.", "alias")
        self._refused = make(Counter, "refused_requests", "Requests refused.", "reason")
        self._in_flight = make(Gauge, "requests_in_flight", "Requests that are worked on.")
        self._held = make(Gauge, "refusals_held", "Refusals that are held back.")
        self._version = make(
            Gauge, "version_info", "Versions loaded; state says which is current.", "alias", "version", "state"
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status), self.replica).inc()
        self._seconds.labels(route, self.replica).observe(seconds)

    def refused(self, reason: str, number: int = 1) -> None:
        self._refused.labels(reason, self.replica).inc(number)

    def watch(self, room: Any) -> None:
        """Tell, whenever somebody looks, how full the room (`cluster.admission`) is, and count whom it turns away."""
        room.refused = self.refused
        self._in_flight.labels(self.replica).set_function(lambda: room.working)
        self._held.labels(self.replica).set_function(lambda: room.held)

    def answer(self, answer: Mapping[str, Any], num_queries: int) -> None:
        """Count a SearchResponse."""
        self._queries.labels(answer["alias"], answer["version"], self.replica).inc(num_queries)
        if not answer.get("complete", True):
            self._incomplete.labels(answer["alias"], self.replica).inc()
        for stage, ms in answer["took_ms"].items():
            self._stages.labels(stage, self.replica).observe(ms / 1000)

    def page(self, catalogue: Mapping[str, Any]) -> bytes:
        """Return the metrics in Prometheus' text format."""
        self._version.clear()
        for version in catalogue["versions"]:
            self._version.labels(version["alias"], version["version"], version["state"], self.replica).set(1)
        return generate_latest(self.registry)


# Logs


def open_log() -> None:
    """Send the lines to stderr, unless the process has set the logger `pinakes.access` up otherwise.

    To the process's own stderr: Ray Serve's stand-in walks the stack for each line, which takes longer than an answer.
    """
    if not _log.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False


def log_line(event: str, facts: Mapping[str, Any], failure: BaseException | None = None) -> None:
    """Write one line of JSON: when, what, and its facts; a failure is told with its traceback."""
    level = logging.ERROR if failure else logging.INFO
    if not _log.isEnabledFor(level):
        return
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": logging.getLevelName(level)}
    if failure:
        import traceback

        facts = {**facts, "error": "".join(traceback.format_exception(failure))}
    _log.log(level, json.dumps({**line, "event": event, **facts}, default=str))


# Traces


class Tracer:
    """Spans of requests and of a search's stages, sent to where the standard OTEL_* variables say."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import propagate, trace

        self._provider = provider
        self._tracer, self._extract = provider.get_tracer("pinakes"), propagate.extract
        self._kind, self._within = trace.SpanKind, trace.set_span_in_context

    @classmethod
    def from_environment(cls) -> Tracer | None:
        """Return a tracer, or None where no exporter is configured (then tracing costs nothing)."""
        wanted = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
        endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        if not wanted and any(os.environ.get(name) for name in endpoints):
            wanted = "otlp"
        if wanted in ("", "none") or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return None
        try:
            return cls(_provider(wanted))
        except ImportError as error:
            _log.warning("no traces: %s; the extra `otel` brings what is missing", error)
            return None

    def close(self) -> None:
        """Send the spans that wait to be sent, and none after that."""
        self._provider.shutdown()

    def request(self, call: Any, method: str, headers: Mapping[str, str]) -> None:
        """Write the span of a finished request, and below it those of its stages (one after the other, as they ran)."""
        end = time.time_ns()
        start = end - int(call.seconds * 1e9)
        facts = {
            "http.request.method": method,
            "http.route": call.route,
            "http.response.status_code": call.status,
            "pinakes.request_id": call.request_id,
            **{f"pinakes.{k}": v for k, v in call.facts.items() if isinstance(v, str | int | float | bool)},
        }
        span = self._tracer.start_span(
            f"{method} {call.route}", self._extract(dict(headers)), self._kind.SERVER, facts, start_time=start
        )
        at, context = start, self._within(span)
        for stage, ms in call.facts.get("took_ms", {}).items():
            if stage != "total":
                child = self._tracer.start_span(stage, context, start_time=at)
                at += int(ms * 1e6)
                child.end(at)
        if call.status >= 500:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        span.end(end)


def _provider(exporter: str) -> Any:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "pinakes")})
    )
    if exporter == "console":
        provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=sys.stderr)))
    else:
        exporters = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")  # a package of its own
        provider.add_span_processor(BatchSpanProcessor(exporters.OTLPSpanExporter()))
    return provider
