"""Two versions side by side on the search page, the API key, and the page over real versions; in headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.api import build_api
from pipelines.access_keys import KeyFile
from pipelines.config import ServeConfig
from tests.checkpoints import write_sentence_transformer
from tests.local_backend import LocalBackend, build_root, served
from tests.page_backend import HOSTILE, Page, ScriptedBackend
from tests.test_search_page import DOWN, ENTER, LEFT, RIGHT, backend, driver, page, scripted, watched

__all__ = ["backend", "driver", "page", "scripted"]  # fixtures

MOVES = """
const told = (row, side) => {
  const hit = row.cells[side].querySelector(".hit");
  return hit && [hit.dataset.id, hit.querySelector(".move [aria-hidden]").textContent];
};
return [...document.querySelectorAll("tbody tr")].map((row) => [row.cells[0].textContent, told(row, 1), told(row, 2)]);
"""


def test_two_versions_stand_side_by_side(page: Page, backend: ScriptedBackend) -> None:
    page.open("?q=animal&k=5&with=demo/v2")
    assert page.run(MOVES) == [
        ["1", ["zoo.feed", "→ 2"], ["zoo.groom", "▲ 1"]],
        ["2", ["zoo.groom", "→ 1"], ["zoo.feed", "▼ 1"]],
        ["3", ["hostile", "same"], ["hostile", "same"]],
        ["4", ["zoo.Cage.open", "→ 5"], ["giraffe", "new"]],
        ["5", ["hay/1", "gone"], ["zoo.Cage.open", "▼ 1"]],
    ]
    tally = dict(zip(page.texts(".tally dt"), page.texts(".tally dd"), strict=True))
    assert tally == {
        "shared": "4 of 5",
        "new": "1",
        "gone": "1",
        "ranks moved on average": "0.8",
        "first passage": "another",
    }
    assert page.text("#status") == "4 of 5 passages shared"
    assert [asked.get("version") for asked in backend.asked] == [None, "v2"]
    assert page.texts("thead th.side") == ["demo v1", "demo v2"]
    edited = [text.split(" · ")[0] for text in page.texts("td .id") if "differs between the two" in text]
    assert edited == ["zoo.Cage.open", "zoo.Cage.open"]
    links = [node.get_attribute("href") for node in page.all("thead a")]
    assert links == [f"{page.url}/reports/demo/v1", f"{page.url}/reports/demo/v2"]


def test_the_comparison_is_a_table_to_those_who_do_not_see_it(page: Page) -> None:
    def table() -> dict[str, list[str]]:
        nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        told: dict[str, list[str]] = {}
        for node in nodes:
            if not node.get("ignored"):
                told.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        return {role: told.get(role, []) for role in ("table", "columnheader", "rowheader", "article")}

    page.open("?q=animal&k=5&with=demo/v2")
    wide = table()
    assert wide["columnheader"] == ["Rank", "demo v1", "demo v2"]
    assert wide["rowheader"] == ["About", "1", "2", "3", "4", "5"]
    assert wide["table"] == ["demo v1 beside demo v2"]
    assert "1. zoo.feed, rank 2 in the other version" in wide["article"]
    assert "4. 🦒 Giraffe, new here" in wide["article"]
    with page.on_a_phone():
        page.open("?q=animal&k=5&with=demo/v2")
        narrow = table()
        assert {role: len(names) for role, names in narrow.items()} == {
            role: len(names) for role, names in wide.items()
        }


def test_keys_cross_to_the_other_version(page: Page) -> None:
    page.open("?q=animal&k=5&with=demo/v2")
    page.run("document.getElementById('q').focus()")
    page.press(DOWN)
    assert page.focused().startswith("1. zoo.feed")
    page.press(RIGHT)
    assert page.focused().startswith("1. zoo.groom")
    page.press(LEFT, ENTER)  # the same passage on the right stands second
    assert page.focused().startswith("2. zoo.feed")
    assert {node.get_attribute("data-id") for node in page.all(".twin")} == {"zoo.feed"}
    assert len(page.all(".twin")) == 2


def test_the_choice_is_in_the_address_and_can_be_swapped(page: Page, backend: ScriptedBackend) -> None:
    page.open("?q=animal&k=5")
    assert not page.one("#swap").is_displayed()
    page.choose("#with", "demo/v2")
    page.until(lambda: page.texts("thead th.side") == ["demo v1", "demo v2"])
    assert page.driver.current_url.endswith("?q=animal&k=5&alias=demo&with=demo/v2")
    page.one("#swap").click()
    page.until(lambda: page.texts("thead th.side") == ["demo v2", "demo v1"])
    assert page.driver.current_url.endswith("?q=animal&k=5&alias=demo&version=v2&with=demo/v1")
    page.driver.back()
    page.until(lambda: page.texts("thead th.side") == ["demo v1", "demo v2"])
    page.choose("#with", "demo/v1")
    page.until(lambda: "Both columns are the same version" in page.text("caption"))
    page.choose("#with", "")
    page.until(lambda: page.all("#results li"))
    assert not page.all("table")


def test_what_one_side_lacks_is_said_of_that_side(page: Page) -> None:
    page.open("?q=partial+animal&with=demo/v2")
    assert "demo v1: incomplete answer" in page.text("#notice")
    assert "demo v2: incomplete answer" in page.text("#notice")
    page.open("?q=halved+animal&with=demo/v2")
    assert "demo v2: Not found" in page.text("#notice")
    assert f"shard-000 fails its checksum {HOSTILE}" in page.text("#notice")
    assert page.all("#results li")


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(driver: Any, backend: ScriptedBackend, tmp_path: Path) -> None:
    keys = KeyFile(str(tmp_path / "keys.json"))
    key, _ = keys.create("reader")
    config = ServeConfig(require_key=True, rate_per_second=0.01, rate_burst=7)
    with served(build_api(lambda: backend, config, keys)) as url, watched(driver, url) as page:
        page.open("?q=feed")
        assert page.text("#about") == "This server asks for an API key."
        assert (page.focused(), page.text("#notice"), backend.asked) == ("key", "", [])
        page.press("pk_wrong", ENTER)
        page.until(lambda: "the key is not known here" in page.text("#notice"))
        page.press(key, ENTER)
        page.until(lambda: page.all("#results li"))
        assert (page.text("#notice"), page.one("#unlock").is_displayed()) == ("", False)
        page.driver.refresh()
        page.until(lambda: page.all("#results li"))
        page.one("#results .origin a").click()
        saved = page.driver.downloads / "report-demo-v1.html"
        page.until(saved.exists)
        assert "<h1>v1</h1>" in saved.read_text()
        for query in ("animal", "brush", "cage"):
            page.search(query)
        assert "Too many requests" in page.text("#notice")
        assert "Search again in " in page.text("#notice")
        assert not page.one("#notice button").is_enabled()
        page.one("#forget").click()
        page.search("feed")
        assert "A key is needed" in page.text("#notice")
        assert page.focused() == "key"


ROWS = [
    {"id": "a", "title": "Quagga", "text": "the cat sat on the mat <b>and</b> the quagga ran"},
    {"id": "b", "title": HOSTILE, "text": f"number 1 sat on {HOSTILE}"},
    {"id": "c", "title": "حديقة", "text": "حديقة الحيوان cat 🦒 mat"},
    *({"id": f"d{i}", "title": "", "text": f"the cat number {i} sat on mat {i * 7 % 13}"} for i in range(20)),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalBackend, str]]:
    """Two real versions of one index: the same passages by two encoders."""
    folder = tmp_path_factory.mktemp("versions")
    for dim in (16, 32):
        root = build_root(folder, write_sentence_transformer(str(folder / f"encoder-{dim}"), dim, seed=dim), ROWS)
    backend = LocalBackend(root, ["cats"], ServeConfig())
    with served(build_api(lambda: backend, backend.config)) as url:
        yield backend, url


@pytest.fixture
def real_page(driver: Any, real: tuple[LocalBackend, str]) -> Iterator[Page]:
    with watched(driver, real[1]) as page:
        yield page


def test_real_versions_compare_as_they_rank(real_page: Page, real: tuple[LocalBackend, str]) -> None:
    backend, _ = real
    new, old = (v for _, v in sorted(backend.opened, key=lambda pair: backend.opened[pair].spec.dim, reverse=True))
    query = "the cat sat on the mat"
    real_page.open(f"?q={query.replace(' ', '+')}&version={old}&with=cats/{new}")
    before, after = ([h.passage.id for h in backend.opened["cats", v].search([query], 10)[0]] for v in (old, new))
    shown = real_page.run(MOVES)
    assert [left[0] for _, left, _ in shown] == before
    assert [right[0] for _, _, right in shown] == after
    for rank, (_, left, right) in enumerate(shown, 1):
        assert left[1] == (
            "gone"
            if left[0] not in after
            else "same"
            if after.index(left[0]) + 1 == rank
            else f"→ {after.index(left[0]) + 1}"
        )
        step = before.index(right[0]) + 1 - rank if right[0] in before else None
        assert right[1] == (
            "new" if step is None else "same" if step == 0 else f"{'▲' if step > 0 else '▼'} {abs(step)}"
        )
    assert not real_page.all("#results img, #results script")


def test_the_report_of_a_version_opens_as_it_is_meant_to_look(real_page: Page) -> None:
    real_page.open("?q=cat")
    link = real_page.one("#results .origin a")
    assert link.accessible_name.startswith("Report of cats ")
    real_page.driver.get(link.get_attribute("href"))
    assert "Quality" in real_page.text("body") or "Build" in real_page.text("body")
    assert real_page.run("return getComputedStyle(document.body).maxWidth") == "960px"
