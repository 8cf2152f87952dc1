"""Requests of every kind, sensible and not, and what no answer to them may be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tests.test_filters import FILTERS

PROBLEM = "application/problem+json"
# What would tell of the server's inside: tracebacks, files, modules, addresses of objects.
LEAKS = re.compile(r"Traceback|site-packages|\.py\b|/usr/|/home/|/tmp/|0x[0-9a-f]{8,}|pydantic|ray::|Exception\b")


@dataclass(frozen=True)
class Asked:
    """A request. path: percent-encoded, with its query string."""

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS: dict[str, Any] = {
    "query": st.text(max_size=40) | JSON,
    "queries": st.lists(st.text(max_size=20), max_size=4) | JSON,
    "k": st.integers(-1, 60) | JSON,
    "alias": st.sampled_from(["cats", "dogs", "../cats", ""]) | JSON,
    "version": st.text("0123456789abcdef", max_size=16) | JSON,
    "rerank": st.booleans() | JSON,
    "answer": st.booleans() | JSON,
    "explain": st.booleans() | JSON,
    "budget_ms": st.integers(-1, 100_000) | JSON,
    "filter": FILTERS | JSON,
    "force": st.booleans(),
}
SENSIBLE = st.fixed_dictionaries(
    {"k": st.integers(1, 50)},
    optional={"explain": st.booleans(), "budget_ms": st.integers(1, 5000), "filter": FILTERS},
)
QUERY = st.text(min_size=1, max_size=40)
BODIES = (
    st.one_of(
        st.builds(lambda options, query: {**options, "query": query}, SENSIBLE, QUERY),
        st.builds(
            lambda options, texts: {**options, "queries": texts}, SENSIBLE, st.lists(QUERY, min_size=1, max_size=8)
        ),
        st.fixed_dictionaries({}, optional=FIELDS),
        JSON,
    ).map(lambda content: json.dumps(content).encode())
    | st.binary(max_size=60)
    | st.integers(1, 5000).map(lambda depth: b"[" * depth)
)
_TYPES = st.sampled_from(["application/json"] * 8 + ["text/plain", "", "application/json; charset=utf-16", "a/b+json"])
_SEGMENT = st.binary(max_size=12).map(lambda data: "".join(f"%{byte:02x}" for byte in data)) | st.sampled_from(
    ["p1", "cats", "..", "%2e%2e", "%2f", "search", "passages", "reports", "admin", "promote", "batch", "docs"]
)
_PATHS = st.one_of(
    st.sampled_from(["/", "/health", "/ready", "/aliases", "/versions", "/metrics", "/docs", "/openapi.json", "//"]),
    st.lists(_SEGMENT, max_size=4).map(lambda pieces: "/" + "/".join(pieces)),
    st.builds("/passages/{}?alias={}&version={}".format, _SEGMENT, _SEGMENT, _SEGMENT),
    st.builds("/reports/{}/{}".format, _SEGMENT, _SEGMENT),
)
_IDS = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=12)
# The last ones are for Ray Serve, which would obey them.
_STEERING = ["X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled", "X-Session-Id", "Serve-Multiplexed-Model-Id"]
_KEYS = st.fixed_dictionaries({}, optional={"X-Api-Key": _IDS, "Authorization": _IDS})
_HEADERS = st.builds(
    lambda keys, others: {**keys, **others},
    st.one_of(*[st.just({})] * 4, _KEYS),
    st.fixed_dictionaries({}, optional=dict.fromkeys(["X-Request-Id", "X-Forwarded-For", *_STEERING], _IDS)),
)
REQUESTS = st.one_of(
    st.builds(
        lambda path, body, kind, headers: Asked("POST", path, body, {**headers, "Content-Type": kind}),
        st.sampled_from(["/search", "/search", "/search/batch", "/admin/promote", "/admin/rollback"]),
        BODIES,
        _TYPES,
        _HEADERS,
    ),
    st.builds(
        Asked,
        st.sampled_from(["GET", "GET", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"]),
        _PATHS,
        st.none(),
        _HEADERS,
    ),
)


def operation(document: Mapping[str, Any], asked: Asked) -> dict[str, Any] | None:
    """Return what the OpenAPI document tells of the operation that a request means, or None."""
    path = asked.path.partition("?")[0]
    for template, methods in document["paths"].items():
        pattern = re.sub(r"\\{(\w+)\\}", lambda m: ".*" if m[1] == "passage_id" else "[^/]*", re.escape(template))
        if re.fullmatch(pattern, path) and (told := methods.get(asked.method.lower())):
            return dict(told)
    return None


def faults(
    asked: Asked, status: int, headers: Mapping[str, str], body: bytes, document: Mapping[str, Any]
) -> list[str]:
    """Return what is wrong with an answer; names of headers in lower case."""
    found = []
    known = operation(document, asked)
    if known is not None and str(status) not in known["responses"]:
        found.append(f"the status {status} is not documented")
    if status >= 500 and not (status == 503 and "retry-after" in headers):
        found.append(f"the server failed with {status}")
    if not headers.get("x-request-id"):
        found.append("the answer has no id")
    if status >= 400 and asked.method != "HEAD":
        if headers.get("content-type") != PROBLEM:
            found.append(f"a refusal of type {headers.get('content-type')}")
        elif set(told := json.loads(body)) != {"type", "title", "status", "detail", "instance"}:
            found.append(f"a problem with the members {sorted(told)}")
        elif told["status"] != status:
            found.append(f"a problem of status {told['status']} in a response of status {status}")
        # What was sent may be repeated, so only what was not sent can be a leak.
        sent = f"{asked.path} {(asked.body or b'').decode('utf-8', 'replace')} {dict(asked.headers)}"
        leaks = [m[0] for m in LEAKS.finditer(body.decode("utf-8", "replace")) if m[0] not in sent]
        found += [f"the refusal tells {leak!r}" for leak in leaks]
    return found
