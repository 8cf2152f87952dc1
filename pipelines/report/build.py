"""The sections of a page on how a version was built and what it takes: time, lists, sizes, files."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Any

from pipelines.report.charts import bar_chart
from pipelines.report.pieces import (
    Html,
    as_mapping,
    as_number,
    in_words,
    join,
    size_of,
    to_bytes,
    to_count,
    to_duration,
    to_facts,
    to_percent,
    to_table,
    to_text,
)

MAX_SHARD_BARS = 16
MAX_OPEN_FILES = 12


def build_section(manifest: Mapping[str, Any]) -> Html:
    timings = as_mapping(manifest.get("timings_seconds"))
    stages = [(str(key), seconds) for key, value in timings.items() if (seconds := as_number(value)) is not None]
    total = sum(seconds for _, seconds in stages)
    rows = [[name, f"{s:,.1f}", to_duration(s), to_percent(s / total) if total else ""] for name, s in stages]
    if len(rows) > 1:
        rows.append([Html("<strong>total</strong>"), f"{total:,.1f}", to_duration(total), ""])
    bars = [(name, seconds, to_duration(seconds)) for name, seconds in stages]
    return join(
        [
            bar_chart("stages", "Time by stage", bars),
            to_table("Time by stage", ["Stage", "Seconds", "Time", "Share"], rows),
            to_facts("Encoding", _encoding_facts(as_mapping(manifest.get("throughput")))),
            _shards(manifest),
            to_facts("Size in memory and on disk", _size_facts(manifest)),
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
    tokens, passages = as_number(found.get("tokens_per_second")), as_number(found.get("rows_per_second"))
    if tokens is not None and passages is not None:
        facts.append(("Speed", f"{tokens:,.0f} tokens/s, {passages:,.0f} passages/s"))
        facts.append(("Encoders", f"{to_count(found.get('num_encoders'))} ({found.get('device')})"))
    facts += [
        (label, to_percent(value)) for key, label in shares.items() if (value := as_number(found.get(key))) is not None
    ]
    achieved, limit = as_number(found.get("achieved_flops")), as_number(found.get("limit_flops"))
    if achieved and limit:
        told = f"{achieved / 1e9:,.0f} of {limit / 1e9:,.0f} GFLOP/s ({to_percent(achieved / limit)})"
        facts.append((f"Matrix products while busy, of the {found.get('compute')} limit", told))
    return [*facts, ("Bottleneck", found.get("bottleneck"))]


def _shards(manifest: Mapping[str, Any]) -> Html:
    sizes = index_sizes(manifest)
    if 1 < len(sizes) <= MAX_SHARD_BARS:
        return bar_chart("shard-sizes", "Index bytes by shard", [(n, s, to_bytes(s)) for n, s in sizes.items()])
    return Html("")


def _size_facts(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    files = as_mapping(manifest.get("files"))
    sizes = list(index_sizes(manifest).values())
    passages = sum(size_of(entry) for name, entry in files.items() if str(name).startswith("passages"))
    num_rows, dim = as_number(manifest.get("num_rows")), as_number(manifest.get("dim"))
    facts: list[tuple[str, Any]] = []
    if sizes:
        facts.append(("Index, held in memory to search", to_bytes(sum(sizes))))
        spread = f"{to_bytes(min(sizes))} / {to_bytes(statistics.median(sizes))} / {to_bytes(max(sizes))}"
        facts.append(("Index of a shard: smallest / median / largest", spread))
    if sizes and num_rows:
        plain = f", of {dim * 4:,.0f} as fp32" if dim else ""
        facts.append(("Index bytes a passage", f"{sum(sizes) / num_rows:,.1f}{plain}"))
    vectors = sum(size_of(entry) for name, entry in files.items() if str(name).startswith("vectors-"))
    if vectors:
        facts.append(("Vectors to refine with, memory-mapped", to_bytes(vectors)))
    if passages:
        facts.append(("Passages, memory-mapped", to_bytes(passages)))
    memory = as_mapping(manifest.get("memory_bytes"))
    return facts + [
        (f"Peak memory: {in_words(key).lower()}", to_bytes(as_number(value))) for key, value in memory.items()
    ]


def files_section(files: Mapping[str, Any]) -> Html:
    rows = []
    for name in sorted(files, key=str):
        entry = as_mapping(files[name])
        digest = Html(f"<code>{to_text(str(entry.get('sha256', ''))[:16])}</code>")
        rows.append([name, to_count(entry.get("num_rows")) or "", to_bytes(size_of(entry)), digest])
    total = to_bytes(sum(size_of(entry) for entry in files.values()))
    table = to_table(f"{len(rows)} files, {total}", ["File", "Rows", "Size", "SHA-256 begins with"], rows)
    if len(rows) <= MAX_OPEN_FILES:
        return table
    return Html(f"<details><summary>{len(rows)} files, {total}</summary>{table}</details>")


def index_sizes(manifest: Mapping[str, Any]) -> dict[str, float]:
    files = as_mapping(manifest.get("files"))
    return {str(n): size_of(files[n]) for n in sorted(files, key=str) if re.match(r"shard-.*\.faiss$", str(n))}
