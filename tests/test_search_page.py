"""The search page, in a real headless Chromium, over the real API and a Backend that answers by script."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from cluster.api import build_api
from cluster.search_page import search_page
from tests.local_backend import served
from tests.page_backend import HOSTILE, LEAVES, PASSAGES, Page, ScriptedBackend, chromium, watched

DOWN, UP, LEFT, RIGHT, ESCAPE, ENTER = "\ue015", "\ue013", "\ue012", "\ue014", "\ue00c", "\ue007"


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[ScriptedBackend, str]]:
    backend = ScriptedBackend()
    with served(build_api(lambda: backend, backend.config)) as url:
        yield backend, url


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def backend(scripted: tuple[ScriptedBackend, str]) -> Iterator[ScriptedBackend]:
    backend, _ = scripted
    backend.reset()
    yield backend
    backend.released.set()


@pytest.fixture
def page(driver: Any, backend: ScriptedBackend, scripted: tuple[ScriptedBackend, str]) -> Iterator[Page]:
    with watched(driver, scripted[1]) as page:
        yield page


def test_typing_and_enter_shows_results(page: Page, backend: ScriptedBackend) -> None:
    page.open()
    assert page.focused() == "q"
    page.press("feed an animal", ENTER)
    page.until(lambda: page.all("#results li"))
    assert page.texts("#results h2")[0] == "zoo.feed"
    assert page.texts("#results .id")[0] == "zoo.feed · row 0 · year 1999"
    assert page.texts("#results .passage")[0] == PASSAGES[0][2]
    assert page.texts("#results .answers") == ["Answer: hay · <b>oats</b>"]
    assert page.text("#status") == "6 passages in 4.0 ms"
    assert page.text("#results .origin").startswith("demo v1 · current · 6 passages · mini · 8 dimensions · Flat")
    assert "recall@10 0.988" in page.text("#results .origin")
    assert backend.asked == [{"query": "feed an animal", "k": 10, "alias": "demo"}]


def test_the_timing_bar_draws_each_stage_to_scale(page: Page) -> None:
    page.open("?q=feed")
    assert page.texts("#results figcaption span") == ["encode 3.3 ms", "search 0.5 ms", "fetch 0.3 ms"]
    pieces = page.run("return [...document.querySelectorAll('.bar i')].map((n) => [n.className, n.offsetWidth])")
    assert [name for name, _ in pieces] == ["encode", "search", "fetch"]
    widths = dict(pieces)
    assert widths["encode"] / widths["search"] == pytest.approx(3.25 / 0.5, rel=0.05)
    assert page.one(".bar").accessible_name == "Time by stage: encode 3.3 ms, search 0.5 ms, fetch 0.3 ms"


def test_the_query_words_are_marked(page: Page) -> None:
    page.open()
    page.search("how do I feed an animal")
    marked = {text.lower() for text in page.texts("#results mark")}
    assert marked == {"feed", "animal", "animals"}


@pytest.mark.parametrize(
    ("query", "text", "found"),
    [
        ("where is the 動物園", "上野動物園は東京にある", ["動物園"]),
        ("パンダはどこ", "上野のパンダは人気", ["パンダ"]),
        ("हिन्दी भाषा", "यह हिन्दी है।", ["हिन्दी"]),
        ("C++ (a|b) [x", "c++ and (a|b) ab", []),
        ("what are animals", "an animal, ANIMALS, animalistic", ["animal", "ANIMALS"]),
    ],
)
def test_words_are_found_in_any_script(page: Page, query: str, text: str, found: list[str]) -> None:
    page.open()
    script = "const p = termPattern(arguments[0]); return p ? [...arguments[1].matchAll(p)].map((m) => m[0]) : []"
    assert page.run(script, query, text) == found


def test_hostile_text_is_shown_as_text(page: Page, backend: ScriptedBackend) -> None:
    page.open(f"?q={quote(HOSTILE + ' markup')}&with=demo/v2&answer=1&filter={quote(json.dumps({HOSTILE: 1}))}")
    assert page.one("#q").get_attribute("value") == HOSTILE + " markup"
    assert page.texts("#results h2").count(HOSTILE) == 2
    assert any(HOSTILE in text for text in page.texts("#results .passage"))
    assert any(HOSTILE in text for text in page.texts("#results .read strong"))
    page.open(f"?q=feed&alias={quote(HOSTILE)}&version={quote(HOSTILE)}&with={quote(HOSTILE)}/{quote(HOSTILE)}")
    assert "alias" in page.text("#notice")
    assert not page.all("main img, main script, #results b:not([class]), form img")
    assert page.driver.title == "feed · Pinakes"


def test_other_scripts_keep_their_direction(page: Page) -> None:
    page.open("?q=zoo")
    directions = page.run(
        "return [...document.querySelectorAll('h2')].map((n) => [n.innerText, getComputedStyle(n).direction])"
    )
    assert dict(directions)[PASSAGES[4][1]] == "rtl"
    assert dict(directions)["zoo.feed"] == "ltr"


def test_a_refusal_shows_its_detail_and_the_next_step(page: Page) -> None:
    page.open()
    page.search("feed")
    page.search("broken")
    assert f"shard-000 fails its checksum {HOSTILE}" in page.text("#notice")
    assert "Choose an index and a version among those offered above." in page.text("#notice")
    assert page.one("#notice").get_attribute("role") == "alert"
    assert not page.all("#results .hit")
    assert not page.all("#notice img")
    page.search("feed")
    assert page.all("#results li")
    assert page.text("#notice") == ""
    page.open("?q=feed&k=5000")
    assert "Change what the message names" in page.text("#notice")


def test_an_unexplained_failure_and_a_lost_server_are_told(page: Page) -> None:
    page.open()
    page.search("crash")
    assert "secret" not in page.text("body")
    assert "Search again. If it happens again" in page.text("#notice")
    with page.offline():
        page.search("animal")
        assert "No answer from the server" in page.text("#notice")
    page.one("#notice button").click()
    page.until(lambda: page.all("#results li"))


def test_a_busy_server_is_asked_again_when_it_says_so(page: Page, backend: ScriptedBackend) -> None:
    page.open()
    page.search("busy feed")
    assert "too many searches at once" in page.text("#notice")
    assert "Search again in 1 second." in page.text("#notice")
    assert page.one("#notice button").accessible_name == "Search again"
    page.until(lambda: page.one("#notice button").is_enabled())
    page.one("#notice button").click()
    page.until(lambda: len(backend.asked) == 2)


def test_empty_and_partial_answers_say_so(page: Page, backend: ScriptedBackend) -> None:
    page.open()
    page.search("nothing")
    assert page.text("#status") == "No passages came back for this query."
    page.search("partial animal")
    assert "Shards 0 and 2 of 3 (counted from 0) did not answer in time" in page.text("#notice")
    assert page.all("#results li")
    page.search("late animal")
    assert "There was no time left for reranking and answering." in page.text("#notice")
    page.search("   ")
    assert page.text("#status") == "Type a question to search."
    assert len(backend.asked) == 3


def test_a_newer_search_wins_over_a_slow_one(page: Page, backend: ScriptedBackend) -> None:
    page.open()
    page.press("slow feed", ENTER)
    page.until(lambda: len(backend.asked) == 1)
    assert page.one("#main").get_attribute("aria-busy") == "true"
    assert page.text("#status") == "Searching…"
    page.search("brush")
    assert page.texts("#results h2")[0] == "zoo.groom"
    backend.released.set()
    time.sleep(0.3)  # the slow answer would have come by now
    assert page.texts("#results h2")[0] == "zoo.groom"


def test_the_address_holds_the_search(page: Page, backend: ScriptedBackend) -> None:
    page.open("?q=groom+animal&k=3&alias=demo&version=v2&rerank=1&budget=900&filter=%7B%22year%22%3A1999%7D")
    asked = {"query": "groom animal", "k": 3, "alias": "demo", "version": "v2", "rerank": True}
    assert backend.asked == [{**asked, "budget_ms": 900, "filter": {"year": 1999}}]
    assert "rerank" in page.texts("#results .score")[0]
    page.choose("#version", "")
    page.one("#filter").clear()
    page.search("open the cage")
    link = page.one("#permalink").get_attribute("href")
    assert link == page.driver.current_url
    expected = {"q": ["open the cage"], "k": ["3"], "alias": ["demo"], "rerank": ["1"], "budget": ["900"]}
    assert parse_qs(urlsplit(link).query) == expected
    for num_asked in (4, 5):
        page.driver.back()
        page.until(lambda num=num_asked: len(backend.asked) == num)
        page.settle()
    assert page.one("#version").get_attribute("value") == "v2"
    assert backend.asked[4] == backend.asked[0]
    page.one("#filter").clear()
    page.one("#filter").send_keys("{lang: en}", ENTER)
    page.until(lambda: "The filter is not JSON" in page.text("#notice"))


def test_the_answer_is_shown_with_its_source(page: Page, backend: ScriptedBackend) -> None:
    page.open("?q=feed+animal&answer=1")
    assert backend.asked[0]["answer"] is True
    assert page.text("#results .read strong") == f"{LEAVES} {HOSTILE}"
    assert page.texts("#results .read p") == ["read in giraffe", "or: oats"]
    assert page.texts("mark.span") == [LEAVES]  # found behind characters that take two units in a browser
    page.search("nothing")
    assert page.text("#results .read") == "The reader found no answer in these passages."


def test_long_passages_are_cut_and_can_be_opened(page: Page) -> None:
    page.open("?q=giraffe")
    (expand,) = [node for node in page.all(".expand") if node.is_displayed()]
    before = page.one("[data-id=giraffe] .passage").size["height"]
    expand.click()
    assert expand.get_attribute("aria-expanded") == "true"
    assert page.one("[data-id=giraffe] .passage").size["height"] > before
    expand.click()
    assert page.one("[data-id=giraffe] .passage").size["height"] == before


def test_keys_move_between_the_box_and_the_results(page: Page) -> None:
    page.open()
    page.search("animal")
    page.press(DOWN)
    assert page.focused() == "1. zoo.feed"
    page.press("j")
    assert page.focused().startswith("2. ")
    page.press("k", UP)
    assert page.focused() == "q"
    page.press(DOWN, ESCAPE)
    assert page.focused() == "q"
    page.run("document.activeElement.blur()")
    page.press("/")
    assert page.focused() == "q"
    assert page.one("#q").get_attribute("value") == "animal"


def test_choices_appear_only_where_there_is_something_to_choose(page: Page, backend: ScriptedBackend) -> None:
    page.open()
    choices = ("alias", "version", "with", "rerank", "answer")
    assert all(page.one(f"#{name}-choice").is_displayed() for name in choices)
    assert "demo v1 · current · 6 passages · mini" in page.text("#about")
    backend.aliases, backend.stages = {"demo": ["v1"]}, {"reranker": False, "reader": False}
    page.open("?q=animal&rerank=1&answer=1")
    assert not any(page.one(f"#{name}-choice").is_displayed() for name in choices)
    assert backend.asked == [{"query": "animal", "k": 10}]


def test_a_service_that_is_starting_is_asked_again(page: Page, backend: ScriptedBackend) -> None:
    backend.num_unready = 1
    page.open()
    assert page.text("#about") == "The service is not ready yet."
    page.until(lambda: page.text("#about").startswith("demo v1"))


def test_a_switch_is_noticed(page: Page, backend: ScriptedBackend) -> None:
    page.open("?q=feed")
    assert "demo v1 · current" in page.text("#results .origin")
    backend.current["demo"] = "v2"
    page.search("animal")
    assert "demo v2 · current" in page.text("#results .origin")
    assert "demo v2 · current" in page.text("#about")


def test_the_theme_follows_the_system_or_the_choice(page: Page) -> None:
    page.open("?q=feed")
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(paper)
    page.one("#theme").click()
    assert (page.text("#theme"), page.run(paper) != light) == ("Theme: dark", True)
    page.driver.refresh()
    assert page.run(paper) != light
    page.one("#theme").click()
    page.one("#theme").click()
    assert (page.text("#theme"), page.run(paper)) == ("Theme: auto", light)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    with page.emulating("Emulation.setEmulatedMedia", dark, {"features": []}):
        assert page.run(paper) != light


CONTRAST = """
const luminance = (colour) => {
  const channels = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255);
  const [r, g, b] = channels.map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (node) => {
  while (node && /rgba\\(.*, 0\\)|transparent/.test(getComputedStyle(node).backgroundColor)) node = node.parentElement;
  return getComputedStyle(node || document.body).backgroundColor;
};
const nodes = [...document.querySelectorAll("body *")].filter((n) => n.checkVisibility() && !n.closest(":disabled") &&
  [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim()));
