"""The report: well-formed, self-contained, accessible, escaped, right, and unshaken by what is missing or odd."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.evaluate import percentiles, score_retrieval
from pipelines.report.page import render_report
from pipelines.report.style import STYLE
from pipelines.schema import Hit, Passage, Question

VOID = {"meta", "br", "hr", "img", "link", "input"}
EMPTY_SVG = {"line", "polyline"}


class Page(HTMLParser):
    """A strict reader: every element closes where it should, and text, attributes and tables are kept."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in EMPTY_SVG
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "\n".join(data for tag, data in self.texts if tag != "style")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def inside(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]


MANIFEST: dict[str, Any] = {
    "name": "wikipedia-dpr",
    "version": "9f3c1d22aa00bb11",
    "created": "2026-04-12T10:15:02+00:00",
    "num_rows": 21_015_324,
    "dim": 768,
    "metric": "inner_product",
    "factory": "OPQ96,IVF65536,PQ96",
    "num_shards": 2,
    "snapshot": "7c1e0b93d4aa52fe",
    "embeddings": "b7715c0e9921d3aa",
    "encoder": {"checkpoint": "facebook/dpr", "family": "dpr", "fingerprint": "b7715c0e9921d3aa", "dim": 768},
    "search_params": {"nprobe": 64},
    "recall": {
        "k": 10,
        "value": 0.9632,
        "ci95": 0.0061,
        "num_queries": 2000,
        "target": 0.95,
        "curve": [
            {"params": {"nprobe": 16}, "recall": 0.81, "ms": 0.5},
            {"params": {"nprobe": 64}, "recall": 0.966, "ms": 1.75},
            {"params": {"nprobe": 96}, "recall": 0.96, "ms": 2.0},
            {"params": {"nprobe": 128}, "recall": 0.99, "ms": 50.0},
        ],
    },
    "lists": {
        "num_lists": 65_536,
        "imbalance": 1.8321,
        "smallest": 0,
        "median": 260.0,
        "largest": 3001,
        "histogram": [{"up_to": 0, "lists": 6}, {"up_to": 320, "lists": 41_530}, {"up_to": 3001, "lists": 24_000}],
    },
    "forecast": {
        "factory": "OPQ96,IVF65536,PQ96",
        "asked": {"min_recall": 0.95, "max_memory_gb": 8.0, "max_ms": None},
        "figures": {
            "recall": {"forecast": 0.9585, "actual": 0.9632, "ratio": 1.0049},
            "ms": {"forecast": 1.6, "actual": 1.75, "ratio": 1.0938},
            "memory_bytes": {"forecast": 2_300_000_000, "actual": 2_100_000_000, "ratio": 0.913},
            "add_seconds": {"forecast": 4000.0, "actual": 3981.7, "ratio": 0.9954},
        },
    },
    "timings_seconds": {"train": 412.2, "add": 3981.7, "merge": 6.0},
    "files": {
        "trained.faiss": {"bytes": 3_400_000, "sha256": "a" * 64},
        "shard-000.faiss": {"bytes": 1_400_000_000, "sha256": "b" * 64, "num_rows": 10_507_662},
        "shard-001.faiss": {"bytes": 700_000_000, "sha256": "c" * 64, "num_rows": 10_507_662},
        "passages-000.arrow": {"bytes": 3_000_000_000, "sha256": "d" * 64},
    },
    "config": {"name": "wikipedia-dpr", "index": {"factory": "OPQ96,IVF65536,PQ96", "min_recall": 0.95}},
    "packages": {"faiss": "1.15.1", "torch": "2.13.0"},
}
EVALUATION: dict[str, Any] = {
    "num_questions": 3610,
    "depth": 100,
    "num_gold_questions": 3204,
    "gold_top@1": 0.4412,
    "gold_top@5": 0.652,
    "gold_top@20": 0.7711,
    "gold_top@100": 0.844,
    "mrr@10": 0.5312,
    "ndcg@10": 0.5604,
    "answer_top@1": 0.4587,
    "answer_top@5": 0.6814,
    "answer_top@20": 0.7997,
    "answer_top@100": 0.8587,
    "latency": {"p50_ms": 11.84, "p95_ms": 23.4, "p99_ms": 141.87, "num_queries": 3610},
    "recall": {"k": 100, "value": 0.9412, "ci95": 0.0043, "num_queries": 3610},
}
TITLES = ["What this version is", "Quality", "Search latency", "Build", "Forecast and outcome", "Balance of the lists",
          "Files", "Configuration", "Packages"]  # fmt: skip


