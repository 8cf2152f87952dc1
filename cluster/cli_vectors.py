"""The commands of the `pinakes` command that exchange vectors with other tools (see pipelines/interchange)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.console import Json, Quiet, load, progress, show

if TYPE_CHECKING:
    from pipelines.encode import EncoderSpec

app = typer.Typer()

Root = Annotated[str, typer.Option("--root", help="The root folder or s3:// URL.", envvar="PINAKES_ROOT")]


@app.command(
    "import-vectors",
    epilog="Example: pinakes import-vectors 'wikipedia_passages_*.pkl' --root pinakes-data --corpus wikipedia "
    "--encoder configs/wikipedia-dpr.yaml --strip-prefix wiki:",
)
def import_vectors(
    sources: Annotated[
        list[str], typer.Argument(help="DPR's pickles, PAQ's .pt, .npy, Parquet: files, globs, folders.")
    ],
    corpus: Annotated[str, typer.Option(help="The corpus whose passages the vectors are of.")],
    encoder: Annotated[str, typer.Option(help="The encoder that made them: a YAML config, or a checkpoint.")],
    root: Root = "pinakes-data",
    snapshot: Annotated[str | None, typer.Option(help="Of the corpus; needed when it has several.")] = None,
    ids: Annotated[
        str | None, typer.Option(help="Ids of .npy or .pt, in order: .txt, .jsonl, .npy or index_meta.dpr.")
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Row i of the files is passage i of the snapshot (PAQ's .pt).")
    ] = False,
    strip_prefix: Annotated[str, typer.Option(help="Take this off the ids (DPR: wiki:).")] = "",
    trust: Annotated[
        bool, typer.Option("--trust", help="Do not encode a sample again to see that the encoder made them.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make vectors of another tool the embeddings of a snapshot; `index` then builds on them."""
    from cluster import summaries
    from pipelines.interchange import vectors_in
    from pipelines.interchange.sources import find_sources, settle_ids

    found, told = tuple(find_sources(sources)), progress(quiet)
    settled = settle_ids(found, ids, by_position)
    manifest = vectors_in.find_snapshot(root, corpus, snapshot)
    plan = vectors_in.ImportPlan(root, manifest, _encoder(encoder), found, settled, strip_prefix, trust)
    with told.stage("import") as stage:
        result = vectors_in.import_vectors(plan, lambda num: stage.advance(0, rows=num))
        stage.advance()
    show({**result, "stages": told.stages}, json_, summaries.encode_summary)


@app.command(
    "export-vectors",
    epilog="Example: pinakes export-vectors --root pinakes-data --name wikipedia --to exported --format npy",
)
def export_vectors(
    to: Annotated[str, typer.Option(help="The folder (or s3:// URL) to write to.")],
    root: Root = "pinakes-data",
    name: Annotated[str | None, typer.Option(help="The index; needed when the root holds several.")] = None,
    version: Annotated[str | None, typer.Option(help="A version instead of the alias's current one.")] = None,
    format_: Annotated[
        Literal["npy", "parquet"], typer.Option("--format", help="vectors.npy with ids.txt, or Parquet parts.")
    ] = "npy",
    titles: Annotated[bool, typer.Option("--titles", help="Parquet: with a column of titles.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the vectors of a version as files that any tool reads."""
    from cluster import summaries
    from pipelines import publish
    from pipelines.interchange.vectors_out import Export, embeddings_of, export_vectors

    told = progress(quiet)
    found = publish.read_version(root, name or _only_index(root), version)
    export = Export(root, embeddings_of(root, found), to, format_, titles)
    with told.stage("export") as stage:
        result = export_vectors(export, lambda num: stage.advance(0, rows=num))
        stage.advance()
    show({"to": to, **_told(result)}, json_, summaries.plain_summary)


@app.command(
    "import-index",
    epilog="Example: pinakes import-index dpr_index.hnsw.SQ8.index.dpr --ids dpr_index.hnsw.SQ8.index_meta.dpr "
    "--corpus wikipedia --encoder configs/wikipedia-dpr.yaml --name wikipedia-dpr",
)
def import_index(
    file: Annotated[str, typer.Argument(help="A FAISS file of DPR or PAQ: flat, SQ8 or HNSW, also L2-augmented.")],
    corpus: Annotated[str, typer.Option(help="The corpus whose passages the index is of.")],
    encoder: Annotated[str, typer.Option(help="The encoder that made its vectors: a YAML config, or a checkpoint.")],
    name: Annotated[str, typer.Option(help="The index that it becomes a version of.")],
    root: Root = "pinakes-data",
    snapshot: Annotated[str | None, typer.Option(help="Of the corpus; needed when it has several.")] = None,
    ids: Annotated[
        str | None, typer.Option(help="Ids in the index's order: index_meta.dpr, .txt, .jsonl, .npy.")
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Vector i is of passage i of the snapshot (PAQ).")
    ] = False,
    strip_prefix: Annotated[str, typer.Option(help="Take this off the ids (DPR: wiki:).")] = "",
    trust: Annotated[
        bool, typer.Option("--trust", help="Do not encode a sample again to see that the encoder made them.")
    ] = False,
    ef_search: Annotated[int | None, typer.Option(min=1, help="Of an HNSW; without it as the file says.")] = None,
    min_recall: Annotated[float | None, typer.Option(min=0, max=1, help="Refuse to publish below this.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a FAISS file that another tool built as a version, with its passages and its query encoder."""
    from cluster import summaries
    from pipelines.errors import ConfigError
    from pipelines.interchange import index_in
    from pipelines.interchange.sources import BY_POSITION, id_source
    from pipelines.interchange.vectors_in import find_snapshot

    if bool(ids) == by_position:
        raise ConfigError("whose vectors these are is not clear", expected="either --ids FILE or --by-position")
    told, manifest, spec = progress(quiet), find_snapshot(root, corpus, snapshot), _encoder(encoder)
    settled = id_source(ids) if ids else BY_POSITION
    params = {"efSearch": ef_search} if ef_search else {}
    more: dict[str, Any] = {"strip_prefix": strip_prefix, "trust": trust, "min_recall": min_recall, "params": params}
    with told.stage("import", 1) as stage:
        result = index_in.import_index(index_in.plan_import(root, name, manifest, spec, file, settled, **more))
        stage.advance(rows=result["num_rows"])
    show({**result, "stages": told.stages}, json_, summaries.index_summary)


def _told(manifest: dict[str, Any]) -> dict[str, Any]:
    return {key: manifest[key] for key in ("format", "num_rows", "dim", "snapshot", "parts")}


def _encoder(given: str) -> EncoderSpec:
    """Resolve the encoder of a config file, or of a checkpoint with our defaults."""
    from pipelines.config import EncoderConfig
    from pipelines.encode import resolve

    if not given.endswith((".yaml", ".yml")):
        return resolve(EncoderConfig(checkpoint=given))
    config = load(given, None)
    return resolve(config.encoder, on_gpu=config.cluster.gpus_per_worker > 0)


def _only_index(root: str) -> str:
    from pipelines import publish
    from pipelines.errors import ConfigError

    names = publish.list_aliases(root)
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise ConfigError("which index is meant is not clear", where=root, expected=f"--name, one of: {found}")
    return names[0]
