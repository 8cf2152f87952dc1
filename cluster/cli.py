"""The `pinakes` command: every verb, on this machine or on a cluster.

Exit codes: 0 done · 1 failed · 2 config or usage · 3 input · 4 checkpoint · 5 artifact · 6 storage · 7 quality gate ·
8 server · 130 interrupted. Results go to stdout (with --json as one JSON object), progress and errors to stderr.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from cluster import cli_files, cli_index, cli_keys, cli_switch, cli_vectors, cli_verify, signals
from cluster.cli_switch import Force
from cluster.console import Json, Quiet, load, progress, show
from pipelines.errors import PinakesError

app = typer.Typer(
    name="pinakes",
    help="Embed a large corpus and build the index that serves it, on Ray.",
    epilog="Start with: pinakes demo. Your own corpus: pinakes run configs/NAME.yaml. Exit codes: 0 done, 1 failed, "
    "2 config or usage, 3 input, 4 checkpoint, 5 artifact, 6 storage, 7 quality gate, 8 server, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[str, typer.Argument(help="A YAML config (see configs/).", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key, e.g. --set index.factory=Flat.")]
Root = Annotated[str, typer.Option("--root", help="The root folder or s3:// URL.", envvar="PINAKES_ROOT")]


def main() -> None:
    """Run the command; turn our errors into a message and an exit code."""
    try:
        with signals.handled():
            app()
    except PinakesError as error:
        _fail(error)
    except SystemExit as end:
        signals.say_goodbye(end.code)
        raise


def _fail(error: PinakesError) -> None:
    if "--json" in sys.argv:
        print(json.dumps(error.as_dict(), ensure_ascii=False))
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


@app.command(epilog="Example: pinakes run configs/demo.yaml --set index.factory=HNSW32")
def run(
    config: ConfigPath, set_: Overrides = None, force: Force = False, json_: Json = False, quiet: Quiet = False
) -> None:
    """Do the whole job: ingest, encode, index, evaluate (if there are questions), promote if the gate lets it."""
    from cluster import jobs, summaries

    result = jobs.run(load(config, set_), progress(quiet), force)
    show(result, json_, summaries.run_summary)


@app.command(epilog="Example: pinakes ingest configs/demo.yaml --json")
def ingest(config: ConfigPath, set_: Overrides = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Validate the sources and cut them into a snapshot of parts; bad rows go to quarantine."""
    from cluster import jobs, summaries

    show(jobs.ingest(load(config, set_), progress(quiet)), json_, summaries.ingest_summary)