def test_a_full_page_says_everything() -> None:
    page = Page(render_report(MANIFEST, EVALUATION))
    assert page.inside("h2") == TITLES
    assert page.inside("h1") == ["wikipedia-dpr"]
    for said in (
        *("9f3c1d22aa00bb11", "7c1e0b93d4aa52fe", "facebook/dpr", "b7715c0e9921d3aa", "nprobe = 64", "inner_product"),
        *("21,015,324", "OPQ96,IVF65536,PQ96", "44.1%", "85.9%", "53.1%", "56.0%", "96.32% ± 0.61 on 2,000 queries"),
        *("11.84 ms", "141.87 ms", "1 h 06 min", "3,981.7", "90.5%", "1.4 GB", "700.0 MB", "3.4 MB", "b" * 16),
        *("min_recall: 0.95", "1.15.1", "3,204", "99.9, of 3,072 as fp32"),
        *("0 / 260 / 3,001", "1 to 320", "41,530 lists", "1.83", "95.85%", "2.3 GB", "1 h 06 min", "0.91"),
        *("Max memory gb = 8.0", "chosen: nprobe = 64", "1.750"),
    ):
        assert said in page.text, said
    assert "b" * 17 not in page.text  # a prefix of each checksum, not all of it


def test_the_page_stands_alone() -> None:
    source = render_report(MANIFEST, EVALUATION)
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert not {"src", "style", "srcset"} & set(attrs)
        assert not [name for name in attrs if name.startswith("on")]
    assert all(str(a["href"]).startswith("#") for a in page.all("a"))
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert "://" not in source
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert source.encode("utf-8").startswith(b"<!DOCTYPE html>")


