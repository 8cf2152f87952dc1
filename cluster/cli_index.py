"""`pinakes plan`, the indexes that a corpus can have before anything is built, and `pinakes rebuild`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.console import Json, Quiet, load, progress, show

if TYPE_CHECKING:
    from rich.table import Table

    from cluster.progress import Progress
    from pipelines.config import Config

app = typer.Typer()
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key of CONFIG.")]


@app.command(epilog="Example: pinakes plan --rows 21015324 --dim 768 --memory 32GB. For a corpus that was ingested: "
             "pinakes plan configs/wikipedia-dpr.yaml --memory 32GB. For one that was encoded, by trying: pinakes plan "
             "configs/wikipedia-dpr.yaml --pilot --min-recall 0.95 --memory 8GB --p95-ms 20")  # fmt: skip
def plan(
    config: Annotated[
        str | None, typer.Argument(help="A YAML config, for rows, width, metric, shards.", metavar="[CONFIG]")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Passages; from CONFIG, those of its snapshot.")] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width of the vectors; from CONFIG, its encoder's.")] = None,
    metric: Annotated[Literal["ip", "l2"] | None, typer.Option(help="ip if nothing else is said.")] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Shards, which each repeat the quantizer.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="What a replica may use, e.g. 8GB or 8GiB: says which indexes fit.")
    ] = None,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Try them on a sample of CONFIG's embeddings: recall, time, memory.")
    ] = False,
    min_recall: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --pilot: recall@10 wanted; else the config's, or 0.95.")
    ] = None,
    p95_ms: Annotated[
        float | None, typer.Option(min=0.001, help="With --pilot: what 95 of 100 searches may take, on one core.")
    ] = None,
    set_: Overrides = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the indexes that are valid for a corpus, best expected recall first, with their memory. Builds nothing.

    With --pilot each is tried on a sample and tuned to the recall wanted, and the cheapest within the limits is named;
    exit code 7 when there is none.
    """
    from pipelines.errors import ConfigError
    from pipelines.sizes import parse_bytes

    loaded = load(config, set_) if config else None
    budget = parse_bytes(memory) if memory is not None else None
    if pilot and (loaded is None or any(given is not None for given in (rows, dim, metric, shards))):
        raise ConfigError("a pilot tries indexes on embeddings", where="pinakes plan --pilot",
                          expected="a CONFIG whose corpus is encoded, and none of --rows, --dim, --metric, --shards",
                          hint="plan without --pilot for a corpus that is not there yet")  # fmt: skip
    if pilot and loaded is not None:
        _show_pilot(loaded, min_recall, budget, p95_ms, progress(quiet), json_)
        return
    if min_recall is not None or p95_ms is not None:
        raise ConfigError("only a pilot knows recall and time", where="pinakes plan", hint="add --pilot")
    show(candidates_for(loaded, rows, dim, metric, shards, budget), json_, plan_table)


