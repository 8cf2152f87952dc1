"""What stands behind the search page in its tests: a Backend that answers by script, and the browser that asks.

`ScriptedBackend` keeps the contract of `cluster.api.Backend` and runs under the real API, so that the page meets the
real routes, problems and headers; words in a query make it fail, wait or leave something out. `Page` is what a user
does in a real headless Chromium.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.api import SearchRequest
from pipelines.config import ServeConfig
from pipelines.errors import ArtifactError, BusyError

WAIT_SECONDS = 60
HOSTILE = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'
LEAVES = "acacia leaves"
PASSAGES = [
    (
        "zoo.feed",
        "zoo.feed",
        "zoo.feed(animal, food='hay')\nGive an animal its food.\n\nAnimals that eat twice are noted.",
    ),
    ("zoo.Cage.open", "zoo.Cage.open", "zoo.Cage.open(key)\nOpen the door of a cage."),
    ("hostile", HOSTILE, f"A passage about animals that holds markup: {HOSTILE} & more."),
    ("zoo.groom", "zoo.groom", "zoo.groom(animal)\nBrush one animal."),
    ("hay/1", "حديقة الحيوان", "حديقة الحيوان مكان تعرض فيه الحيوانات (zoo) للجمهور."),
    ("giraffe", "🦒 Giraffe", f"🦒🦒 The giraffe eats {LEAVES} all day. " + "It is tall and never in a hurry. " * 40),
]
FACTS = {
    "num_rows": len(PASSAGES),
    "dim": 8,
    "factory": "Flat",
    "encoder": "mini",
    "metric": "ip",
    "num_shards": 3,
    "recall": {"k": 10, "value": 0.98765},
    "search_params": {},
    "created": "2026-01-02T03:04:05+00:00",
}
TOOK = {"encode": 3.25, "search": 0.5, "fetch": 0.25, "rerank": 0.0, "total": 4.0}


class ScriptedBackend:
    """Rank by shared words and keep what was asked; version v2 of `demo` ranks a little differently from v1."""

    def __init__(self) -> None:
        self.config = ServeConfig(access_log=False)
        self.released = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.aliases: dict[str, list[str]] = {"demo": ["v1", "v2"], "other": ["w1"]}
        self.current = {"demo": "v1", "other": "w1"}
        self.stages = {"reranker": True, "reader": True}
        self.num_unready = 0
        self.released.clear()

    async def catalogue(self) -> dict[str, Any]:
        if self.num_unready:
            self.num_unready -= 1
            raise BusyError("the versions are being loaded")
        states = {alias: {"current": self.current[alias], "previous": None} for alias in self.aliases}
        versions = [
            {"alias": alias, "version": v, "state": "current" if v == self.current[alias] else "pinned", **FACTS}
            for alias, known in self.aliases.items()
            for v in known
        ]
        return {"default": next(iter(states)), "stages": self.stages, "aliases": states, "versions": versions}

    async def search(self, request: SearchRequest, deadline: float) -> dict[str, Any]:
        self.asked.append(request.model_dump(exclude_unset=True))
        words = set((request.query or "").lower().split())
        while "slow" in words and not self.released.is_set():
            await asyncio.sleep(0.01)
        alias = request.alias or "demo"
        version = request.version or self.current[alias]
        self._fail(words, version)
        found = [] if "nothing" in words else self._ranked(words, version)[: request.k]
        hits = [self._hit(row, words, request.rerank) for row in found]
        if version == "v2":  # where a passage was mended
            hits = [{**hit, "text": hit["text"] + " Mind it."} if hit["row"] == 1 else hit for hit in hits]
        content = {
            "alias": alias,
            "version": version,
            "encoder": "mini",
            "took_ms": TOOK,
            "complete": True,
            "hits": hits,
        }
        if request.answer and "late" not in words:
            content["answers"] = self._answers(words)
        return {**content, **self._gaps(words)}

    @staticmethod
    def _fail(words: set[str], version: str) -> None:
        if "broken" in words or ("halved" in words and version == "v2"):
            raise ArtifactError(f"shard-000 fails its checksum {HOSTILE}")
        if "busy" in words:
            raise BusyError("too many searches at once", retry_seconds=1)
        if "crash" in words:
            raise RuntimeError("a secret of the server")

    @staticmethod
    def _gaps(words: set[str]) -> dict[str, Any]:
        if "late" in words:
            return {"complete": False, "skipped": ["rerank", "answer"]}
        if "partial" in words:
            return {"complete": False, "missing_shards": [0, 2]}
        return {}

    def _ranked(self, words: set[str], version: str) -> list[int]:
        first = sorted(range(len(PASSAGES)), key=lambda row: (-self._score(words, row), row))
        if version != "v2":
            return first
        return [first[1], first[0], first[2], first[5], first[3], first[4]]

    @staticmethod
    def _score(words: set[str], row: int) -> float:
        telling = [word for word in words if len(word) > 2]
        return sum(PASSAGES[row][2].lower().count(word) for word in telling) / 10

    def _hit(self, row: int, words: set[str], rerank: bool) -> dict[str, Any]:
        name, title, text = PASSAGES[row]
        score = self._score(words, row)
        reranked = {"rerank_score": 10 * score} if rerank else {}
        answers = {"answers": ["hay", "<b>oats</b>"], "metadata": {"year": 1999}} if row == 0 else {}
        return {"row": row, "score": score, **reranked, "id": name, "title": title, "text": text, **answers}

    @staticmethod
    def _answers(words: set[str]) -> list[dict[str, Any]]:
        if "nothing" in words:
            return []
        start = PASSAGES[5][2].index(LEAVES)  # Python counts code points, as the API does
        best = {"text": f"{LEAVES} {HOSTILE}", "score": 2.0, "passage": "giraffe"}
        return [{**best, "start": start, "end": start + len(LEAVES)}, {"text": "oats", "score": 1.0}]

    async def passage(self, passage_id: str, alias: str | None, version: str | None) -> dict[str, Any]:
        raise ArtifactError(f"there is no passage {passage_id!r}")

    async def report(self, alias: str, version: str) -> bytes:
        return f"<!doctype html><title>Report of {alias} {version}</title><h1>{version}</h1>".encode()

    async def promote(self, alias: str, version: str, force: bool) -> dict[str, Any]:
        self.current[alias] = version
        return {"current": version, "previous": None}

    async def rollback(self, alias: str) -> dict[str, Any]:
        return await self.promote(alias, self.aliases[alias][0], False)


class Page:
    """What a user does with the page, and what they then see."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, query: str = "") -> None:
        self.driver.get(f"{self.url}/{query}")
        self.until(lambda: self.text("#about"))
        if "q=" in query:
            self.settle()

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((n) => n.innerText)", selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.text("body")
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait for the end of a search."""
        told = (
            "return document.getElementById('main').ariaBusy === 'false' && document.getElementById('main').innerText"
        )
        self.until(lambda: self.run(told))

    def press(self, *keys: str) -> None:
        """Type where the focus is, as a user would."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def search(self, query: str) -> None:
        box = self.one("#q")
        box.clear()
        box.send_keys(query, "\ue007")  # Enter
        self.settle()

    def choose(self, selector: str, value: str) -> None:
        self.one(f"{selector} option[value='{value}']").click()
        self.settle()

    def focused(self) -> str:
        return self.run("return document.activeElement.id || document.activeElement.ariaLabel")

    @contextmanager
    def emulating(self, command: str, on: dict[str, Any], off: str | dict[str, Any]) -> Iterator[None]:
        """Run with a setting of Chromium's own: a phone's screen, a network that is down."""
        self.driver.execute_cdp_cmd(command, on)
        try:
            yield
        finally:
            back = (off, {}) if isinstance(off, str) else (command, off)
            self.driver.execute_cdp_cmd(*back)

    def on_a_phone(self) -> Any:
        screen = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
        name = "DeviceMetricsOverride"
        return self.emulating(f"Emulation.set{name}", screen, f"Emulation.clear{name}")

    def offline(self) -> Any:
        down = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        up = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        return self.emulating("Network.emulateNetworkConditions", down, up)


