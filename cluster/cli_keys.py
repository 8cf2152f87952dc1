"""The verbs of API keys: create, list, revoke."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.console import Json, show

if TYPE_CHECKING:
    from pipelines.access_keys import AccessKey, KeyFile

app = typer.Typer(
    name="keys",
    help="Make, list and revoke the API keys of a server with `serve.require_key`.",
    epilog="Example: pinakes keys create reading-room --days 90",
    no_args_is_help=True,
)

Root = Annotated[str, typer.Option("--root", help="The root folder or s3:// URL.", envvar="PINAKES_ROOT")]
File = Annotated[str | None, typer.Option("--keys", help="The file (serve.keys) instead of keys.json in the root.")]


@app.command(epilog="Example: pinakes keys create reading-room --scope search --days 90 --root s3://bucket/pinakes")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scope: Annotated[list[str] | None, typer.Option(help="search (default) or admin; repeatable.")] = None,
    days: Annotated[float | None, typer.Option(help="Days until it expires; without it never.")] = None,
    root: Root = "pinakes-data",
    keys: File = None,
    json_: Json = False,
) -> None:
    """Make a key and show it, for the only time: the file keeps a hash. Servers know it within seconds."""
    key, record = _file(root, keys).create(name, scope or ["search"], days)
    show(
        {"key": key, **_told(record)}, json_, lambda r: f"{r['key']}\n\n{_line(r)}\nkeep the key now: it is not stored"
    )


@app.command("list", epilog="Example: pinakes keys list --root s3://bucket/pinakes")
def list_(root: Root = "pinakes-data", keys: File = None, json_: Json = False) -> None:
    """List the keys by their ids, names, scopes and dates."""
    told = {"keys": [_told(record) for record in _file(root, keys).read()]}
    show(told, json_, lambda r: "\n".join(map(_line, r["keys"])) or "no keys; make one with `pinakes keys create NAME`")


@app.command(epilog="Example: pinakes keys revoke 3f2a91c0 --root s3://bucket/pinakes")
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id, as listed; it is also in the key itself.", metavar="ID")],
    root: Root = "pinakes-data",
    keys: File = None,
    json_: Json = False,
) -> None:
    """Take a key back. Servers refuse it within seconds."""
    show(_told(_file(root, keys).revoke(key_id)), json_, lambda r: f"revoked: {_line(r)}")


def _file(root: str, keys: str | None) -> KeyFile:
    from pipelines.access_keys import KeyFile, default_url

    return KeyFile(keys or default_url(root))


def _told(record: AccessKey) -> dict[str, Any]:
    state = "expired" if record.expired() else "good"
    return {
        "id": record.id,
        "name": record.name,
        "scopes": list(record.scopes),
        "created": record.created,
        "expires": record.expires,
        "state": state,
    }


def _line(told: dict[str, Any]) -> str:
    until = f"expires {told['expires']}" if told["expires"] else "never expires"
    expired = " (expired)" if told["state"] == "expired" else ""
    return f"{told['id']}  {told['name']}  {', '.join(told['scopes'])}  made {told['created']}, {until}{expired}"
