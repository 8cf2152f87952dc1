"""The last step: one line for each different question, with all its answers."""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import IO

from pipelines.errors import InputError
from pipelines.questions import Line, checked

_IN_MEMORY = 2_000_000  # lines, about 2 GB
_BUCKETS = 128

Numbered = tuple[int, Line]
"""(place of the line in the input, line); of a group, the place of its first line."""


def group(
    lines: Iterable[Line],
    passage_scores: Mapping[str, float] | None = None,
    *,
    in_memory: int = _IN_MEMORY,
    folder: str | None = None,
) -> Iterator[Line]:
    """Yield `{"question", "answer": [...], "metadata": [...]}` for each different question, in order of appearance.

    Questions are the same when their strings are. Inconsistent pairs stay: metadata.consistent tells them. lines: what
    `generate` or the filter yields. passage_scores: ps_score by passage id (`scores_of`); then every passage must be in
    it. Memory: `in_memory` lines; more of them go through temporary files in `folder` by a hash of the question, and
    one of those at a time is held. Raises InputError for a line of another shape.
    """
    source = enumerate(_described(lines, passage_scores))
    first = list(islice(source, in_memory))
    following = next(source, None)
    if following is None:
        yield from (line for _, line in _grouped(first))
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="pinakes-group-") as place:
        names = [os.path.join(place, str(bucket)) for bucket in range(_BUCKETS)]
        with contextlib.ExitStack() as stack:
            handles = [stack.enter_context(open(name, "w", encoding="ascii")) for name in names]
            for part in (first, [following], source):
                _scatter(part, handles)
        del first
        for name in names:
            _group_file(name)
        with contextlib.ExitStack() as stack:
            groups = [_read(stack.enter_context(open(name, encoding="ascii"))) for name in names]
            yield from (line for _, line in heapq.merge(*groups, key=lambda item: item[0]))


def scores_of(ranked: Iterable[Line]) -> dict[str, float]:
    """Return ps_score by passage id from the lines that `rank` yields. Memory: about 150 bytes a passage."""
    return {str(line["passage_id"]): line["metadata"]["ps_score"] for line in checked(ranked, _check_ranked)}


def _check_ranked(line: Line) -> str | None:
    metadata = line.get("metadata")
    has_score = isinstance(metadata, dict) and isinstance(metadata.get("ps_score"), int | float)
    return None if has_score and "passage_id" in line else "the line has no passage_id, or no metadata.ps_score"


def _described(lines: Iterable[Line], scores: Mapping[str, float] | None) -> Iterator[Line]:
    """Yield question, answer and everything known about the pair. A pair of one origin, still ungrouped."""
    for line in checked(lines, check_generated):
        origin = {"passage_id": line["passage_id"]}
        if scores is not None:
            if str(line["passage_id"]) not in scores:
                what = f"the passage {line['passage_id']!r} has no ps_score"
                raise InputError(
                    what, where=getattr(lines, "where", ""), hint="give the ranked lines of these passages"
                )
            origin["ps_score"] = scores[str(line["passage_id"])]
        about = origin | {"answer": line["answer"]} | (line.get("metadata") or {})
        yield {"question": line["question"], "answer": line["answer"], "metadata": about}


def check_generated(line: Line) -> str | None:
    """Return what is wrong with a line of a generated question, or None."""
    if not isinstance(line.get("passage_id"), str | int):
        return "the line has no passage_id"
    for key in ("question", "answer"):
        if not isinstance(line.get(key), str):
            return f"the line has no {key}, or it is no text"
    return None if isinstance(line.get("metadata"), dict | None) else "metadata is no object"


def _grouped(numbered: Iterable[Numbered]) -> Iterator[Numbered]:
    groups: dict[str, Numbered] = {}
    for at, line in numbered:
        empty = {"question": line["question"], "answer": [], "metadata": []}
        _, found = groups.setdefault(line["question"], (at, empty))
        found["answer"].append(line["answer"])
        found["metadata"].append(line["metadata"])
    yield from groups.values()


def _scatter(numbered: Iterable[Numbered], handles: Sequence[IO[str]]) -> None:
    for at, line in numbered:
        bucket = zlib.crc32(line["question"].encode()) % len(handles)
        handles[bucket].write(json.dumps([at, line]) + "\n")


def _group_file(name: str) -> None:
    """Replace the lines in the file by their groups, still in order of appearance."""
    with open(name, encoding="ascii") as handle:
        groups = list(_grouped(_read(handle)))
    with open(name, "w", encoding="ascii") as handle:
        handle.writelines(json.dumps(item) + "\n" for item in groups)


def _read(handle: IO[str]) -> Iterator[Numbered]:
    for text in handle:
        at, line = json.loads(text)
        yield at, line
