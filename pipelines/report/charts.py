"""The charts of a page: inline SVG that follows the theme and says in words what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.report.pieces import Html, join, to_percent, to_text

WIDTH = 760
MARKS = (
    '<circle cx="{x}" cy="{y}" r="5">{tip}</circle>',
    '<rect x="{x0}" y="{y0}" width="9" height="9">{tip}</rect>',
    '<path d="M{x} {y0}l6 5.5-6 5.5-6-5.5z">{tip}</path>',
    '<path d="M{x} {y0}l6 10h-12z">{tip}</path>',
)


def _svg(name: str, title: str, description: str, height: float, content: Iterable[str]) -> Html:
    return Html(
        f"<figure><figcaption>{to_text(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{to_text(title)}</title><desc id="{name}-d">{to_text(description)}</desc>'
        f"{join(content)}</svg></figure>"
    )


def _label(x: float, y: float, text: Any, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{to_text(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _mark(kind: int, x: float, y: float, tip: str = "") -> str:
    inner = f"<title>{to_text(tip)}</title>" if tip else ""
    shape = MARKS[kind % len(MARKS)]
    y0 = y - (4.5 if "rect" in shape else 5.5)
    return shape.format(x=f"{x:.1f}", y=f"{y:.1f}", x0=f"{x - 4.5:.1f}", y0=f"{y0:.1f}", tip=inner)


def _ticks(low: float, high: float) -> list[float]:
    """Return at most seven round shares from at or below `low` to at or above `high`."""
    for step in (1, 2, 5, 10, 20):
        first, last = math.floor(low * 100 / step + 1e-9), math.ceil(high * 100 / step - 1e-9)
        if last - first <= 6:
            break
    return [tick * step / 100 for tick in range(first, last + 1)]


def accuracy_chart(name: str, title: str, series: Sequence[tuple[str, Mapping[int, float]]]) -> Html:
    """Draw shares (0 to 1) over k on a logarithmic axis: a line, a mark and a dash pattern of its own each."""
    if not series:
        return Html("")
    values = [min(max(value, 0.0), 1.0) for _, points in series for value in points.values()]
    ks = sorted({k for _, points in series for k in points})
    ticks = _ticks(max(0.0, min(values) - 0.05), min(1.0, max(values) + 0.03))
    low, high = ticks[0], ticks[-1]
    left, right, top, bottom = 56.0, WIDTH - 28.0, 28.0 + 22 * len(series), 300.0 + 22 * len(series)

    def at(k: int, value: float) -> tuple[float, float]:
        share = math.log(k / ks[0]) / math.log(ks[-1] / ks[0])
        height = (min(max(value, low), high) - low) / (high - low)
        return left + 24 + share * (right - left - 48), bottom - height * (bottom - top)

    parts = []
    for tick in ticks:
        y = at(ks[0], tick)[1]
        parts += [_line(left, y, right, y, "grid"), _label(left - 8, y + 4, f"{tick * 100:.0f}%", "end", "tick")]
    last = -math.inf
    for k in ks:
        x = at(k, low)[0]
        if x - last >= 26:
            parts += [_line(x, bottom, x, bottom + 5, "axis"), _label(x, bottom + 20, k, style="tick")]
            last = x
    parts += [_line(left, bottom, right, bottom, "axis"), _label((left + right) / 2, bottom + 40, "k, hits looked at")]
    for i, (label, points) in enumerate(series):
        spots = {k: at(k, value) for k, value in points.items()}
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots.values())
        marks = join(_mark(i, *spots[k], f"{label}, k = {k}: {to_percent(points[k])}") for k in points)
        legend = _mark(i, left + 8, 18 + 22 * i) + _label(left + 22, 22 + 22 * i, label, "start")
        parts.append(f'<g class="s{i % len(MARKS)}"><polyline points="{path}"/>{marks}{legend}</g>')
    parts += _point_labels(series, at)
    spoken = "; ".join(f"{label}: " + ", ".join(f"{to_percent(v)} at {k}" for k, v in p.items()) for label, p in series)
    return _svg(name, title, spoken, bottom + 52, parts)


def _point_labels(series: Sequence[tuple[str, Mapping[int, float]]], at: Any) -> list[str]:
    """Write the highest value at each k above its mark and the lowest below; one between has its tooltip only."""
    parts = []
    for k in sorted({k for _, points in series for k in points}):
        values = sorted((points[k] for _, points in series if k in points), reverse=True)
        x, y = at(k, values[0])
        parts.append(_label(x, y - 11, f"{values[0] * 100:.1f}", style="value"))
        if len(values) > 1:
            x, y = at(k, values[-1])
            parts.append(_label(x, y + 21, f"{values[-1] * 100:.1f}", style="value"))
    return parts


def bar_chart(name: str, title: str, bars: Sequence[tuple[str, float, str]]) -> Html:
    """Draw horizontal bars from zero, each as (label, value, the value in words)."""
    if not bars:
        return Html("")
    longest = max(value for _, value, _ in bars) or 1.0
    left, room, step = 150.0, WIDTH - 150.0 - 110.0, 30
    parts = []
    for i, (label, value, words) in enumerate(bars):
        width, middle = max(2.0, value / longest * room), 18 + i * step
        short = label if len(label) <= 20 else label[:19] + "…"
        parts.append(_label(left - 12, middle + 4, short, "end"))
        parts.append(
            f'<rect class="bar" x="{left:g}" y="{middle - 9}" width="{width:.1f}" height="18" rx="3">'
            f"<title>{to_text(f'{label}: {words}')}</title></rect>"
        )
        parts.append(_label(left + width + 8, middle + 4, words, "start", "value"))
    spoken = "; ".join(f"{label}: {words}" for label, _, words in bars)
    return _svg(name, title, spoken, step * len(bars) + 8, [_line(left, 4, left, step * len(bars) + 4, "axis"), *parts])


def recall_chart(recalls: Sequence[Mapping[str, Any]]) -> Html:
    """Draw each recall as a point with its 95 % interval, against its target."""
    if not recalls:
        return Html("")
    floors = [r["value"] - (r["ci95"] or 0) for r in recalls] + [r["target"] for r in recalls if r["target"]]
    ticks = _ticks(min(0.95, max(0.0, min(floors) - 0.01)), 1.0)
    low = ticks[0]
    left, right, step = 250.0, WIDTH - 40.0, 46
    bottom = step * len(recalls) + 20.0

    def at(share: float) -> float:
        return left + (min(max(share, low), 1.0) - low) / (1 - low) * (right - left)

    parts = []
    for tick in ticks:
        parts += [_line(at(tick), 14, at(tick), bottom, "grid")]
        parts += [_label(at(tick), bottom + 18, f"{tick * 100:.0f}%", style="tick")]
    spoken = []
    for i, recall in enumerate(recalls):
        middle, value, reach = 40.0 + step * i, recall["value"], recall["ci95"] or 0.0
        words = to_percent(value, 2) + (f" ± {reach * 100:.2f}" if reach else "")
        parts.append(_label(12, middle - 3, f"recall@{recall['k']} {recall['label']}", "start"))
        parts.append(_label(12, middle + 15, words + on_queries(recall["num_queries"]), "start", "value"))
        parts.append(_line(at(value - reach), middle, at(value + reach), middle, "whisker"))
        if recall["target"] is not None:
            x = at(recall["target"])
            parts += [_line(x, middle - 14, x, middle + 14, "target"), _label(x, middle - 18, "target", style="tick")]
        parts.append(f'<g class="s0">{_mark(0, at(value), middle, words)}</g>')
        aim = f", target {to_percent(recall['target'])}" if recall["target"] is not None else ""
        spoken.append(f"recall@{recall['k']} {recall['label']}: {words}{on_queries(recall['num_queries'])}{aim}")
    return _svg("recall", "Recall against exact search", "; ".join(spoken), bottom + 28, parts)


def on_queries(count: float | None) -> str:
    return f" on {count:,.0f} queries" if count else ""


def curve_chart(points: Sequence[tuple[str, float, float]], chosen: str, target: float | None) -> Html:
    """Draw recall (0 to 1) over milliseconds a search, which grow by factors; a line joins what nothing beats.

    points: each setting in words, its milliseconds and its recall; chosen: the setting that was taken.
    """
    if len(points) < 2:
        return Html("")
    times, ticks = [ms for _, ms, _ in points], _ticks(max(0.0, min(share for *_, share in points) - 0.02), 1.0)
    low, span = ticks[0], math.log(max(times) / min(times)) or 1.0
    left, right, top, bottom = 56.0, WIDTH - 28.0, 30.0, 300.0

    def at(ms: float, share: float) -> tuple[float, float]:
        x = left + 24 + math.log(ms / min(times)) / span * (right - left - 48)
        return x, bottom - (min(max(share, low), 1.0) - low) / (1 - low) * (bottom - top)

    parts = []
    for tick in ticks:
        y = at(times[0], tick)[1]
        parts += [_line(left, y, right, y, "grid"), _label(left - 8, y + 4, f"{tick * 100:.0f}%", "end", "tick")]
    for ms in _round_times(min(times), max(times)):
        x = at(ms, low)[0]
        parts += [_line(x, bottom, x, bottom + 5, "axis"), _label(x, bottom + 20, f"{ms:g}", style="tick")]
    parts += [_line(left, bottom, right, bottom, "axis")]
    parts += [_label((left + right) / 2, bottom + 40, "milliseconds a search, one core")]
    if target is not None:
        y = at(times[0], target)[1]
        parts += [_line(left, y, right, y, "target"), _label(left + 6, y - 6, "target", "start", "tick")]
    best = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(ms, share) for _, ms, share in _unbeaten(points)))
    marks = join(_mark(0, *at(ms, share), f"{name}: {to_percent(share)} in {ms:.3g} ms") for name, ms, share in points)
    parts.append(f'<g class="s0"><polyline points="{best}"/>{marks}</g>')
    for name, ms, share in points:
        if name == chosen:
            x, y = at(ms, share)
            words, beside = f"chosen: {name}", y + 22 if y < (top + bottom) / 2 else y - 12
            parts.append(f'<g class="s1">{_mark(2, x, y, words)}{_label(x, beside, words, _side(x), "value")}</g>')
    spoken = "; ".join(f"{name}: {to_percent(share)} in {ms:.3g} ms" for name, ms, share in points)
    return _svg("curve", "Recall against time", spoken, bottom + 52, parts)


def _unbeaten(points: Sequence[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Return the settings that are quicker than every one with as much recall, the quickest first."""
    found: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda p: (p[1], -p[2])):
        if not found or point[2] > found[-1][2]:
            found.append(point)
    return found


def _round_times(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten from `low` to `high`; of a wide range only the powers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) <= 5 else (1,)
    return [t for t in (d * 10.0**p for p in powers for d in digits) if low <= t <= high]


def _side(x: float) -> str:
    return "start" if x < WIDTH / 3 else "end" if x > WIDTH * 2 / 3 else "middle"
