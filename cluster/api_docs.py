"""The OpenAPI document made true (every status that a route can answer with), and a page that shows it.

The page needs no script and nothing from the internet.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cluster.api_models import ProblemModel
from cluster.problems import MEDIA_TYPE, TITLES
from pipelines.config import ServeConfig

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{max-width:52rem;margin:2rem auto;padding:0 1.25rem;font:1rem/1.55 system-ui,sans-serif}"
    "code{font-family:ui-monospace,monospace;font-size:.9em}"
    "h2{margin-top:2.5rem}h3{margin:1.8rem 0 .2rem}p{margin:.3rem 0}table{border-collapse:collapse;margin:.5rem 0}"
    "td,th{text-align:left;vertical-align:top;padding:.2rem 1rem .2rem 0;border-bottom:1px solid #8884}"
)
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
DOCS_POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; frame-ancestors 'none'"

_CAUSES = {
    400: "The body is not JSON in UTF-8, or nested too deeply.",
    401: "This server wants a key, or does not know this one, or it has expired. Send `Authorization: Bearer KEY`.",
    403: "The key is good, but made for other things. `pinakes keys create --scope` makes one with another scope.",
    404: "No such path, alias, version or passage. GET /aliases lists what is served.",
    405: "The header `Allow` names the methods of this path.",
    408: "The body has to be there within half a minute.",
    409: "The version is worse than it must be. The detail says in what; `force` overrules a loss of quality.",
    413: "Send fewer queries at a time.",
    415: "Send the header `Content-Type: application/json`.",
    422: "The detail names the field, what is wrong and what would be right.",
    429: "This caller asks more than its share. The header `Retry-After` says how many seconds to wait.",
    500: "A fault of the server. Its log has the cause under the request's id (header `X-Request-Id`).",
    503: "Too many requests are under way, or the time did not suffice. Wait as `Retry-After` says, and ask again.",
}


def describe(app: FastAPI, config: ServeConfig) -> None:
    """Make `app.openapi()` tell every status that can come, and how keys are sent."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, config)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, config: ServeConfig) -> dict[str, Any]:
    told = get_openapi(title=app.title, version=app.version, description="Search a published index.", routes=app.routes)
    schemas = told.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["ProblemModel"] = ProblemModel.model_json_schema()
    _tell_limits(schemas, config)
    told["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    for path, method, operation in _operations(told):
        statuses = _statuses(path, method, operation, config)
        answer = operation["responses"]["200"]
        for content in answer.get("content", {}).values():
            if "$ref" in content.get("schema", {}):
                content["schema"] = {"$ref": content["schema"]["$ref"]}  # FastAPI adds the type of a stream beside it
        operation["responses"] = {
            "200": answer,
            **{str(status): _refusal(status) for status in sorted(statuses)},
        }
        if 403 in statuses:
            operation["security"] = [{"bearer": []}, {"header": []}]
    return told


def _tell_limits(schemas: dict[str, Any], config: ServeConfig) -> None:
    """Put this server's limits into the schemas of what it takes."""
    search, batch = schemas["SearchRequest"], schemas["BatchRequest"]
    search["oneOf"] = [{"required": ["query"]}, {"required": ["queries"]}]
    # Neither may be null in what callers are told, so that "required" means what it says.
    fields = {name: search["properties"][name] for name in ("query", "queries")}
    for name, field in fields.items():
        told = {key: value for key, value in field.items() if key != "anyOf"}
        search["properties"][name] = {**told, **next(s for s in field["anyOf"] if s.get("type") != "null")}
    text = {"type": "string", "minLength": 1, "maxLength": config.max_query_chars, "pattern": r"\S"}
    search["properties"]["query"] |= text
    search["properties"]["queries"] |= {"items": text, "maxItems": config.max_batch}
    batch["properties"]["queries"]["maxItems"] = config.max_stream
    for schema in (search, batch):
        schema["properties"]["k"]["maximum"] = config.max_k
    search["properties"]["k"]["description"] += f" Queries times `k` is at most {config.max_hits}."


def _operations(told: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in told["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _statuses(path: str, method: str, operation: dict[str, Any], config: ServeConfig) -> set[int]:
    """Return the refusals that a request to this operation can meet."""
    statuses = {500}
    if path != "/health":
        statuses |= {503}
    if path not in ("/health", "/ready"):
        statuses |= {403} if config.require_key or path.startswith("/admin/") else set()
        statuses |= {429} if config.rate_per_second else set()
    if config.require_key or config.admin_routes:
        statuses |= {401}  # a key that is sent has to be good, wherever it is sent
    if method == "post":
        statuses |= {400, 408, 413, 415, 422}
    if operation.get("parameters"):
        statuses |= {422}
    if path not in ("/health", "/ready", "/metrics", "/aliases", "/versions"):
        statuses |= {404}
    return statuses | ({409} if path.startswith("/admin/") else set())


def _refusal(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ProblemModel"}
    waits = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}} if status in (429, 503) else {}
    told = {"description": TITLES[status], "content": {MEDIA_TYPE: {"schema": schema}}}
    return {**told, "headers": waits} if waits else told


# The page


def docs_page(told: dict[str, Any]) -> str:
    """Return the document as a page."""
    operations = "".join(_operation(*operation) for operation in _operations(told))
    schemas = "".join(_schema(name, schema) for name, schema in told["components"]["schemas"].items())
    problems = "".join(
        f'<tr id="problem-{status}"><th scope="row">{status}</th><td>{title}</td><td>{_text(_CAUSES[status])}</td></tr>'
        for status, title in TITLES.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Pinakes: the API</title><style>{_STYLE}</style>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><h1>Pinakes: the API</h1>'
        '<p><a href="/">Search page</a> · <a href="/openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{operations}<h2>JSON</h2>{schemas}<h2>Refusals</h2>"
        f"<p>Every refusal is <code>{MEDIA_TYPE}</code>.</p><table>{problems}</table></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    takes = [f"<code>{escape(p['name'])}</code> ({p['in']})" for p in operation.get("parameters", [])]
    takes += [_kind(content["schema"]) for content in operation.get("requestBody", {}).get("content", {}).values()]
    gives = [
        f"{kind}{': ' + _kind(content['schema']) if '$ref' in content.get('schema', {}) else ''}"
        for kind, content in operation["responses"]["200"].get("content", {}).items()
    ]
    refuses = ", ".join(f'<a href="#problem-{s}">{s}</a>' for s in operation["responses"] if s != "200")
    return (
        f"<h3><code>{method.upper()} {escape(path)}</code></h3><p>{_text(operation.get('description', ''))}</p>"
        f"<p>{'Takes ' + ', '.join(takes) + '. ' if takes else ''}Gives {', '.join(gives)}. Refuses with {refuses}.</p>"
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(field)}</code></th><td>{_kind(told)}{", needed" if field in needed else ""}'
        f"</td><td>{_text(told.get('description', ''))}</td></tr>"
        for field, told in schema.get("properties", {}).items()
    )
    return f'<h3 id="{name}">{name}</h3><p>{_text(schema.get("description", ""))}</p><table>{rows}</table>'


def _kind(schema: dict[str, Any]) -> str:
    """Return what a schema's values are, in a word or two."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_kind(s) for s in schema["anyOf"] if s.get("type") != "null")
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    return str(schema.get("type", "anything"))


def _text(text: str) -> str:
    """Return text as HTML, with `code` between backticks."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
