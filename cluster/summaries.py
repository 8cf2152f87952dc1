"""The human-readable form of each verb's result (strings and rich tables)."""

from __future__ import annotations

from typing import Any

from rich.console import Group


def ingest_summary(result: dict[str, Any]) -> str:
    refused = result["num_quarantined"]
    reasons = ", ".join(f"{n} {reason}" for reason, n in result["quarantine_reasons"].items())
    return (
        f"snapshot {result['snapshot']} of corpus {result['corpus']!r}: {result['num_rows']:,} passages in "
        f"{len(result['parts'])} parts, {refused:,} rows quarantined" + (f" ({reasons})" if reasons else "")
    )


def encode_summary(result: dict[str, Any]) -> str:
    encoder, dim = result["encoder"], result["dim"]
    refused = result.get("num_quarantined", 0)
    told = (
        f"snapshot {result['snapshot']}: {result['num_rows']:,} {dim}-d vectors "
        f"({encoder['storage']}, from {encoder['compute']}) by {encoder['checkpoint']} [{encoder['fingerprint']}]"
        + (f", {refused:,} of them zero: not encodable, see quarantine.parquet" if refused else "")
    )
    return "\n".join([told, *encoding_lines(result)])


def index_summary(result: dict[str, Any]) -> str:
    return "\n".join([version_line(result), *encoding_lines(result)])


def version_line(version: dict[str, Any]) -> str:
    recall = version["recall"]
    told = f", recall@{recall['k']} {recall['value']:.4f} ± {recall['ci95']:.4f}" if recall else ""
    return (
        f"index {version['name']!r} version {version['version']}: {version['num_rows']:,} vectors, "
        f"{version['factory']}, {version['num_shards']} shard{'s' if version['num_shards'] > 1 else ''}{told}"
    )


def encoding_lines(result: dict[str, Any]) -> list[str]:
    """Return how fast the encoding was and what held it back; nothing when this run and those before did not say."""
    stage = result.get("stages", {}).get("encode", {})
    found = stage.get("throughput")
    if not found:
        return []
    when = "" if stage["made"] else "encoded before: "
    rates = f"{found['tokens_per_second']:,.0f} tokens/s ({found['rows_per_second']:,.0f} passages/s)"
    busy = f"padding {found['padding_share']:.1%}, encoders busy {found['encoder_busy_share']:.0%}"
    return [
        f"{when}{found['num_tokens']:,} tokens in {found['seconds']:,.1f} s: {rates}, {busy}",
        f"{_flops_told(found)}bottleneck: {found['bottleneck']} ({_busy_told(found)})",
    ]


def _flops_told(found: dict[str, Any]) -> str:
    achieved, limit = found["achieved_flops"], found["limit_flops"]
    if not achieved or not limit:  # word vectors multiply no matrices
        return ""
    unit, name = (1e12, "TFLOP/s") if limit >= 1e13 else (1e9, "GFLOP/s")
    of = f"{found['num_devices']} x " if found["num_devices"] > 1 else ""
    return (
        f"{achieved / unit:,.4g} of {limit / unit:,.4g} {name} while busy "
        f"({found['limit_share']:.0%} of {of}the {found['compute']} matrix limit); "
    )


def _busy_told(found: dict[str, Any]) -> str:
    """Return the numbers behind the bottleneck."""
    if found["bottleneck"] == "start-up":
        return f"{found['start_seconds']:.1f} of {found['seconds']:.1f} s"
    helpers = f"readers busy {found['reader_busy_share']:.0%}, writers {found['writer_busy_share']:.0%}"
    return f"{helpers}, start-up {found['start_seconds']:.1f} s"


def run_summary(result: dict[str, Any]) -> Any:
    lines: list[Any] = [version_line(result["version"]), *encoding_lines(result)]
    if result["evaluation"]:
        lines.append(evaluation_summary(result["evaluation"]))
    return Group(*lines, "alias " + "\n".join(alias_lines(result["alias"])))


