"""`pinakes verify`: the command that looks whether a version is whole (see cluster/verify.py)."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.console import Json, Quiet, progress, show

app = typer.Typer()


@app.command(epilog="Example: pinakes verify 3f2a91c04be7d815 --root pinakes-data. The current one of an alias: "
             "pinakes verify --name wikipedia --deep")  # fmt: skip
def verify(
    version: Annotated[str | None, typer.Argument(help="A version; without it, the alias's current one.")] = None,
    root: Annotated[
        str, typer.Option("--root", help="The root folder or s3:// URL.", envvar="PINAKES_ROOT")
    ] = "pinakes-data",
    name: Annotated[str | None, typer.Option(help="The index, or alias; needed when the root holds several.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Passages encoded and searched again; 0: none.")] = 32,
    deep: Annotated[bool, typer.Option("--deep", help="Read the embedding parts whole: checksums and values.")] = False,
    address: Annotated[
        str | None, typer.Option(help="A cluster that shares the work: `auto`, host:port, ray://…")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a version as one unit: files, ids, passages, vectors, encoders. Exit code 5 when anything is wrong."""
    from cluster import verify as checking
    from pipelines.errors import ArtifactError

    result = checking.verify(root, name, version, sample, deep, address, progress(quiet))
    show(result, json_, checking.summary)
    if result["state"] != "sound":
        raise typer.Exit(ArtifactError.exit_code)
