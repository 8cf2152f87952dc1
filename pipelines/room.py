"""Is there room for one more version on this machine? What its encoder and files take, and what is free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import PinakesError
from pipelines.publish import index_store
from pipelines.sizes import human_bytes
from pipelines.storage import cache_dir, locked

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_SEARCHED = ("shard-", "vectors-")
_OF_A_SHARD = (*_SEARCHED, "passages-", "ids-")
_LOADED = 2.0  # of a checkpoint's bytes: fp16 files that compute in fp32 become twice as large


@contextmanager
def room_for(
    root: str, manifest: dict[str, Any], counts: Callable[[str], bool] = bool, encoder: bool = True
) -> Iterator[str]:
    """Give what `check_room` tells, and load the version inside: one process of this machine does at a time.

    So replicas that are told to load at once never count on the same memory. Raises what `check_room` raises.
    """
    with locked(os.path.join(cache_dir("locks"), "room")):
        yield check_room(root, manifest, counts, encoder)


def check_room(root: str, manifest: dict[str, Any], counts: Callable[[str], bool] = bool, encoder: bool = True) -> str:
    """Return one line that says what loading the version takes here and what there is.

    counts: tells of a file's name whether it is loaded here (`bool`: every one). encoder: whether the query encoder is.
    A version's files are memory-mapped, so only its encoder has to fit the free memory; files of a remote root need
    room in the cache. Raises PinakesError when either does not fit.
    """
    served = {name: entry for name, entry in manifest["files"].items() if name.startswith(_OF_A_SHARD) and counts(name)}
    files, free = sum(f["num_bytes"] for f in served.values()), free_memory()
    weights = encoder_bytes(manifest) if encoder else 0
    told = f"its encoder takes up to {human_bytes(weights)} of {human_bytes(free)} free memory"
    hint = "free some memory, use a machine with more, or lower the number of replicas on it"
    if weights > free:
        raise PinakesError(f"there is no room for one more version: {told}", hint=hint)
    missing = _not_cached(root, manifest["name"], served)
    if missing:
        disk = shutil.disk_usage(cache_dir("files")).free
        told += f"; {human_bytes(missing)} to download, {human_bytes(disk)} of disk free"
        if missing > disk:
            hint = "free some disk, or set PINAKES_CACHE to a larger one"
            raise PinakesError(f"there is no room for one more version: {told}", where=cache_dir("files"), hint=hint)
    if files > free - weights:
        told += f"; its files map {human_bytes(files)}, more than is free, so searches will read from the disk"
    return told


def of_passages(name: str) -> bool:
    """Tell whether a gateway loads a file where its shards are elsewhere."""
    return not name.startswith(_SEARCHED)


def of_shards(number: int, num_deployments: int) -> Callable[[str], bool]:
    """Return what tells whether a file belongs to the shards number, number + num_deployments, …."""
    return lambda name: int(name.partition("-")[2].partition(".")[0]) % num_deployments == number


def encoder_bytes(manifest: dict[str, Any]) -> int:
    """Return about how many bytes the query encoder takes once it is loaded."""
    from pipelines.models.fetch import fetch

    directory = Path(fetch(manifest["encoder"]["query_checkpoint"]))
    size_of = {p.suffix: 0 for p in directory.rglob("*") if p.is_file()}
    for path in directory.rglob("*"):
        if path.is_file():
            size_of[path.suffix] += path.stat().st_size
    # Released checkpoints often carry the same weights in several formats; one of them is read.
    return int(_LOADED * (size_of.get(".safetensors") or sum(size_of.values())))


def free_memory() -> int:
    """Return the bytes of memory that this process may still take: the machine's, or its control group's if less."""
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines()) if _MEMINFO.exists() else {}
    if "MemAvailable" not in lines:
        return 1 << 62  # not Linux: nothing is known
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (_CGROUP / "memory.max").read_text().strip(), int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            free = min(free, int(limit) - used + int(stat.get("inactive_file", 0)))  # cached files give way
    except (OSError, ValueError):
        pass  # no control group that says so
    return max(0, free)


def _not_cached(root: str, name: str, served: dict[str, dict[str, Any]]) -> int:
    """Return the bytes that have to be downloaded; none where the root is a folder of this machine."""
    if index_store(root, name).is_local:
        return 0
    cached = set(os.listdir(cache_dir("files")))
    return sum(e["num_bytes"] for name, e in served.items() if f"{e['sha256'][:32]}-{name}" not in cached)
