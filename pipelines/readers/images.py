"""Read image files: each file is a row, its name the id and the text, its bytes the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipelines.errors import ConfigError, InputError
from pipelines.pixels import open_image, require_pillow
from pipelines.readers.base import ReadOptions, RefusedRowError, Reject, Row, Split, oversized
from pipelines.readers.files import file_version, format_of, open_text
from pipelines.readers.sources import Found

_FILES_IN_SPLIT = 2048  # so that a few large listings still spread over a cluster
_SIZE_UNKNOWN = 1 << 20  # bytes that a file counts for where the listing tells none


def plan_images(files: Sequence[Found], options: ReadOptions) -> list[Split]:
    """Group files into splits of about `split_bytes`, in order; a split never spans two sources' folders.

    Raises InputError for files of text among them, names that are not UTF-8, and two files that would have one id;
    ConfigError for columns, and without Pillow.
    """
    require_pillow()
    for key in ("columns", "metadata"):
        if getattr(options, key):
            raise ConfigError(f"corpus.{key}: image files have no columns", expected="no such key")
    for file in files:
        if (other := format_of(file.url, options)) != "images":
            raise InputError(f"there are images and {other} among the sources", where=file.url, expected="one or other",
                             hint="make a corpus of each; a glob takes the images alone")  # fmt: skip
    _check_names(files)
    splits: list[Split] = []
    group: list[Found] = []
    taken = 0
    for file in files:
        size = file.size if file.size >= 0 else _SIZE_UNKNOWN
        is_full = len(group) >= _FILES_IN_SPLIT or taken + size > options.split_bytes
        if group and (is_full or file.base != group[0].base):
            splits.append(_split(len(splits), group))
            group, taken = [], 0
        group.append(file)
        taken += size
    return [*splits, _split(len(splits), group)]


def _check_names(files: Sequence[Found]) -> None:
    """Refuse names that cannot be ids, or would be the id of two files."""
    url_of: dict[str, str] = {}
    for file in files:
        name = file.url.removeprefix(file.base)
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError("a file's name is not UTF-8", where=repr(file.url), hint="rename the file") from error
        if (other := url_of.setdefault(name, file.url)) != file.url:
            raise InputError(f"two images would have the id {name!r}: {other} and {file.url}", where=file.url,
                             expected="names that differ, counted from each source's folder",
                             hint="give the folder that holds both as the one source")  # fmt: skip


def _split(index: int, files: Sequence[Found]) -> Split:
    base = files[0].base
    named = tuple((file.url.removeprefix(base), file.version or file_version(file.url)) for file in files)
    return Split(index, base, "images", 0, len(named), named)


def read_images(split: Split, options: ReadOptions) -> Iterator[Row | Reject]:
    """Yield a Row for every file that decodes completely, in order. Memory: one file and its picture."""
    for name, _ in split.files:
        url = split.url + name
        try:
            yield Row(0, name, "", name, None, _read(url, options.max_row_bytes))
        except RefusedRowError as refused:
            yield Reject(0, refused.reason, refused.detail, name[:200], url)


def _read(url: str, limit: int) -> bytes:
    """Return the file's bytes, proven to be a picture. Raises RefusedRowError when they are not, or too many."""
    with open_text(url, compressed=False) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise oversized(limit, "photographs need more: set corpus.max_row_bytes, for example to 33554432")
    try:
        open_image(data)
    except InputError as error:
        detail = error.what + (f"; expected {error.expected}" if error.expected else "")
        raise RefusedRowError("bad_image", detail) from error
    return data