def candidates_for(
    config: Config | None,
    rows: int | None,
    dim: int | None,
    metric: Literal["ip", "l2"] | None,
    shards: int | None,
    budget: int | None,
) -> dict[str, Any]:
    """Return the candidates, what they are for, and whether each fits `budget` bytes; what is given beats `config`.

    Raises ConfigError when rows or width are neither given nor to be had from the config.
    """
    from pipelines.errors import ConfigError
    from pipelines.index.candidates import candidates

    if config is None and (rows is None or dim is None):
        raise ConfigError("how many vectors of what width is not clear", where="pinakes plan",
                          expected="a CONFIG, or both --rows and --dim")  # fmt: skip
    if config is not None:
        rows, dim = rows or _num_rows(config), dim or _dim(config)
        metric = metric or (None if config.index.metric == "auto" else config.index.metric)
        shards = shards or config.index.num_shards or -(-rows // config.index.max_shard_rows)
    assert rows is not None
    assert dim is not None
    metric, shards = metric or "ip", min(shards or 1, rows)
    found = [c.as_dict(budget) for c in candidates(rows, dim, metric, shards)]
    told = {"num_rows": rows, "dim": dim, "metric": metric, "num_shards": shards, "budget_bytes": budget}
    fitting = [c for c in found if c["fits"]]
    best = next((c["factory"] for c in fitting), None)
    quick = next((c["factory"] for c in fitting if c["search"] != "scan"), None)
    return {**told, "candidates": found, "best": best, "best_without_scan": quick}


def plan_table(result: dict[str, Any]) -> Table:
    """Return the candidates as a table for the terminal."""
    from rich.table import Table

    from pipelines.sizes import human_bytes

    budget = result["budget_bytes"]
    shards = f" in {result['num_shards']} shards" if result["num_shards"] > 1 else ""
    title = f"Indexes for {result['num_rows']:,} vectors of width {result['dim']} ({result['metric']}){shards}"
    advice = "Recall is what such codes usually allow; set index.min_recall, and the build tunes, measures and refuses."
    if budget is not None:
        named = dict.fromkeys(f for f in (result["best"], result["best_without_scan"]) if f)
        best = ", or without a scan ".join(named) or "none"
        advice = f"Best that fits {human_bytes(budget)}: {best}. {advice}"
    table = Table(title=title, caption=advice)
    table.add_column("factory", no_wrap=True)
    table.add_column("recall")
    table.add_column("search")
    table.add_column("B/vector", justify="right")
    table.add_column("memory", justify="right")
    if budget is not None:
        table.add_column("fits")
    for c in result["candidates"]:
        size = f"{c['bytes_per_vector']:,.0f}"
        fits = ["yes" if c["fits"] else "no"] if budget is not None else []
        table.add_row(c["factory"], c["recall"], c["search"], size, human_bytes(c["memory_bytes"]), *fits)
    return table


def _show_pilot(
    config: Config, min_recall: float | None, budget: int | None, max_ms: float | None, told: Progress, as_json: bool
) -> None:
    """Print what the pilot found. Raises its refusal, after the table, when nothing can be chosen."""
    from cluster.plan import plan_with_pilot

    result = plan_with_pilot(config, min_recall, budget, max_ms, told)
    refusal = result.pop("refusal")
    if not (refusal and as_json):
        show(result, as_json, pilot_table)
    if refusal:
        raise refusal


def pilot_table(result: dict[str, Any]) -> Table:
    """Return the forecasts as a table for the terminal, the cheapest that keeps the target first."""
    from rich.table import Table

    from pipelines.index.candidates import named
    from pipelines.sizes import human_bytes

    title = f"Forecasts for {result['num_rows']:,} vectors of width {result['dim']}, recall@10 of {result['target']}"
    chosen = named(result["chosen"], result["refine"]) if result["chosen"] else "none"
    untried = "".join(f" Not tried: {', '.join(names)}: {why}." for why, names in result["untried"].items())
    table = Table(title=title, caption=f"Chosen: {chosen}. `index.factory: auto` builds it.{untried}")
    for name in ("factory", "setting", "recall", "ms", "p95 ms", "memory", "disk", "train", "add", ""):
        table.add_column(name, no_wrap=name == "factory", justify="left" if name in ("factory", "setting") else "right")
    for f in result["candidates"]:
        refined = ["vectors on disk"] if f["refine"] == "exact" else []
        setting = ", ".join([*refined, *(f"{name} {value}" for name, value in f["params"].items())])
        times = [f"{f['train_seconds']:,.0f} s", f"{f['add_seconds']:,.0f} s"]
        sizes = [human_bytes(f["memory_bytes"]), human_bytes(f["index_bytes"])]
        said = "too low" if not f["reached"] else "" if f["fits"] else "too large or slow"
        recall = f"{f['recall']:.3f} ± {f['half_width']:.3f}"
        table.add_row(f["factory"], setting, recall, f"{f['ms']:.3g}", f"{f['p95_ms']:.3g}", *sizes, *times, said)
    return table


def _num_rows(config: Config) -> int:
    from pipelines import corpus
    from pipelines.errors import ConfigError

    snapshot = corpus.find_snapshot(config.root, corpus.plan_ingest(config.corpus))
    if snapshot is None:
        raise ConfigError(
            f"the corpus {config.corpus.name!r} has no snapshot that says how many passages it holds",
            where=config.root,
            expected="--rows, or a corpus that was ingested",
            hint="run `pinakes ingest CONFIG` first, or pass --rows",
        )
    return int(snapshot["num_rows"])


def _dim(config: Config) -> int:
    from pipelines.encode import describe_encoder
    from pipelines.models.fetch import fetch

    encoder = config.encoder
    info, _ = describe_encoder(encoder.checkpoint, fetch(encoder.checkpoint), encoder.similarity, encoder.formatting)
    return int(info.dim)


@app.command(epilog="Example: pinakes rebuild configs/paq-256.yaml --encoder configs/paq-728.yaml")
def rebuild(
    config: Annotated[str, typer.Argument(help="The YAML config of the published index.", metavar="CONFIG")],
    encoder: Annotated[str, typer.Option(help="A YAML config whose `encoder` is taken.", metavar="CONFIG")],
    set_: Overrides = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the published snapshot with another encoder, evaluate both versions, and show them side by side."""
    from cluster import rebuild as rebuilding

    chosen = load(encoder, None).encoder
    show(rebuilding.rebuild(load(config, set_), chosen, progress(quiet)), json_, rebuilding.rebuild_summary)