@contextmanager
def chromium(folder: Path) -> Iterator[Any]:
    """Start a headless Chromium that keeps what it loads and prints; skip the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, chromedriver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not chromedriver:
        pytest.skip("needs Chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync", "lang=en"]
    flags += ["disable-background-networking", "disable-component-update", "disable-dev-shm-usage"]
    for flag in [*flags, f"user-data-dir={folder / 'profile'}", "window-size=1200,900"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    started.downloads = folder / "downloads"
    try:
        yield started
    finally:
        started.quit()


@contextmanager
def watched(driver: Any, url: str) -> Iterator[Page]:
    """Give the page, then check that it asked its own server alone and that nothing was at fault with it."""
    for log in ("browser", "performance"):
        driver.get_log(log)  # forget what an earlier test left
    yield Page(driver, url)
    driver.execute_script("try { localStorage.clear(); sessionStorage.clear(); } catch {}")
    requested = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in requested if m["method"] == "Network.requestWillBeSent"]
    on_the_network = [url for url in urls if not url.startswith(("data:", "chrome:", "blob:"))]
    elsewhere = [url for url in on_the_network if urlsplit(url).hostname != "127.0.0.1"]
    assert on_the_network
    assert not elsewhere, elsewhere
    # Chromium itself reports a request that is refused; anything else on the console is the page's fault.
    console = [
        entry["message"] for entry in driver.get_log("browser") if "Failed to load resource" not in entry["message"]
    ]
    assert not console, console
