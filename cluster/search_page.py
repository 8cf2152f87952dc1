"""Put the search page together: one document that needs nothing else, and the policy that lets nothing else run in it.

Its parts lie in `cluster/page`. A browser gets them as one response, so that the page works wherever the API is mounted
and without the internet; the policy names its style and its script by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PARTS = Path(__file__).with_name("page")
_SCRIPTS = ("search.js", "results.js", "compare.js", "page.js")


@dataclass(frozen=True, slots=True)
class SearchPage:
    """html: the document, UTF-8. policy: the Content-Security-Policy to send it with."""

    html: bytes
    policy: str


@cache
def search_page() -> SearchPage:
    """Return the search page, read from its parts once."""
    style = _read("style.css")
    script = "\n".join(_read(name) for name in _SCRIPTS)
    shell = _read("page.html")
    page = shell.replace("<style></style>", f"<style>{style}</style>").replace(
        "<script></script>", f"<script>{script}</script>"
    )
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return SearchPage(page.encode(), policy)


def _read(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
