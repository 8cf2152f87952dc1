"""What the command asks of a server elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.client import Client
from pipelines.errors import ConfigError

_STAGES = ("rerank", "answer")


def search(url: str, key: str | None, query: str, stages: Sequence[str], **options: Any) -> dict[str, Any]:
    """Return the server's JSON for one query, with the query. stages: those that shall follow retrieval there.

    options: fields of its SearchRequest; None leaves one to the server. Raises the errors of `pipelines.client`.
    """
    if unknown := sorted(set(stages) - set(_STAGES)):
        raise ConfigError(f"a server has no stage {unknown[0]!r}", expected=" or ".join(_STAGES))
    given = {name: value for name, value in options.items() if value is not None}
    content = {"query": query, **dict.fromkeys(stages, True), **given}
    with Client(url, key) as client:
        return {"query": query, **client.ask("POST", "/search", content)}
