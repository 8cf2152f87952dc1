"""Which files hold the vectors, what kind each is, and where the ids of those without any come from."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import numpy.typing as npt

from pipelines.errors import ConfigError, InputError
from pipelines.interchange import arrays, dpr, paq

Array = npt.NDArray[Any]
Block = tuple[list[str] | None, Array]
Kind = Literal["dpr", "pt", "npy", "parquet"]

_READERS: dict[Kind, Callable[[str], Iterator[Block]]] = {
    "dpr": dpr.read_pickle,
    "pt": paq.read_tensor,
    "npy": arrays.read_npy,
    "parquet": arrays.read_vector_parquet,
}
_IDS_BESIDE = ("ids.txt", "ids.jsonl", "ids.npy")
_TORCH_NAME = re.compile(r"\.pth?(\.\d+)?$")


@dataclass(frozen=True)
class Source:
    """A file of vectors. `name` and `sha256` go into the manifest of what is made from it."""

    path: str
    kind: Kind
    num_bytes: int
    sha256: str

    @property
    def has_ids(self) -> bool:
        return self.kind in ("dpr", "parquet")

    def as_entry(self) -> dict[str, Any]:
        return {**{k: v for k, v in asdict(self).items() if k != "path"}, "name": os.path.basename(self.path)}


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """Return the sources behind paths, globs and folders, ordered by name with numbers counted as numbers.

    A folder stands for the vector files in it (ids and manifests beside them are left out). Raises InputError for a
    pattern without files and for a file of no known kind.
    """
    paths: set[str] = set()
    for pattern in patterns:
        found = _files(pattern)
        if not found:
            hint = "give local files: copy those of an object store first"
            raise InputError("there is no such file", where=pattern, expected="vectors to import", hint=hint)
        paths |= set(found)
    return [_source(path) for path in sorted(paths, key=_natural)]


def _files(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        every = (os.path.join(pattern, name) for name in os.listdir(pattern))
        return [p for p in every if os.path.isfile(p) and not _is_beside(os.path.basename(p))]
    if os.path.isfile(pattern):
        return [pattern]
    return [path for path in glob.glob(pattern) if os.path.isfile(path)]


def _is_beside(name: str) -> bool:
    return name in _IDS_BESIDE or name.startswith(".") or name.endswith(".json")


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which `embeddings.pt.2` comes before `embeddings.pt.10`."""
    pieces = re.split(r"([0-9]+)", path)
    return [(1, int(piece), "") if i % 2 else (0, 0, piece) for i, piece in enumerate(pieces)]


def _source(path: str) -> Source:
    try:
        with open(path, "rb") as handle:
            kind = _kind(handle.read(8), path)
            handle.seek(0)
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"the file cannot be read: {error}", where=path) from error
    return Source(path, kind, os.path.getsize(path), sha256)


def _kind(first: bytes, path: str) -> Kind:
    if first.startswith(b"\x93NUMPY"):
        return "npy"
    if first.startswith(b"PAR1"):
        return "parquet"
    if first.startswith(b"PK\x03\x04") or (first.startswith(b"\x80") and _TORCH_NAME.search(path)):
        return "pt"
    if first.startswith(b"\x80"):
        return "dpr"
    expected = "DPR's pickle (protocol 2 or later), PAQ's .pt, .npy or Parquet"
    raise InputError("this is no file of vectors", where=path, expected=expected)


@dataclass(frozen=True)
class IdSource:
    """Where the ids of sources without their own come from: a file, or (path and sha256 empty) the snapshot's order."""

    path: str = ""
    sha256: str = ""


BY_POSITION = IdSource()


def settle_ids(sources: Sequence[Source], ids: str | None, by_position: bool) -> IdSource | None:
    """Return where ids come from for sources that carry none, or None when every source does.

    Raises ConfigError when that is not clear: neither a file of ids, given or beside the one array, nor by_position.
    """
    bare = [source for source in sources if not source.has_ids]
    if ids and by_position:
        raise ConfigError("--ids and --by-position exclude each other", expected="one of them")
    if (ids or by_position) and len(bare) < len(sources):
        with_ids = next(source for source in sources if source.has_ids)
        raise ConfigError("this file has ids of its own", where=with_ids.path, hint="leave out --ids and --by-position")
    if not bare:
        return None
    if by_position:
        return BY_POSITION
    folder = os.path.dirname(bare[0].path)
    beside = [os.path.join(folder, name) for name in _IDS_BESIDE if os.path.isfile(os.path.join(folder, name))]
    if ids or (len(bare) == 1 and len(beside) == 1):
        return id_source(ids or beside[0])
    raise ConfigError(
        f"whose vectors are these? {len(bare)} files carry no ids",
        where=bare[0].path,
        expected="--ids FILE (ids of all of them, in order), or --by-position (row i is passage i of the snapshot)",
    )


def id_source(path: str) -> IdSource:
    """Return the ids of a file. Raises InputError when it is not there."""
    if not os.path.isfile(path):
        raise InputError("there is no such file of ids", where=path, expected=".txt, .jsonl, .npy or DPR's .dpr")
    with open(path, "rb") as handle:
        return IdSource(path, hashlib.file_digest(handle, "sha256").hexdigest())


def read_blocks(sources: Sequence[Source], ids: IdSource | None, strip_prefix: str = "") -> Iterator[tuple[str, Block]]:
    """Yield (path, (ids or None, vectors (N, D))) of all sources, in order; ids None: matched by position.

    strip_prefix: taken off ids that begin with it. Raises InputError when there are more or fewer ids than vectors.
    """
    path = ids.path if ids else ""
    listed = open_ids(path) if path else None
    for source in sources:
        for own, vectors in _READERS[source.kind](source.path):
            found = own
            if own is None and listed is not None:
                found = list(islice(listed, len(vectors)))
                if len(found) < len(vectors):
                    raise InputError("there are fewer ids than vectors", where=path)
            if found is not None and strip_prefix:
                found = [identity.removeprefix(strip_prefix) for identity in found]
            yield source.path, (found, vectors)
    if listed is not None and next(listed, None) is not None:
        raise InputError("there are more ids than vectors", where=path)


def open_ids(path: str) -> Iterator[str]:
    """Yield the ids of a file: .txt, .jsonl, .npy, or DPR's pickled list (.dpr)."""
    return dpr.read_id_list(path) if path.endswith((".dpr", ".pkl")) else arrays.read_ids(path)
