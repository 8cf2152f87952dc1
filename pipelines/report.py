"""Draw the report of an index version: one HTML page that stands alone, from the manifest and an evaluation.

The page needs no script, no network and no other file; it follows the reader's light or dark theme and prints. What a
manifest does not hold is left out. Everything that comes from a manifest is escaped.
"""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.evaluate import STAGES, metric_rows

MAX_SHARD_BARS = 16
MAX_OPEN_FILES = 12


class Html(str):
    """Text that is markup already; any other string is escaped when it enters the page."""

    __slots__ = ()


def render_report(manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """Return the report of a version as one self-contained HTML page.

    manifest: the version's manifest. evaluation: a dict of `score_retrieval`, to which `latency` (of `percentiles`)
    and `recall` ({"k", "value", "ci95", "num_queries", "target"}) may be added; None when nothing was evaluated yet.
    """
    found = _mapping(evaluation)
    name, version = str(manifest.get("name", "index")), str(manifest.get("version", "?"))
    sections = [
        ("what", "What this version is", _what(manifest)),
        ("quality", "Quality", _quality(manifest, found)),
        ("latency", "Search latency", _latency(_mapping(found.get("latency")))),
        ("build", "Build", _build(manifest)),
        ("files", "Files", _files(_mapping(manifest.get("files")))),
        ("config", "Configuration", _config(manifest.get("config"))),
        ("packages", "Packages", _packages(_mapping(manifest.get("packages")))),
    ]
    shown = [section for section in sections if section[2]]
    links = _join(f'<a href="#{key}">{_text(title)}</a>' for key, title, _ in shown)
    body = _join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{_text(title)}</h2>{content}</section>'
        for key, title, content in shown
    )
    created = f" · built {manifest['created']}" if manifest.get("created") else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(name)} {_text(version)} · Pinakes</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="over">Pinakes · index version</p><h1>{_text(name)}</h1>'
        f'<p class="under">{_text("version " + version + created)}</p>{_tiles(manifest, found)}</header>\n'
        f'<nav aria-label="Sections">{links}</nav>\n<main>{body}</main>\n</body>\n</html>\n'
    )


# --- sections ----------------------------------------------------------------------------------------------------


