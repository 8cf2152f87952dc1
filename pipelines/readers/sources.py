"""What the sources name: files, globs, folders and URLs, each file with what its listing says. Local, s3:// and https://."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError
from pipelines.readers.files import is_http, is_local, locate, size_of, storage_errors, version_of


@dataclass(frozen=True)
class Found:
    """A file that a source names. base: the part of `url`, up to a `/`, that comes before anything the source matches.

    size, version: as the listing had them; -1 and empty where there is no listing.
    """

    url: str
    base: str
    size: int = -1
    version: str = ""


def expand(sources: str | Sequence[str]) -> list[Found]:
    """Return the files that `sources` name: each source in the order given, what it matches in sorted order.

    A source is a file, a glob, a folder (all files below it, except names that begin with `_` or `.`), or the URL of
    one file. Raises InputError when there is no source, when one matches nothing, or when a file comes twice.
    """
    sources = [sources] if isinstance(sources, str) else sources
    files = [file for source in sources for file in _expand_one(source)]
    if not files:
        raise InputError("no sources were given", expected="at least one path, glob or URL")
    urls = [file.url for file in files]
    twice = {url for url in urls if urls.count(url) > 1} if len(set(urls)) < len(urls) else None
    if twice:
        raise InputError("a file is among the sources twice", where=min(twice), expected="every file once")
    return files


def _expand_one(source: str) -> list[Found]:
    fs, path = locate(source)
    if is_http(source):
        return [Found(_check_http(fs, source), source[: source.rfind("/") + 1])]
    with storage_errors(source):
        base, found = _found_by(fs, path)
    if not found:
        what = "no file matches" if _is_glob(path) else "there is no such file, nor a folder with files"
        raise InputError(f"{what}: {source}", where=path, expected="a file, a glob, or a folder with files",
                         hint="check the path; a relative one starts in the folder the command runs in")  # fmt: skip
    return [_listed(fs, source, base, name, found[name]) for name in sorted(found)]


def _listed(fs: Any, source: str, base: str, name: str, info: dict[str, Any]) -> Found:
    url = name if is_local(source) else fs.unstrip_protocol(name)
    size = info.get("size")
    return Found(url, url.removesuffix(name[len(base) :]), -1 if size is None else int(size), version_of(info))


def _found_by(fs: Any, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the folder that the matched names are relative to, and what the listing says of each."""
    try:
        info = fs.info(path)
    except FileNotFoundError:
        matches = fs.glob(path, detail=True) if _is_glob(path) else {}
        fixed = path[: min((path.find(c) for c in "*?[" if c in path), default=len(path))]
        return fixed[: fixed.rfind("/") + 1], {name: i for name, i in matches.items() if i["type"] == "file"}
    if info["type"] == "file":
        return path[: path.rfind("/") + 1], {path: info}
    found = fs.find(path, detail=True)
    return path.rstrip("/") + "/", {name: i for name, i in found.items() if not _is_hidden(name[len(path) :])}


def _check_http(fs: Any, url: str) -> str:
    if "*" in url:
        raise InputError("a web server has no listing to match a glob with", where=url, expected="the URL of each file")
    size_of(url)
    return url


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _is_hidden(relative: str) -> bool:
    return any(piece.startswith(("_", ".")) for piece in relative.split("/"))