return nodes.map((n) => {
  const [a, b] = [luminance(getComputedStyle(n).color), luminance(behind(n))].sort((x, y) => y - x);
  return [(a + 0.05) / (b + 0.05), `${n.tagName}.${n.className}: ${n.textContent.slice(0, 30)}`];
});
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_has_enough_contrast(page: Page, theme: str) -> None:
    page.open()
    page.run("localStorage.setItem('pinakes-theme', arguments[0])", theme)
    for query in ("?q=partial+feed&answer=1&with=demo/v2&budget=50", "?q=feed+animal&answer=1&rerank=1", "?q=busy"):
        page.open(query)
        measured = page.run(CONTRAST)
        assert len(measured) > 15
        assert [told for ratio, told in measured if ratio < 4.5] == []


def test_every_control_has_a_name_and_the_parts_of_the_page_are_told(page: Page) -> None:
    page.open()
    page.search("animal")
    page.one("#more-toggle").click()
    controls = [node for node in page.all("input, select, button, a") if node.is_displayed()]
    assert len(controls) >= 12
    assert all(node.accessible_name for node in controls)
    assert page.one("#status").get_attribute("aria-live") == "polite"
    assert page.one("#form").aria_role == "search"
    assert page.one("#results ol").accessible_name == "Search results"
    roles = [page.one(name).aria_role for name in ("header", "main", "footer", "#results ol")]
    assert roles == ["banner", "main", "contentinfo", "list"]