def _tiles(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Html:
    recall = _recalls(manifest, evaluation)
    p95 = _number(_mapping(evaluation.get("latency")).get("p95_ms"))
    index_bytes = sum(_index_sizes(manifest).values())
    tiles = [
        ("passages", _short_count(manifest.get("num_rows"))),
        ("dimensions", _count(manifest.get("dim"))),
        ("index size", _bytes(index_bytes) if index_bytes else None),
    ]
    if recall:
        tiles.append((f"recall@{recall[0]['k']} vs exact", _percent(recall[0]["value"])))
    for label, scores in metric_rows(evaluation)[:1]:
        k = min(scores, key=lambda k: abs(k - 20))
        tiles.append((label.replace("top k", f"top {k}").lower(), _percent(scores[k])))
    tiles.append(("search, 95th percentile", _milliseconds(p95) if p95 is not None else None))
    items = _join(f"<div><dt>{_text(t)}</dt><dd>{_text(v)}</dd></div>" for t, v in tiles if v not in (None, ""))
    return Html(f'<dl class="tiles">{items}</dl>' if items else "")


def _what(manifest: Mapping[str, Any]) -> Html:
    encoder = dict(_mapping(manifest.get("encoder")))
    encoder.pop("dim", None)
    known = [
        ("Name", manifest.get("name")),
        ("Version", manifest.get("version")),
        ("Created", manifest.get("created")),
        ("Corpus", manifest.get("corpus")),
        ("Corpus snapshot", manifest.get("snapshot")),
        ("Embeddings", manifest.get("embeddings")),
        ("Passages", _count(manifest.get("num_rows"))),
        ("Dimensions", _count(manifest.get("dim"))),
        ("Index factory", manifest.get("factory")),
        ("Metric", manifest.get("metric")),
        ("Shards", _count(manifest.get("num_shards"))),
        ("Search parameters", _inline(manifest.get("search_params"))),
    ]
    first = [key for key in ("family", "checkpoint", "fingerprint") if key in encoder]
    order = first + [key for key in encoder if key not in first]
    about_encoder = [(_words(key), _inline(encoder[key])) for key in order]
    tables = _facts("Version", known) + _facts("Encoder", about_encoder)
    return Html(f'<div class="pair">{tables}</div>' if tables else "")


def _quality(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Html:
    rows = metric_rows(evaluation)
    parts = [_recall_chart(_recalls(manifest, evaluation))]
    if rows:
        ks = sorted({k for _, scores in rows for k in scores})
        cells = [[label, *(_percent(scores[k]) if k in scores else "" for k in ks)] for label, scores in rows]
        curves = [(label, scores) for label, scores in rows if len(scores) > 1]
        parts.append(_line_chart("accuracy", "Accuracy at k", curves))
        parts.append(_table("Retrieval scores", ["Measure", *(f"k = {k}" for k in ks)], cells))
        parts.append(_facts("Evaluation", _evaluation_facts(evaluation)))
        parts.append(_depth_note(evaluation, ks))
    else:
        note = "No questions have been evaluated on this version yet; <code>pinakes evaluate</code> adds their scores."
        parts.append(Html(f"<p>{note}</p>"))
    return _join(parts)


def _evaluation_facts(evaluation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    known = {
        "num_questions": "Questions",
        "num_gold_questions": "Questions with a gold passage",
        "num_answer_questions": "Questions with an answer",
        "depth": "Most hits of a question",
    }
    told_elsewhere = ("em", "answer_em", "latency", "recall", *STAGES)
    shown = {key: v for key, v in evaluation.items() if "@" not in str(key) and key not in told_elsewhere}
    facts = [(known.get(key, _words(key)), _count(value) or _inline(value)) for key, value in shown.items()]
    for stage in STAGES:
        nested = _mapping(evaluation.get(stage))
        settings = {key: nested[key] for key in ("checkpoint", "depth", "seconds") if key in nested}
        facts += [(_words(stage), _inline(settings))] if settings else []
    return facts


def _depth_note(evaluation: Mapping[str, Any], ks: Sequence[int]) -> Html:
    depth = _number(evaluation.get("depth"))
    if depth is None or depth >= max(ks):
        return Html("")
    note = f"No question had more than {depth:,.0f} hits: a score at a larger k is the score at {depth:,.0f}."
    return Html(f'<p class="note">{_text(note)}</p>')


def _latency(latency: Mapping[str, Any]) -> Html:
    names = {"p50_ms": "Median", "p95_ms": "95th percentile", "p99_ms": "99th percentile"}
    found = [(label, value) for key, label in names.items() if (value := _number(latency.get(key))) is not None]
    bars = [(label, value, _milliseconds(value)) for label, value in found]
    exact = [(label, f"{value:,.2f} ms") for label, value in found]
    others = [(_words(key), _count(value) or _inline(value)) for key, value in latency.items() if key not in names]
    chart = _bar_chart("latency-bars", "Latency percentiles", bars)
    return _join([chart, _facts("Time to answer one query", exact + others)])


def _build(manifest: Mapping[str, Any]) -> Html:
    timings = _mapping(manifest.get("timings_seconds"))
    stages = [(str(key), seconds) for key, value in timings.items() if (seconds := _number(value)) is not None]
    total = sum(seconds for _, seconds in stages)
    rows = [[name, f"{s:,.1f}", _duration(s), _percent(s / total) if total else ""] for name, s in stages]
    if len(rows) > 1:
        rows.append([Html("<strong>total</strong>"), f"{total:,.1f}", _duration(total), ""])
    bars = [(name, seconds, _duration(seconds)) for name, seconds in stages]
    return _join(
        [
            _bar_chart("stages", "Time by stage", bars),
            _table("Time by stage", ["Stage", "Seconds", "Time", "Share"], rows),
            _facts("Encoding", _encoding_facts(_mapping(manifest.get("throughput")))),
            _shards(manifest),
            _facts("Size in memory and on disk", _size_facts(manifest)),
        ]
    )


def _encoding_facts(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the figures of the embeddings' Throughput."""
    shares = {
        "padding_share": "Padding, of the tokens computed",
        "encoder_busy_share": "Encoders busy",
        "reader_busy_share": "Readers and tokenisers busy",
        "writer_busy_share": "Writers busy",
    }
    facts: list[tuple[str, Any]] = []
    tokens, passages = _number(found.get("tokens_per_second")), _number(found.get("rows_per_second"))
    if tokens is not None and passages is not None:
        facts.append(("Speed", f"{tokens:,.0f} tokens/s, {passages:,.0f} passages/s"))
        facts.append(("Encoders", f"{_count(found.get('num_encoders'))} ({found.get('device')})"))
    facts += [
        (label, _percent(value)) for key, label in shares.items() if (value := _number(found.get(key))) is not None
    ]
    achieved, limit = _number(found.get("achieved_flops")), _number(found.get("limit_flops"))
    if achieved and limit:
        told = f"{achieved / 1e9:,.0f} of {limit / 1e9:,.0f} GFLOP/s ({_percent(achieved / limit)})"
        facts.append((f"Matrix products while busy, of the {found.get('compute')} limit", told))
    return [*facts, ("Bottleneck", found.get("bottleneck"))]


def _shards(manifest: Mapping[str, Any]) -> Html:
    sizes = _index_sizes(manifest)
    if 1 < len(sizes) <= MAX_SHARD_BARS:
        return _bar_chart("shard-sizes", "Index bytes by shard", [(n, s, _bytes(s)) for n, s in sizes.items()])
    return Html("")


def _size_facts(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    files = _mapping(manifest.get("files"))
    sizes = list(_index_sizes(manifest).values())
    passages = sum(_size(entry) for name, entry in files.items() if str(name).startswith("passages"))
    num_rows, dim = _number(manifest.get("num_rows")), _number(manifest.get("dim"))
    facts: list[tuple[str, Any]] = []
    if sizes:
        facts.append(("Index, held in memory to search", _bytes(sum(sizes))))
        spread = f"{_bytes(min(sizes))} / {_bytes(statistics.median(sizes))} / {_bytes(max(sizes))}"
        facts.append(("Index of a shard: smallest / median / largest", spread))
    if sizes and num_rows:
        plain = f", of {dim * 4:,.0f} as fp32" if dim else ""
        facts.append(("Index bytes a passage", f"{sum(sizes) / num_rows:,.1f}{plain}"))
    if passages:
        facts.append(("Passages, memory-mapped", _bytes(passages)))
    memory = _mapping(manifest.get("memory_bytes"))
    return facts + [(f"Peak memory: {_words(key).lower()}", _bytes(_number(value))) for key, value in memory.items()]


def _files(files: Mapping[str, Any]) -> Html:
    rows = []
    for name in sorted(files, key=str):
        entry = _mapping(files[name])
        digest = Html(f"<code>{_text(str(entry.get('sha256', ''))[:16])}</code>")
        rows.append([name, _count(entry.get("num_rows")) or "", _bytes(_size(entry)), digest])
    total = _bytes(sum(_size(entry) for entry in files.values()))
    table = _table(f"{len(rows)} files, {total}", ["File", "Rows", "Size", "SHA-256 begins with"], rows)
    if len(rows) <= MAX_OPEN_FILES:
        return table
    return Html(f"<details><summary>{len(rows)} files, {total}</summary>{table}</details>")


def _config(config: Any) -> Html:
    if not config:
        return Html("")
    import yaml

    plain = json.loads(json.dumps(config, default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return Html(
        f'<details><summary>The resolved configuration</summary><pre tabindex="0">{_text(text)}</pre></details>'
    )


def _packages(packages: Mapping[str, Any]) -> Html:
    return _facts("Versions of what built it", [(str(key), value) for key, value in packages.items()])


def _recalls(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measured recalls, the build's first, each with a label and its numbers checked."""
    recalls = []
    for label, holder in (("at publishing", manifest), ("in evaluation", evaluation)):
        recall = _mapping(holder.get("recall"))
        value = _number(recall.get("value"))
        if value is not None:
            numbers = {key: _number(recall.get(key)) for key in ("ci95", "target", "num_queries")}
            recalls.append({"label": label, "k": recall.get("k", "k"), "value": value, **numbers})
    return recalls


def _index_sizes(manifest: Mapping[str, Any]) -> dict[str, float]:
    files = _mapping(manifest.get("files"))
    return {str(n): _size(files[n]) for n in sorted(files, key=str) if re.match(r"shard-.*\.faiss$", str(n))}


# --- charts ------------------------------------------------------------------------------------------------------

WIDTH = 760
MARKS = (
    '<circle cx="{x}" cy="{y}" r="5">{tip}</circle>',
    '<rect x="{x0}" y="{y0}" width="9" height="9">{tip}</rect>',
    '<path d="M{x} {y0}l6 5.5-6 5.5-6-5.5z">{tip}</path>',
    '<path d="M{x} {y0}l6 10h-12z">{tip}</path>',
)


def _svg(name: str, title: str, description: str, height: float, content: Iterable[str]) -> Html:
    return Html(
        f"<figure><figcaption>{_text(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{_text(title)}</title><desc id="{name}-d">{_text(description)}</desc>'
        f"{_join(content)}</svg></figure>"
    )


def _label(x: float, y: float, text: Any, anchor: str = "middle", style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{_text(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _mark(kind: int, x: float, y: float, tip: str = "") -> str:
    inner = f"<title>{_text(tip)}</title>" if tip else ""
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


def _line_chart(name: str, title: str, series: Sequence[tuple[str, Mapping[int, float]]]) -> Html:
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
        marks = _join(_mark(i, *spots[k], f"{label}, k = {k}: {_percent(points[k])}") for k in points)
        legend = _mark(i, left + 8, 18 + 22 * i) + _label(left + 22, 22 + 22 * i, label, "start")
        parts.append(f'<g class="s{i % len(MARKS)}"><polyline points="{path}"/>{marks}{legend}</g>')
    parts += _point_labels(series, at)
    spoken = "; ".join(f"{label}: " + ", ".join(f"{_percent(v)} at {k}" for k, v in p.items()) for label, p in series)
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


def _bar_chart(name: str, title: str, bars: Sequence[tuple[str, float, str]]) -> Html:
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
            f"<title>{_text(f'{label}: {words}')}</title></rect>"
        )
        parts.append(_label(left + width + 8, middle + 4, words, "start", "value"))
    spoken = "; ".join(f"{label}: {words}" for label, _, words in bars)
    return _svg(name, title, spoken, step * len(bars) + 8, [_line(left, 4, left, step * len(bars) + 4, "axis"), *parts])


def _recall_chart(recalls: Sequence[Mapping[str, Any]]) -> Html:
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
        words = _percent(value, 2) + (f" ± {reach * 100:.2f}" if reach else "")
        parts.append(_label(12, middle - 3, f"recall@{recall['k']} {recall['label']}", "start"))
        parts.append(_label(12, middle + 15, words + _queries(recall["num_queries"]), "start", "value"))
        parts.append(_line(at(value - reach), middle, at(value + reach), middle, "whisker"))
        if recall["target"] is not None:
            x = at(recall["target"])
            parts += [_line(x, middle - 14, x, middle + 14, "target"), _label(x, middle - 18, "target", style="tick")]
        parts.append(f'<g class="s0">{_mark(0, at(value), middle, words)}</g>')
        aim = f", target {_percent(recall['target'])}" if recall["target"] is not None else ""
        spoken.append(f"recall@{recall['k']} {recall['label']}: {words}{_queries(recall['num_queries'])}{aim}")
    return _svg("recall", "Recall against exact search", "; ".join(spoken), bottom + 28, parts)


def _queries(count: float | None) -> str:
    return f" on {count:,.0f} queries" if count else ""


# --- small pieces ------------------------------------------------------------------------------------------------


def _text(value: Any) -> Html:
    """Escape a value; what no page may hold (control characters, half surrogate pairs) becomes U+FFFD."""
    if isinstance(value, Html):
        return value
    clean = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))
    return Html(html.escape(clean, quote=True))


def _join(parts: Iterable[str]) -> Html:
    return Html("".join(parts))


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Html:
    if not rows:
        return Html("")
    head = _join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = _join(
        f'<tr><th scope="row">{_text(row[0])}</th>{_join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return Html(
        f'<div class="scroll"><table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _facts(caption: str, pairs: Iterable[tuple[str, Any]]) -> Html:
    rows = _join(
        f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>'
        for key, value in pairs
        if value is not None and value != ""
    )
    if not rows:
        return Html("")
    caption = _text(caption)
    return Html(
        f'<div class="scroll"><table class="facts"><caption>{caption}</caption><tbody>{rows}</tbody></table></div>'
    )


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _size(entry: Any) -> float:
    return _number(_mapping(entry).get("bytes")) or 0.0


def _words(key: Any) -> str:
    text = str(key).removeprefix("num_").replace("_", " ").strip()
    return text[:1].upper() + text[1:]


def _inline(value: Any) -> str:
    """Return a value on one line: mappings as `a = 1, b = 2`, lists with commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_inline(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_inline, value))
    return "" if value is None else str(value)


def _count(value: Any) -> str | None:
    number = _number(value)
    return f"{number:,.0f}" if number is not None and number == int(number) else None


def _short_count(value: Any) -> str | None:
    number = _number(value)
    if number is None or number < 1e7:
        return _count(value)
    return f"{number / 1e6:,.1f} M" if number < 1e9 else f"{number / 1e9:,.2f} G"


def _percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f}%"


def _bytes(count: float | None) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count is not None and (count < 1000 or unit == "TB"):
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count = count / 1000 if count is not None else None
    return ""


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1d2329;--soft:#565f68;--rule:#dcd9d1;--accent:#7a3b12;--link:#1f5a99;
--c0:#1f5fa8;--c1:#b4530f;--c2:#16705e;--c3:#7a2f86;--zebra:#f5f3ee}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1c2126;--ink:#e6e8ea;--soft:#a3adb6;--rule:#363d45;
--accent:#e0a878;--link:#8cbcf0;--c0:#7fb2ee;--c1:#f0a05a;--c2:#63c9ad;--c3:#d59be0;--zebra:#20262c}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:.1rem 0;font:600 2.3rem/1.15 Georgia,"Times New Roman",serif;overflow-wrap:anywhere}
h2{margin:0 0 1rem;font:600 1.35rem/1.3 Georgia,"Times New Roman",serif}
.over{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.09em;text-transform:uppercase}
.under,.note{margin:.2rem 0 0;color:var(--soft);overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.7rem;margin:1.4rem 0 0}
.tiles div{display:flex;flex-direction:column-reverse;justify-content:flex-end;padding:.7rem .9rem;
background:var(--card);border:1px solid var(--rule);border-radius:8px}
.tiles dt{color:var(--soft);font-size:.8rem;line-height:1.3}
.tiles dd{margin:0;font-size:1.25rem;font-weight:600;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1.4rem 0;padding:.6rem 0;border-block:1px solid var(--rule)}
a{color:var(--link)}
section{margin:0 0 1.25rem;padding:1.4rem 1.5rem;background:var(--card);border:1px solid var(--rule);border-radius:10px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:0 2rem}
.scroll{overflow-x:auto}
table{width:100%;margin:.4rem 0 1rem;border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption,figcaption{padding:.3rem 0;color:var(--soft);font-size:.85rem;font-weight:600;text-align:left}
th,td{padding:.36rem .6rem;border-top:1px solid var(--rule);text-align:right;vertical-align:top;unicode-bidi:isolate}
th{font-weight:500;text-align:left;overflow-wrap:anywhere}
thead th{color:var(--soft);font-size:.82rem;text-align:right;white-space:nowrap}
thead th:first-child{text-align:left}
tbody tr:nth-child(even){background:var(--zebra)}
.facts th{width:42%;color:var(--soft)}
.facts td{text-align:left;overflow-wrap:anywhere}
figure{margin:0 0 1.2rem}
svg{display:block;width:100%;height:auto;font-family:inherit;font-size:13px}
svg text{fill:var(--ink)}
svg .tick{fill:var(--soft);font-size:12px;paint-order:stroke;stroke:var(--card);stroke-width:4px}
svg .value{font-size:12px;font-weight:600;paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--rule)}
.axis{stroke:var(--soft)}
.target{stroke:var(--c1);stroke-width:2;stroke-dasharray:4 3}
.whisker{stroke:var(--c0);stroke-width:6;stroke-opacity:.35;stroke-linecap:round}
.bar{fill:var(--c0)}
polyline{fill:none;stroke-width:2.5;stroke-linejoin:round}
.s0{fill:var(--c0)}.s0 polyline{stroke:var(--c0)}
.s1{fill:var(--c1)}.s1 polyline{stroke:var(--c1);stroke-dasharray:7 4}
.s2{fill:var(--c2)}.s2 polyline{stroke:var(--c2);stroke-dasharray:2 4}
.s3{fill:var(--c3)}.s3 polyline{stroke:var(--c3);stroke-dasharray:9 3 2 3}
pre,code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.85rem}
pre{overflow-x:auto;padding:1rem;background:var(--zebra);border-radius:6px}
summary{cursor:pointer;font-weight:500}
@media(max-width:36rem){body{padding:1.2rem .6rem}section{padding:1rem .8rem}
figure{overflow-x:auto}svg{min-width:36rem}}
@media print{body{max-width:none;padding:0}nav{display:none}section{break-inside:avoid;border:0;padding:0}}
"""