def test_the_page_is_accessible() -> None:
    page = Page(render_report(MANIFEST, EVALUATION))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert len(page.inside("caption")) == len(page.all("table")) > 5
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)
    charts = page.all("svg")
    assert len(charts) == 7  # recall, curve, accuracy, latency, stages, shards, lists
    for attrs in [*charts, *page.all("section")]:
        assert set(str(attrs["aria-labelledby"]).split()) <= set(ids)
    assert all(svg["role"] == "img" for svg in charts)
    described = page.inside("desc")
    assert "Gold passage in the top k: 44.1% at 1, 65.2% at 5, 77.1% at 20, 84.4% at 100" in described[2]
    assert "target 95.0%" in described[0]


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(c * 2 for c in colour)
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast_is_sufficient_in_both_themes(theme: int) -> None:
    blocks = re.findall(r":root\{([^}]*)\}", STYLE)
    assert len(blocks) == 2
    assert "prefers-color-scheme:dark" in STYLE
    colours = {name: luminance(value) for name, value in re.findall(r"--(\w+):#([0-9a-f]+)", blocks[theme])}

    def contrast(one: str, other: str) -> float:
        dark, light = sorted((colours[one], colours[other]))
        return (light + 0.05) / (dark + 0.05)

    for ground in ("paper", "card", "zebra"):
        for text in ("ink", "soft", "link", "accent"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for mark in ("c0", "c1", "c2"):
        assert contrast(mark, "card") >= 3.0


def chart(source: str, name: str) -> str:
    found = re.search(rf'<svg [^>]*aria-labelledby="{name}-t.*?</svg>', source, re.DOTALL)
    assert found, name
    return found.group()


def test_the_accuracy_chart_is_drawn_to_scale_on_a_logarithmic_axis() -> None:
    drawn = chart(render_report(MANIFEST, EVALUATION), "accuracy")
    lines = [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'<polyline points="([^"]+)"', drawn)
    ]
    assert [len(line) for line in lines] == [4, 4]
    xs = [x for x, _ in lines[0]]
    expected = [math.log(k) / math.log(100) for k in (1, 5, 20, 100)]
    assert [(x - xs[0]) / (xs[-1] - xs[0]) for x in xs] == pytest.approx(expected, abs=1e-3)
    # Height is linear in the share: both lines lie on the scale that the axis ticks draw.
    ticks = {
        float(label): float(y) - 4
        for y, label in re.findall(r'y="([\d.]+)" text-anchor="end" class="tick">([\d.]+)%', drawn)
    }
    (low, at_low), (high, at_high) = min(ticks.items()), max(ticks.items())
    for line, name in zip(lines, ("gold_top", "answer_top"), strict=True):
        for (_, y), k in zip(line, (1, 5, 20, 100), strict=True):
            share = EVALUATION[f"{name}@{k}"] * 100
            assert y == pytest.approx(at_low + (share - low) / (high - low) * (at_high - at_low), abs=0.2)
    width, height = map(float, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
    assert all(0 < x < width and 0 < y < height for line in lines for x, y in line)


def test_the_curve_is_to_scale_and_joins_what_nothing_beats() -> None:
    drawn = chart(render_report(MANIFEST, EVALUATION), "curve")
    spots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    first, chosen, beaten, last = spots
    places = [(x - first[0]) / (last[0] - first[0]) for x, _ in spots]
    assert places == pytest.approx([math.log(ms / 0.5) / math.log(100) for ms in (0.5, 1.75, 2.0, 50.0)], abs=1e-3)
    heights = [(y - first[1]) / (last[1] - first[1]) for _, y in spots]
    assert heights == pytest.approx([(share - 0.81) / 0.18 for share in (0.81, 0.966, 0.96, 0.99)], abs=1e-2)
    (line,) = re.findall(r'<polyline points="([^"]+)"', drawn)
    joined = [tuple(map(float, point.split(","))) for point in line.split()]
    assert joined == [first, chosen, last]
    assert beaten not in joined
    target = float(re.findall(r'<line x1="[\d.]+" y1="([\d.]+)"[^>]*class="target"', drawn)[0])
    assert chosen[1] < target < first[1]
    assert not re.search('aria-labelledby="curve-t', render_report({**MANIFEST, "recall": {"value": 0.9}}))


def test_bars_are_in_proportion() -> None:
    drawn = chart(render_report(MANIFEST, EVALUATION), "stages")
    widths = [float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', drawn)]
    assert widths[0] / widths[1] == pytest.approx(412.2 / 3981.7, rel=1e-2)
    assert widths[2] == 2.0  # still to be seen


def test_a_recall_under_its_target_stands_left_of_it() -> None:
    for value, is_left in ((0.93, True), (0.97, False)):
        recall = {"k": 10, "value": value, "ci95": 0.01, "num_queries": 100, "target": 0.95}
        drawn = chart(render_report({"recall": recall}), "recall")
        target = float(re.findall(r'<line x1="([\d.]+)"[^>]*class="target"', drawn)[0])
        point = float(re.findall(r'<circle cx="([\d.]+)"', drawn)[0])
        assert (point < target) is is_left


def test_what_is_missing_is_left_out() -> None:
    page = Page(render_report({}, None))
    assert page.inside("h2") == ["Quality"]
    assert "No questions have been evaluated" in page.text
    assert page.all("svg") == []
    for key in MANIFEST:
        less = {k: v for k, v in MANIFEST.items() if k != key}
        text = Page(render_report(less, EVALUATION)).text
        assert not re.search(r"\b(None|nan|inf)\b", text), key


@pytest.mark.parametrize("odd", [None, "text", 3, [], {}, math.nan, True, [{}], {"a": None}, -5, 1e300])
def test_odd_values_do_not_break_the_page(odd: Any) -> None:
    for key in MANIFEST:
        Page(render_report({**MANIFEST, key: odd}, EVALUATION))
    for key in EVALUATION:
        Page(render_report(MANIFEST, {**EVALUATION, key: odd}))
    for key in ("recall", "timings_seconds", "files", "encoder", "lists", "forecast"):
        Page(render_report({**MANIFEST, key: dict.fromkeys(MANIFEST[key], odd)}, EVALUATION))
    for bars in ([odd], [{"up_to": odd, "lists": odd}]):
        Page(render_report({**MANIFEST, "lists": {**MANIFEST["lists"], "histogram": bars}}))
    trial = {"params": odd, "recall": odd, "ms": odd}
    Page(render_report({**MANIFEST, "recall": {**MANIFEST["recall"], "curve": [trial, *MANIFEST["recall"]["curve"]]}}))
    Page(render_report({**MANIFEST, "forecast": {"figures": {"ms": dict.fromkeys(("forecast", "actual"), odd)}}}))
    for part in ("value", "ci95", "target", "k", "num_queries"):
        Page(render_report({**MANIFEST, "recall": {**MANIFEST["recall"], part: odd}}, None))


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;</title></style>]]>\x00\x1b\ud800\u202e--><!--"


def replace_strings(value: Any, by: str) -> Any:
    """Put a text into every key and every string of nested mappings and lists that a manifest may hold."""
    if isinstance(value, dict):
        return {key: replace_strings(inner, by) for key, inner in value.items()}
    if isinstance(value, list):
        return [replace_strings(inner, by) for inner in value]
    return by if isinstance(value, str) else value