@app.command(epilog="Example: pinakes encode configs/demo.yaml --set encoder.compute=fp32")
def encode(config: ConfigPath, set_: Overrides = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Embed every part of the snapshot that is not embedded yet."""
    from cluster import jobs, summaries

    show(jobs.encode(load(config, set_), progress(quiet)), json_, summaries.encode_summary)


@app.command(epilog="Example: pinakes index configs/demo.yaml --set index.factory=IVF256,SQ8")
def index(config: ConfigPath, set_: Overrides = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Train, add, merge, verify and publish a version. The alias is set if it does not exist yet."""
    from cluster import jobs, summaries

    show(jobs.index(load(config, set_), progress(quiet)), json_, summaries.index_summary)


@app.command(
    epilog="Example: pinakes evaluate configs/demo.yaml --questions questions.jsonl. A published figure on your own "
    "weights and data: pinakes evaluate --reproduce NAME --input checkpoint=DIR --input questions=FILE; without inputs "
    "it says what NAME needs, and `pinakes models --published` lists the names."
)
def evaluate(
    config: Annotated[str | None, typer.Argument(help="A YAML config (see configs/).", metavar="CONFIG")] = None,
    questions: Annotated[str | None, typer.Option(help="JSONL or DPR qas file instead of the config's.")] = None,
    version: Annotated[str | None, typer.Option(help="A version instead of the alias's current one.")] = None,
    reproduce: Annotated[str | None, typer.Option(help="Rerun this published figure instead.", metavar="NAME")] = None,
    input_: Annotated[list[str] | None, typer.Option("--input", help="For --reproduce: KEY=PATH, repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="For --reproduce: only the first questions.")] = None,
    device: Annotated[str, typer.Option(help="For --reproduce: cpu or cuda.")] = "cpu",
    set_: Overrides = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a version: top-k accuracy, MRR, nDCG, EM, recall; after reranking and reading, too, if configured."""
    from cluster import jobs, summaries
    from pipelines.errors import ConfigError

    if (config is None) == (reproduce is None):
        raise ConfigError("what to evaluate is not clear", expected="a CONFIG, or --reproduce NAME")
    if reproduce is not None:
        from cluster import local

        show(
            local.reproduce(reproduce, input_ or [], limit, device, progress(quiet)),
            json_,
            summaries.reproduction_summary,
        )
        return
    assert config is not None
    overrides = [*(set_ or []), *([f"evaluate.questions={json.dumps(questions)}"] if questions else [])]
    result = jobs.evaluate(load(config, overrides), version, progress(quiet))
    show(result, json_, summaries.evaluation_summary)


@app.command(epilog="Example: pinakes serve configs/demo.yaml --set serve.port=8080")
def serve(config: ConfigPath, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Serve the alias over HTTP until Ctrl-C: the search page, POST /search, GET /passages/{id}."""
    from cluster import jobs

    jobs.serve_until_interrupted(load(config, set_), progress(quiet))


@app.command(epilog='Example: pinakes search "who invented the telephone" --root pinakes-data --name wikipedia -k 5')
def search(
    query: Annotated[str, typer.Argument(help="What to search for.")],
    root: Root = "pinakes-data",
    name: Annotated[str | None, typer.Option(help="The index; needed when the root holds several.")] = None,
    version: Annotated[str | None, typer.Option(help="A version instead of the alias's current one.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits.")] = 10,
    filter_: Annotated[
        str | None, typer.Option("--filter", help='By metadata, as JSON: {"lang": "en", "year": {"gte": 1990}}.')
    ] = None,
    rerank: Annotated[str | None, typer.Option(help="Reorder 50 hits by this cross-encoder or PAQ reranker.")] = None,
    answer: Annotated[str | None, typer.Option(help="Answer by this reader (or `stored`) from 20 hits.")] = None,
    tokeniser: Annotated[str | None, typer.Option(help="T5's tokeniser, for a FiD reader.")] = None,
    url: Annotated[str | None, typer.Option(help="Ask the server there instead.", metavar="http://HOST:PORT")] = None,
    key: Annotated[str | None, typer.Option(help="With --url: an API key.", envvar="PINAKES_KEY")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="With --url: rerank or answer; repeatable.")] = None,
    json_: Json = False,
) -> None:
    """Search a version in this process, without a server; or, with --url, on a server."""
    from cluster import local, summaries

    where = None if filter_ is None else local.read_filter(filter_)
    if url is not None:
        from cluster import remote

        found = remote.search(url, key, query, with_ or [], k=k, alias=name, version=version, filter=where)
        show(found, json_, summaries.search_summary)
        return
    stages = local.stages(rerank, answer, tokeniser)
    show(local.search(root, name, version, query, k, *stages, where), json_, summaries.search_summary)


@app.command(epilog="Example: pinakes status --root s3://bucket/pinakes --json")
def status(root: Root = "pinakes-data", json_: Json = False) -> None:
    """List snapshots, embeddings, versions and aliases, finished or under way."""
    from cluster import local, summaries

    show(local.status(root), json_, summaries.status_summary)


@app.command(epilog="Example: pinakes models --released --json")
def models(
    released: Annotated[bool, typer.Option(help="List the released checkpoints, too.")] = False,
    published: Annotated[bool, typer.Option(help="List the figures that `evaluate --reproduce` reruns.")] = False,
    json_: Json = False,
) -> None:
    """List the model families: how each lies on disk and what it computes."""
    from cluster import local, summaries

    show(local.models(released, published), json_, summaries.models_summary)


@app.command(epilog="Example: pinakes inspect sentence-transformers/all-MiniLM-L6-v2")
def inspect(
    target: Annotated[str, typer.Argument(help="A checkpoint (directory, URL, hub name) or a file of the root.")],
    json_: Json = False,
) -> None:
    """Say what a checkpoint is and gives (dimension, similarity, length, prompts), or what a file of the root holds."""
    from cluster import local, summaries

    show(local.inspect(target), json_, summaries.plain_summary)


@app.command(epilog="Example: pinakes demo --once")
def demo(
    once: Annotated[
        bool, typer.Option("--once", help="Ask one question over HTTP, print the answer and stop.")
    ] = False,
    config: Annotated[str, typer.Option(help="The config to run.")] = "configs/demo.yaml",
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Run the whole job on the documentation of the installed Python packages, then serve it."""
    from cluster import jobs

    jobs.demo(load(config, set_), once, progress(quiet))


app.add_typer(cli_files.app)
app.add_typer(cli_index.app)
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_switch.app)
app.add_typer(cli_vectors.app)
app.add_typer(cli_verify.app)