@pytest.mark.parametrize("compared", ["", "&with=demo/v2"])
def test_nothing_overflows_on_a_phone(page: Page, compared: str) -> None:
    with page.on_a_phone():
        page.open(f"?q=partial+animal&answer=1&filter=%7B%7D{compared}")
        assert len(page.all("#results .hit")) >= len(PASSAGES)
        assert page.run("return document.documentElement.scrollWidth") <= 360


def test_the_policy_lets_no_other_script_or_style_run(page: Page) -> None:
    page.open()
    for tag, text in (("script", "document.title = 'owned'"), ("style", "body { display: none }")):
        page.run(
            "const n = document.createElement(arguments[0]); n.textContent = arguments[1]; document.body.append(n)",
            *(tag, text),
        )
    assert page.driver.title == "Pinakes"
    assert page.one("#q").is_displayed()
    refused = [entry["message"] for entry in page.driver.get_log("browser")]
    assert len(refused) == 2
    assert all("Content Security Policy" in message for message in refused)
    assert "unsafe" not in search_page().policy


def test_the_page_needs_nothing_but_itself() -> None:
    text = search_page().html.decode()
    parts = list((Path(__file__).resolve().parents[1] / "cluster" / "page").iterdir())
    assert len(parts) == 6
    assert all(part.read_text("utf-8").strip().splitlines()[-1] in text for part in parts)
    for forbidden in (
        *("innerHTML", "insertAdjacentHTML", "document.write", "eval(", "http://", "https://", " onclick=", ' style="'),
        *("outerHTML", "javascript:", "srcdoc"),
    ):
        assert forbidden not in text
