"""The search page, in a real headless Chromium, against a small real backend on this machine."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

PAGE = Path(__file__).resolve().parents[1] / "cluster" / "search_page.html"
WAIT_SECONDS = 10
HOSTILE = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'

PASSAGES = [
    (
        "zoo.feed",
        "zoo.feed",
        "zoo.feed(animal, food='hay')\nGive an animal its food.\n\nAnimals that eat twice are noted.",
    ),
    ("zoo.Cage.open", "zoo.Cage.open", "zoo.Cage.open(key)\nOpen the door of a cage."),
    ("hostile", HOSTILE, f"A passage about animals that holds markup: {HOSTILE} & more."),
    ("zoo.groom", "zoo.groom", "zoo.groom(animal)\nBrush one animal."),
]


class FixtureBackend:
    """An in-memory stand-in for the search service: it ranks by shared words and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.num_aliases = 2
        self.reranker = self.reader = True
        self.num_unready = 0
        self.released = threading.Event()
        self.app = FastAPI()
        self.app.get("/", response_class=HTMLResponse)(self.page)
        self.app.get("/ready")(self.ready)
        self.app.post("/search", response_model=None)(self.search)

    def page(self) -> str:
        return PAGE.read_text("utf-8")

    def ready(self) -> JSONResponse:
        if self.num_unready:
            self.num_unready -= 1
            return JSONResponse({"ready": False, "aliases": {}})
        facts = {"version": "v1", "num_rows": len(PASSAGES), "encoder": "mini", "factory": "Flat", "dim": 8}
        names = ["demo", "other"][: self.num_aliases]
        stages = {"reranker": self.reranker, "reader": self.reader}
        return JSONResponse({"ready": True, **stages, "aliases": dict.fromkeys(names, facts)})

    async def search(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        words = set(body["query"].lower().split())
        if "broken" in words:
            problem = {"title": "Index is damaged", "detail": f"shard-000 fails its checksum {HOSTILE}", "status": 503}
            return JSONResponse(problem, status_code=503, media_type="application/problem+json")
        while "slow" in words and not self.released.is_set():
            await asyncio.sleep(0.01)
        if "crash" in words:
            return PlainTextResponse("Internal Server Error", status_code=500)
        ranked = [] if "nothing" in words else sorted(enumerate(PASSAGES), key=lambda p: -self.score(words, p[1][2]))
        hits = [self.hit(row, words, body["rerank"]) for row, _ in ranked[: body["k"]]]
        took = {"encode": 3.25, "search": 0.5, "fetch": 0.25, "rerank": 0.0, "total": 4.0}
        origin = {"version": "v1", "alias": body["alias"] or "demo", "encoder": "mini"}
        content = {**origin, "took_ms": took, "complete": not words & {"partial", "late"}, "hits": hits}
        if "late" in words:
            return JSONResponse({**content, "skipped": ["answer"]})
        if body["answer"]:
            read = [{"text": f"hay {HOSTILE}", "score": 2.0, "passage": "zoo.feed"}, {"text": "oats", "score": 1.0}]
            content["answers"] = read if hits else []
        return JSONResponse(content)

    @staticmethod
    def score(words: set[str], text: str) -> float:
        return sum(text.lower().count(word) for word in words) / 10

    def hit(self, row: int, words: set[str], rerank: bool) -> dict[str, Any]:
        name, title, text = PASSAGES[row]
        score = self.score(words, text)
        hit = {"row": row, "score": score, "rerank_score": 10 * score if rerank else None}
        answers = {"answers": ["hay", "<b>oats</b>"]} if row == 0 else {}
        return {**hit, "id": name, "title": title, "text": text, **answers}


class Page:
    """What a user does with the page, and what they then see."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, query: str = "") -> None:
        self.driver.get(self.url + query)
        self.until(lambda: self.text("#about"))

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def texts(self, selector: str) -> list[str]:
        return [node.text for node in self.all(selector)]

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.driver.page_source
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Type where the focus is, as a user would."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def search(self, query: str) -> None:
        box = self.one("#q")
        box.clear()
        box.send_keys(query, "\ue007")  # Enter
        self.until(lambda: self.one("#main").get_attribute("aria-busy") == "false" and self.text("main"))

    def focused(self) -> str:
        return self.driver.execute_script("return document.activeElement.id || document.activeElement.tagName")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FixtureBackend, str]]:
    backend = FixtureBackend()
    server = uvicorn.Server(uvicorn.Config(backend.app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield backend, f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(WAIT_SECONDS)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, chromedriver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not chromedriver:
        pytest.skip("needs Chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync", "lang=en"]
    flags += ["disable-background-networking", "disable-component-update", "disable-dev-shm-usage"]
    for flag in [*flags, f"user-data-dir={tmp_path_factory.mktemp('chromium')}", "window-size=1000,900"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield started
    started.quit()


@pytest.fixture
def backend(served: tuple[FixtureBackend, str]) -> Iterator[FixtureBackend]:
    backend, _ = served
    backend.asked, backend.num_aliases, backend.num_unready = [], 2, 0
    backend.reranker = backend.reader = True
    backend.released.clear()
    yield backend
    backend.released.set()


@pytest.fixture
def page(driver: Any, backend: FixtureBackend, served: tuple[FixtureBackend, str]) -> Iterator[Page]:
    for log in ("browser", "performance"):
        driver.get_log(log)  # forget what an earlier test left
    yield Page(driver, served[1])
    requested = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in requested if m["method"] == "Network.requestWillBeSent"]
    on_the_network = [url for url in urls if not url.startswith(("data:", "chrome:"))]
    assert {urlsplit(url).hostname for url in on_the_network} == {"127.0.0.1"}
    # Chromium itself reports a search that fails; anything else on the console is the page's fault.
    console = [entry["message"] for entry in driver.get_log("browser")]
    assert [message for message in console if "/search - Failed to load resource" not in message] == []


def test_typing_and_enter_shows_results(page: Page, backend: FixtureBackend) -> None:
    page.open()
    assert page.focused() == "q"
    page.press("feed an animal", "\ue007")
    page.until(lambda: page.all("#results li"))
    assert page.texts("#results h2")[0] == "zoo.feed"
    assert page.texts("#results .id")[0] == "zoo.feed · row 0"
    assert page.texts("#results .passage")[0] == PASSAGES[0][2]
    assert page.texts("#results .answers") == ["Answer: hay · <b>oats</b>"]
    assert page.text("#status") == "4 passages in 4.0 ms"
    assert page.text("#timing").startswith("encode 3.3 ms · search 0.5 ms · fetch 0.3 ms · demo → v1")
    assert backend.asked == [{"query": "feed an animal", "k": 10, "alias": "demo", "rerank": False, "answer": False}]


def test_the_query_words_are_marked(page: Page) -> None:
    page.open()
    page.search("how do I feed an animal")
    marked = {text.lower() for text in page.texts("#results mark")}
    assert marked == {"feed", "animal", "animals"}


def test_hostile_text_is_shown_as_text(page: Page) -> None:
    page.open("?q=" + quote(HOSTILE + " markup"))
    page.until(lambda: page.all("#results li"))
    assert page.one("#q").get_attribute("value") == HOSTILE + " markup"
    assert HOSTILE in page.texts("#results h2")
    assert any(HOSTILE in text for text in page.texts("#results .passage"))
    assert not page.all("main img, main script, #results b")
    assert page.driver.title != "owned"


def test_an_error_shows_its_detail(page: Page) -> None:
    page.open()
    page.search("feed")
    page.search("broken")
    assert "Index is damaged" in page.text("#notice")
    assert f"shard-000 fails its checksum {HOSTILE}" in page.text("#notice")
    assert page.one("#notice").get_attribute("role") == "alert"
    assert not page.all("#results li")
    assert not page.all("#notice img")
    page.search("feed")
    assert page.all("#results li")
    assert not page.one("#notice").is_displayed()


def test_an_unexplained_failure_and_a_lost_server_are_told(page: Page) -> None:
    page.open()
    page.search("crash")
    assert "HTTP 500" in page.text("#notice")
    conditions = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)
    try:
        page.search("animal")
        assert "No answer from the server" in page.text("#notice")
    finally:
        back = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", back)
    page.search("animal")
    assert page.all("#results li")


def test_empty_and_partial_answers_say_so(page: Page, backend: FixtureBackend) -> None:
    page.open()
    page.search("nothing")
    assert page.text("#status") == "No passages came back for this query."
    page.search("partial animal")
    assert "Incomplete answer" in page.text("#notice")
    assert page.all("#results li")
    page.search("   ")
    assert page.text("#status") == "Type a question to search."
    assert len(backend.asked) == 2


def test_a_newer_search_wins_over_a_slow_one(page: Page, backend: FixtureBackend) -> None:
    page.open()
    page.press("slow feed", "\ue007")
    page.until(lambda: len(backend.asked) == 1)
    assert page.one("#main").get_attribute("aria-busy") == "true"
    assert page.text("#status") == "Searching…"
    page.search("brush")
    assert page.texts("#results h2")[0] == "zoo.groom"
    backend.released.set()
    time.sleep(0.3)  # the slow answer would have come by now
    assert page.texts("#results h2")[0] == "zoo.groom"
    assert page.text("#status") == "4 passages in 4.0 ms"


def test_the_address_holds_the_search(page: Page, backend: FixtureBackend) -> None:
    page.open("?q=groom+animal&k=3&alias=other&rerank=1")
    page.until(lambda: page.all("#results li"))
    assert backend.asked == [{"query": "groom animal", "k": 3, "alias": "other", "rerank": True, "answer": False}]
    assert "rerank" in page.texts("#results .score")[0]
    page.search("open the cage")
    link = page.one("#permalink").get_attribute("href")
    assert link == page.driver.current_url
    assert parse_qs(urlsplit(link).query) == {"q": ["open the cage"], "k": ["3"], "alias": ["other"], "rerank": ["1"]}
    page.driver.back()
    page.until(lambda: page.one("#q").get_attribute("value") == "groom animal" and len(backend.asked) == 3)
    assert backend.asked[2] == backend.asked[0]


def test_the_answer_is_shown_with_its_source(page: Page, backend: FixtureBackend) -> None:
    page.open("?q=feed+animal&answer=1")
    page.until(lambda: page.all("#results li"))
    assert backend.asked[0]["answer"] is True
    assert page.text("#read strong") == f"hay {HOSTILE}"
    assert page.texts("#read p") == ["read in zoo.feed", "or: oats"]
    assert not page.all("#read img")
    page.search("nothing")
    assert page.text("#read") == "The reader found no answer in these passages."
    page.search("late animal")
    assert not page.one("#read").is_displayed()
    assert "no time left for answering" in page.text("#notice")
    assert page.all("#results li")


def test_keys_move_between_the_box_and_the_results(page: Page) -> None:
    page.open()
    page.search("animal")
    down, up, escape = "\ue015", "\ue013", "\ue00c"
    rank = "return document.activeElement.querySelector('.rank').textContent"
    page.press(down)
    assert page.driver.execute_script(rank) == "1."
    page.press(down)
    assert page.driver.execute_script(rank) == "2."
    page.press(up, up)
    assert page.focused() == "q"
    page.press(down)
    page.press(escape)
    assert page.focused() == "q"
    page.driver.execute_script("document.activeElement.blur()")
    page.press("/")
    assert page.focused() == "q"
    assert page.one("#q").get_attribute("value") == "animal"


def test_choices_appear_only_where_there_is_something_to_choose(page: Page, backend: FixtureBackend) -> None:
    page.open()
    assert page.one("#alias-choice").is_displayed()
    assert page.one("#rerank-choice").is_displayed()
    assert "demo: 4 passages · mini · 8 dimensions · Flat · v1" in page.text("#about")
    assert page.one("#answer-choice").is_displayed()
    backend.num_aliases, backend.reranker, backend.reader = 1, False, False
    page.open("?q=animal&rerank=1&answer=1")
    page.until(lambda: page.all("#results li"))
    assert not page.one("#alias-choice").is_displayed()
    assert not page.one("#rerank-choice").is_displayed()
    assert not page.one("#answer-choice").is_displayed()
    assert backend.asked == [{"query": "animal", "k": 10, "alias": None, "rerank": False, "answer": False}]


def test_a_service_that_is_starting_is_asked_again(page: Page, backend: FixtureBackend) -> None:
    backend.num_unready = 1
    page.open()
    assert page.text("#about") == "The service is not ready yet."
    page.until(lambda: page.text("#about").startswith("demo:"))


def test_every_control_has_a_name_and_the_status_is_announced(page: Page) -> None:
    page.open()
    page.search("animal")
    controls = [node for node in page.all("input, select, button, a") if node.is_displayed()]
    assert len(controls) >= 6
    assert all(node.accessible_name for node in controls)
    assert page.one("#status").get_attribute("aria-live") == "polite"
    assert page.one("form").aria_role == "search"
    assert page.one("#results").aria_role == "list"
    assert page.one("#results").accessible_name == "Search results"


def test_nothing_overflows_on_a_phone(page: Page) -> None:
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.open()
        page.search("animal")
        width = page.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 360
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_needs_nothing_but_itself() -> None:
    text = PAGE.read_text("utf-8")
    for forbidden in (
        "innerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "http://",
        "https://",
        "onclick=",
        'style="',
    ):
        assert forbidden not in text
