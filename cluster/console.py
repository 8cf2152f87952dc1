"""What the commands share: their common options, and how a config comes in and a result goes out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.progress import Progress
    from pipelines.config import Config

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def load(path: str, overrides: list[str] | None) -> Config:
    """Return the config of a file with the `--set` options over it."""
    from pipelines.config import load_config

    return load_config(path, overrides)


def progress(quiet: bool) -> Progress:
    from cluster.progress import Progress

    return Progress(quiet)


def show(result: dict[str, Any], as_json: bool, summary: Any) -> None:
    """Print the result on stdout: as JSON, or as `summary(result)` draws it for people."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    from rich.console import Console

    Console(highlight=False).print(summary(result), markup=False)
