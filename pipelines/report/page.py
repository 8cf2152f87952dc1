"""Draw the report of an index version: one HTML page that stands alone, from the manifest and an evaluation.

The page needs no script, no network and no other file; it follows the reader's light or dark theme and prints. What a
manifest does not hold is left out. Everything that comes from a manifest is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluate import STAGES, metric_rows
from pipelines.report.build import build_section, files_section, index_sizes
from pipelines.report.charts import accuracy_chart, bar_chart, recall_chart
from pipelines.report.pieces import (
    Html,
    as_mapping,
    as_number,
    in_words,
    join,
    on_one_line,
    short_count,
    to_bytes,
    to_count,
    to_facts,
    to_milliseconds,
    to_percent,
    to_table,
    to_text,
)
from pipelines.report.style import STYLE
from pipelines.report.tuning import forecast_section, lists_section, tuning_part


def render_report(manifest: Mapping[str, Any], evaluation: Mapping[str, Any] | None = None) -> str:
    """Return the report of a version as one self-contained HTML page.

    manifest: the version's manifest. evaluation: a dict of `score_retrieval`, to which `latency` (of `percentiles`)
    and `recall` ({"k", "value", "ci95", "num_queries", "target"}) may be added; None when nothing was evaluated yet.
    """
    found = as_mapping(evaluation)
    name, version = str(manifest.get("name", "index")), str(manifest.get("version", "?"))
    sections = [
        ("what", "What this version is", _what(manifest)),
        ("quality", "Quality", _quality(manifest, found)),
        ("latency", "Search latency", _latency(as_mapping(found.get("latency")))),
        ("build", "Build", build_section(manifest)),
        ("forecast", "Forecast and outcome", forecast_section(as_mapping(manifest.get("forecast")))),
        ("lists", "Balance of the lists", lists_section(as_mapping(manifest.get("lists")))),
        ("files", "Files", files_section(as_mapping(manifest.get("files")))),
        ("config", "Configuration", _config(manifest.get("config"))),
        ("packages", "Packages", _packages(as_mapping(manifest.get("packages")))),
    ]
    shown = [section for section in sections if section[2]]
    links = join(f'<a href="#{key}">{to_text(title)}</a>' for key, title, _ in shown)
    body = join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{to_text(title)}</h2>{content}</section>'
        for key, title, content in shown
    )
    created = f" · built {manifest['created']}" if manifest.get("created") else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{to_text(name)} {to_text(version)} · Pinakes</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><p class="over">Pinakes · index version</p><h1>{to_text(name)}</h1>'
        f'<p class="under">{to_text("version " + version + created)}</p>{_tiles(manifest, found)}</header>\n'
        f'<nav aria-label="Sections">{links}</nav>\n<main>{body}</main>\n</body>\n</html>\n'
    )


def _tiles(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Html:
    recall = _recalls(manifest, evaluation)
    p95 = as_number(as_mapping(evaluation.get("latency")).get("p95_ms"))
    index_bytes = sum(index_sizes(manifest).values())
    tiles = [
        ("passages", short_count(manifest.get("num_rows"))),
        ("dimensions", to_count(manifest.get("dim"))),
        ("index size", to_bytes(index_bytes) if index_bytes else None),
    ]
    if recall:
        tiles.append((f"recall@{recall[0]['k']} vs exact", to_percent(recall[0]["value"])))
    for label, scores in metric_rows(evaluation)[:1]:
        k = min(scores, key=lambda k: abs(k - 20))
        tiles.append((label.replace("top k", f"top {k}").lower(), to_percent(scores[k])))
    tiles.append(("search, 95th percentile", to_milliseconds(p95) if p95 is not None else None))
    items = join(f"<div><dt>{to_text(t)}</dt><dd>{to_text(v)}</dd></div>" for t, v in tiles if v not in (None, ""))
    return Html(f'<dl class="tiles">{items}</dl>' if items else "")


def _what(manifest: Mapping[str, Any]) -> Html:
    encoder = dict(as_mapping(manifest.get("encoder")))
    encoder.pop("dim", None)
    known = [
        ("Name", manifest.get("name")),
        ("Version", manifest.get("version")),
        ("Created", manifest.get("created")),
        ("Corpus", manifest.get("corpus")),
        ("Corpus snapshot", manifest.get("snapshot")),
        ("Embeddings", manifest.get("embeddings")),
        ("Passages", to_count(manifest.get("num_rows"))),
        ("Dimensions", to_count(manifest.get("dim"))),
        ("Index factory", manifest.get("factory")),
        ("Metric", manifest.get("metric")),
        ("Shards", to_count(manifest.get("num_shards"))),
        ("Search parameters", on_one_line(manifest.get("search_params"))),
    ]
    first = [key for key in ("family", "checkpoint", "fingerprint") if key in encoder]
    order = first + [key for key in encoder if key not in first]
    about_encoder = [(in_words(key), on_one_line(encoder[key])) for key in order]
    tables = to_facts("Version", known) + to_facts("Encoder", about_encoder)
    return Html(f'<div class="pair">{tables}</div>' if tables else "")


def _quality(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Html:
    rows = metric_rows(evaluation)
    parts = [recall_chart(_recalls(manifest, evaluation)), tuning_part(as_mapping(manifest.get("recall")), manifest)]
    if rows:
        ks = sorted({k for _, scores in rows for k in scores})
        cells = [[label, *(to_percent(scores[k]) if k in scores else "" for k in ks)] for label, scores in rows]
        curves = [(label, scores) for label, scores in rows if len(scores) > 1]
        parts.append(accuracy_chart("accuracy", "Accuracy at k", curves))
        parts.append(to_table("Retrieval scores", ["Measure", *(f"k = {k}" for k in ks)], cells))
        parts.append(to_facts("Evaluation", _evaluation_facts(evaluation)))
        parts.append(_depth_note(evaluation, ks))
    else:
        note = "No questions have been evaluated on this version yet; <code>pinakes evaluate</code> adds their scores."
        parts.append(Html(f"<p>{note}</p>"))
    return join(parts)


def _evaluation_facts(evaluation: Mapping[str, Any]) -> list[tuple[str, Any]]:
    known = {
        "num_questions": "Questions",
        "num_gold_questions": "Questions with a gold passage",
        "num_answer_questions": "Questions with an answer",
        "depth": "Most hits of a question",
    }
    told_elsewhere = ("em", "answer_em", "latency", "recall", *STAGES)
    shown = {key: v for key, v in evaluation.items() if "@" not in str(key) and key not in told_elsewhere}
    facts = [(known.get(key, in_words(key)), to_count(value) or on_one_line(value)) for key, value in shown.items()]
    for stage in STAGES:
        nested = as_mapping(evaluation.get(stage))
        settings = {key: nested[key] for key in ("checkpoint", "depth", "seconds") if key in nested}
        facts += [(in_words(stage), on_one_line(settings))] if settings else []
    return facts


def _depth_note(evaluation: Mapping[str, Any], ks: Sequence[int]) -> Html:
    depth = as_number(evaluation.get("depth"))
    if depth is None or depth >= max(ks):
        return Html("")
    note = f"No question had more than {depth:,.0f} hits: a score at a larger k is the score at {depth:,.0f}."
    return Html(f'<p class="note">{to_text(note)}</p>')


def _latency(latency: Mapping[str, Any]) -> Html:
    names = {"p50_ms": "Median", "p95_ms": "95th percentile", "p99_ms": "99th percentile"}
    found = [(label, value) for key, label in names.items() if (value := as_number(latency.get(key))) is not None]
    bars = [(label, value, to_milliseconds(value)) for label, value in found]
    exact = [(label, f"{value:,.2f} ms") for label, value in found]
    others = [
        (in_words(key), to_count(value) or on_one_line(value)) for key, value in latency.items() if key not in names
    ]
    chart = bar_chart("latency-bars", "Latency percentiles", bars)
    return join([chart, to_facts("Time to answer one query", exact + others)])


def _config(config: Any) -> Html:
    if not config:
        return Html("")
    import yaml

    plain = json.loads(json.dumps(config, default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return Html(
        f'<details><summary>The resolved configuration</summary><pre tabindex="0">{to_text(text)}</pre></details>'
    )


def _packages(packages: Mapping[str, Any]) -> Html:
    return to_facts("Versions of what built it", [(str(key), value) for key, value in packages.items()])


def _recalls(manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the measured recalls, the build's first, each with a label and its numbers checked."""
    recalls = []
    for label, holder in (("at publishing", manifest), ("in evaluation", evaluation)):
        recall = as_mapping(holder.get("recall"))
        value = as_number(recall.get("value"))
        if value is not None:
            numbers = {key: as_number(recall.get(key)) for key in ("ci95", "target", "num_queries")}
            recalls.append({"label": label, "k": recall.get("k", "k"), "value": value, **numbers})
    return recalls
