"""The verbs that move an alias: `promote` and `rollback`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster.console import Json, show

app = typer.Typer()

Name = Annotated[str, typer.Argument(help="The alias (the index's name).")]
Root = Annotated[str, typer.Option("--root", help="The root folder or s3:// URL.", envvar="PINAKES_ROOT")]
Force = Annotated[bool, typer.Option("--force", help="Promote it also if it scores worse; never with damaged files.")]
Loss = Annotated[
    float | None, typer.Option(min=0, max=1, help="The most that a score may fall.  [default: the server's, or 0.01]")
]
Address = Annotated[str | None, typer.Option(help="The Ray cluster that serves it, if it runs elsewhere.")]


Prepare = Annotated[
    bool,
    typer.Option("--prepare", help="Only load it beside the current version, for requests and the page to compare the "
                 "two; it goes after 20 minutes."),
]  # fmt: skip


@app.command(epilog="Example: pinakes promote wikipedia 3f2a91c04be7d815 --root pinakes-data")
def promote(
    name: Name,
    version: Annotated[str, typer.Argument(help="A published version.")],
    root: Root = "pinakes-data",
    max_quality_loss: Loss = None,
    force: Force = False,
    prepare: Prepare = False,
    address: Address = None,
    json_: Json = False,
) -> None:
    """Check a version, load it on every replica that serves, and point the alias to it."""
    from cluster.switch import prepare_from_here, promote_from_here

    settings = {} if max_quality_loss is None else {"max_quality_loss": max_quality_loss}
    if prepare:
        show(prepare_from_here(root, name, version, settings, address), json_, _prepared)
        return
    show(promote_from_here(root, name, version, settings, force, address), json_, _summary)


@app.command(epilog="Example: pinakes rollback wikipedia --root pinakes-data")
def rollback(name: Name, root: Root = "pinakes-data", address: Address = None, json_: Json = False) -> None:
    """Point an alias back to its previous version, at once: the replicas still hold it."""
    from cluster.switch import rollback_from_here

    show(rollback_from_here(root, name, address), json_, _summary)


def _prepared(result: dict[str, Any]) -> str:
    from cluster.summaries import alias_lines

    seconds, version = result["seconds"]["prepare"], result["prepared"]
    lines = [*alias_lines(result), f"  {_counted(result['replicas'])}: loaded {version} beside it in {seconds:.2f} s; "
             "requests and the page may name it"]  # fmt: skip
    return "\n".join(lines)


def _summary(result: dict[str, Any]) -> str:
    from cluster.summaries import alias_lines

    lines, behind = alias_lines(result), result.get("behind", 0)
    if result["replicas"]:
        seconds = result["seconds"]
        lines += [f"  {_counted(result['replicas'])}: loaded in {seconds['prepare']:.2f} s, switched in "
                  f"{seconds['switch']:.3f} s"]  # fmt: skip
    elif not behind:
        lines += ["  no server within reach was told; those that follow this root do so within seconds"]
    if behind:
        lines += [f"  {_counted(behind)} did not switch, or not with all shards: {result['cause']}"]
    return "\n".join(lines)


def _counted(number: int) -> str:
    return f"{number} {'replica' if number == 1 else 'replicas'}"