def test_hostile_names_are_text() -> None:
    manifest = replace_strings(copy.deepcopy(MANIFEST), HOSTILE)
    for key in ("timings_seconds", "files", "packages", "encoder", "search_params", "config"):
        manifest[key] = {**manifest[key], HOSTILE: next(iter(manifest[key].values()))}
    manifest["files"][f"shard-{HOSTILE}.faiss"] = {"bytes": 5, "sha256": HOSTILE}
    manifest["recall"]["k"] = HOSTILE
    manifest["recall"]["curve"][1]["params"] = manifest["search_params"]
    evaluation = {**EVALUATION, HOSTILE: HOSTILE, "latency": {**EVALUATION["latency"], HOSTILE: HOSTILE}}
    source = render_report(manifest, evaluation)
    page, plain = Page(source), Page(render_report(MANIFEST, EVALUATION))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert {name for _, attrs in page.tags for name in attrs} == {name for _, attrs in plain.tags for name in attrs}
    assert page.inside("h2") == TITLES
    seen = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    assert page.inside("h1") == [seen]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", source)
    source.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=[])), where=st.sampled_from(["name", "factory", "encoder", "files"])
)
def test_any_text_reads_back_as_text(text: str, where: str) -> None:
    value = {"encoder": {text: text}, "files": {text: {"sha256": text}}}.get(where, text)
    source = render_report({**MANIFEST, where: value}, EVALUATION)
    source.encode("utf-8")
    assert {tag for tag, _ in Page(source).tags} <= {tag for tag, _ in Page(render_report(MANIFEST, EVALUATION)).tags}


def test_many_files_and_shards_fold_away() -> None:
    files = {f"shard-{i:03d}.faiss": {"bytes": 1000 + i, "sha256": "e" * 64} for i in range(200)}
    source = render_report({**MANIFEST, "files": files}, None)
    page = Page(source)
    assert "200 files, 219.9 kB" in page.inside("summary")
    assert 'aria-labelledby="shard-sizes-t' not in source
    assert "1.0 kB / 1.1 kB / 1.2 kB" in page.text
    assert "shard-199.faiss" in page.text


def test_a_shallow_search_is_noted() -> None:
    assert "more than 20 hits" in render_report(MANIFEST, {**EVALUATION, "depth": 20})
    assert "more than" not in render_report(MANIFEST, EVALUATION)


def test_it_takes_what_evaluation_gives() -> None:
    passage = Passage("p", "", "who?", answers=["Rollo"])
    question = Question("0", "who?", answers=["rollo"], positives=["p"])
    scores = score_retrieval([question], [[Hit(0, 1.0, passage)]])
    page = Page(render_report(MANIFEST, {**scores, "latency": percentiles([0.010, 0.020])}))
    assert "Exact match of the first QA pair" in page.inside("th")
    assert page.inside("td").count("100.0%") >= 4 + 4 + 2 + 1
    assert "15.00 ms" in page.text


@settings(max_examples=40, deadline=None)
@given(
    scores=st.dictionaries(
        st.builds("{}@{}".format, st.sampled_from(["gold_top", "answer_top", "hits", "mrr"]), st.integers(1, 10**6)),
        st.floats(0, 1),
        min_size=1,
        max_size=12,
    )
)
def test_any_scores_can_be_drawn(scores: dict[str, float]) -> None:
    source = render_report(MANIFEST, scores)
    Page(source)
    numbers = re.findall(r' (?:x|y|cx|cy|x1|x2|y1|y2)="([^"]+)"', source)
    assert all(math.isfinite(float(number)) and float(number) >= 0 for number in numbers)


def test_reranking_and_reading_are_told() -> None:
    scores = {"num_questions": 3, "depth": 20, "gold_top@1": 0.5, "gold_top@5": 0.9}
    rerank = {"checkpoint": "a/reranker", "depth": 10, "seconds": 2.5, "gold_top@1": 0.7, "gold_top@5": 0.95}
    reader = {"checkpoint": "a/reader", "depth": 3, "seconds": 2.5, "answer_em": 0.4}
    page = render_report(MANIFEST, {**scores, "rerank": rerank, "reader": reader})
    assert "Gold passage in the top k, reranked" in page
    assert "Exact match of the answer, read" in page
    assert "a/reranker" in page
    assert "a/reader" in page
