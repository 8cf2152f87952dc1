"""What a page says of tuning, of the lists' balance, and of the forecast beside what happened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.charts import bar_chart, curve_chart
from pipelines.report.pieces import (
    Html,
    as_mapping,
    as_number,
    in_words,
    join,
    on_one_line,
    to_bytes,
    to_count,
    to_duration,
    to_facts,
    to_milliseconds,
    to_percent,
    to_table,
)


def tuning_part(recall: Mapping[str, Any], manifest: Mapping[str, Any]) -> Html:
    """Return the recall-latency curve of the settings that tuning tried, and a table of them."""
    points = []
    for trial in recall.get("curve") or [] if isinstance(recall.get("curve"), list) else []:
        found = as_mapping(trial)
        share, ms = as_number(found.get("recall")), as_number(found.get("ms"))
        if share is not None and ms is not None and 0 < ms < 1e9:
            points.append((on_one_line(found.get("params")), ms, min(max(share, 0.0), 1.0)))
    chosen = on_one_line(manifest.get("search_params"))
    rows = [
        [name, to_percent(share, 2), f"{ms:,.3f}", "chosen" if name == chosen else ""] for name, ms, share in points
    ]
    table = to_table("Settings tried, on the queries tuned on", ["Setting", "Recall", "ms a search", ""], rows)
    return join([curve_chart(points, chosen, as_number(recall.get("target"))), table])


def lists_section(lists: Mapping[str, Any]) -> Html:
    """Return how evenly the rows are spread over the lists of an inverted file."""
    bars, before = [], None
    for bar in lists.get("histogram") or [] if isinstance(lists.get("histogram"), list) else []:
        up_to, count = as_number(as_mapping(bar).get("up_to")), as_number(as_mapping(bar).get("lists"))
        if up_to is not None and count is not None and count >= 0:
            label = f"{up_to:,.0f} rows" if before is None else f"{before + 1:,.0f} to {up_to:,.0f}"
            bars.append((label, count, f"{count:,.0f} lists"))
            before = up_to
    imbalance = as_number(lists.get("imbalance"))
    facts = [
        ("Lists", to_count(lists.get("num_lists"))),
        ("Rows in a list: smallest / median / largest", _spread(lists)),
        ("Rows read, to those of equal lists", f"{imbalance:,.2f}" if imbalance is not None else None),
    ]
    return join([bar_chart("list-sizes", "Lists by their rows", bars), to_facts("Lists", facts)])


def _spread(lists: Mapping[str, Any]) -> str | None:
    found = [as_number(lists.get(key)) for key in ("smallest", "median", "largest")]
    return " / ".join(f"{size:,.0f}" for size in found if size is not None) if None not in found else None


def forecast_section(forecast: Mapping[str, Any]) -> Html:
    """Return the pilot's forecast of each figure beside what the finished build gave."""
    rows = []
    for key, told in as_mapping(forecast.get("figures")).items():
        expected, actual, ratio = (as_number(as_mapping(told).get(part)) for part in ("forecast", "actual", "ratio"))
        if expected is not None and actual is not None:
            share = f"{ratio:.2f}" if ratio is not None else ""
            rows.append([_figure(str(key)), _told(str(key), expected), _told(str(key), actual), share])
    asked = as_mapping(forecast.get("asked"))
    wanted = {in_words(key): value for key, value in asked.items() if value is not None}
    untried = as_mapping(forecast.get("untried")).items()
    facts = [
        ("Chosen", forecast.get("factory")),
        ("Vectors beside its codes", "on disk" if forecast.get("refine") == "exact" else None),
        ("Asked for", on_one_line(wanted)),
        ("Not tried", "; ".join(f"{on_one_line(names)}: {why}" for why, names in untried) or None),
    ]
    table = to_table("Forecast and outcome", ["Figure", "Forecast", "Outcome", "Outcome / forecast"], rows)
    return join([table, to_facts("Choice of the index", facts if forecast else [])])


def _figure(key: str) -> str:
    names = {"ms": "One search, one core", "recall": "Recall", "memory_bytes": "In memory", "index_bytes": "On disk"}
    return names.get(key) or in_words(key.removesuffix("_seconds"))


def _told(key: str, value: float) -> str:
    if key.endswith("_bytes"):
        return to_bytes(value)
    if key.endswith("_seconds"):
        return to_duration(value)
    return to_milliseconds(value) if key == "ms" else to_percent(value, 2)