def alias_lines(state: dict[str, Any]) -> list[str]:
    """Return where an alias points, and what the gate found if it was moved just now."""
    found = [f"  {check['state']:<8} {check['check']}: {check['what']}" for check in state.get("gate", [])]
    return [f"{state['name']} -> {state['current']}", *found]


def evaluation_summary(result: dict[str, Any]) -> Any:
    from pipelines.evaluate import format_table

    return format_table(result)


def search_summary(result: dict[str, Any]) -> str:
    lines = [f"{result['query']}    (version {result['version']}, {sum_ms(result['took_ms']):.0f} ms)"]
    for answer in result.get("answers", [])[:3]:
        source = f"  [{answer['passage']}]" if answer.get("passage") else ""
        lines.append(f"   answer: {answer['text']}{source}  {answer['score']:.2f}")
    for rank, hit in enumerate(result["hits"], 1):
        text = hit["text"] if len(hit["text"]) <= 300 else hit["text"][:300] + "…"
        reranked = f"  rerank {hit['rerank_score']:.2f}" if hit.get("rerank_score") is not None else ""
        lines += [f"\n{rank}. {hit['title'] or hit['id']}  [{hit['id']}]  {hit['score']:.4f}{reranked}", f"   {text}"]
        lines += [f"   answers: {', '.join(hit['answers'])}"] if hit.get("answers") else []
    return "\n".join(lines)


def sum_ms(took: dict[str, float]) -> float:
    return took.get("total") or sum(took.values())


def status_summary(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table("what", "name", "state", "rows", "details", title=f"root {result['root']}")
    for s in result["snapshots"]:
        detail = f"{s['num_quarantined']} quarantined" if "num_quarantined" in s else _unfinished(s)
        table.add_row("snapshot", f"{s['corpus']}/{s['snapshot']}", s["state"], str(s.get("num_rows", "")), detail)
    for e in result["embeddings"]:
        detail = f"{e['dim']}-d" if "dim" in e else _unfinished(e)
        table.add_row("embeddings", f"{e['snapshot']}/{e['encoder']}", e["state"], str(e.get("num_rows", "")), detail)
    for v in result["versions"]:
        detail = f"{v['factory']}, {v['num_shards']} shards" if "factory" in v else _unfinished(v)
        table.add_row("version", f"{v['name']}/{v['version']}", v["state"], str(v.get("num_rows", "")), detail)
    for a in result["aliases"]:
        table.add_row("alias", a["name"], f"-> {a['current']}", "", f"previous {a['previous'] or 'none'}")
    return table


def _unfinished(entry: dict[str, Any]) -> str:
    return f"{entry['files_done']} files done; run its step again to go on"


def models_summary(result: dict[str, Any]) -> Any:
    from rich.table import Column, Table

    table = Table(Column("family", no_wrap=True), "on disk", "computes", show_lines=True)
    for name, family in result["families"].items():
        table.add_row(f"{name}\n({family['kind']})", family["layout"], family["computes"])
    parts: list[Any] = [table]
    if "released" in result:
        listed = Table("released checkpoint", "family", "group", "beyond its files")
        for row in result["released"]:
            told = [f"{key}: {row[key]}" for key in ("similarity", "formatting") if row[key]]
            listed.add_row(row["name"], row["family"], row["group"], ", ".join(told))
        parts.append(listed)
    if "published" in result:
        parts.append("published figures (pinakes evaluate --reproduce NAME):\n" + "\n".join(result["published"]))
    return Group(*parts)


def reproduction_summary(result: dict[str, Any]) -> Any:
    from pipelines.reproduce import format_reproduction

    return format_reproduction(result)


def scored_summary(result: dict[str, Any]) -> Any:
    from pipelines.evaluate import metric_rows

    parts: list[Any] = [f"written to {result['out']}"]
    return Group(*parts, *([evaluation_summary(result)] if metric_rows(result) else []))


def plain_summary(result: dict[str, Any]) -> str:
    return "\n".join(f"{key:<18} {value}" for key, value in result.items())
