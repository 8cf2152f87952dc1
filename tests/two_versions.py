"""Two versions of one index by two encoders of different widths, built without Ray: what switching is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import publish
from tests.checkpoints import write_sentence_transformer
from tests.local_backend import TEXTS, build_root

ALIAS = "cats"


@dataclass(frozen=True)
class TwoVersions:
    """A root whose alias `cats` points to `new`, and before that pointed to `old`."""

    root: str
    old: str
    new: str

    def manifest(self, version: str) -> dict[str, Any]:
        return publish.read_version(self.root, ALIAS, version)

    def state(self, version: str, moves: int) -> dict[str, Any]:
        """Return an alias file's content that points to `version` after so many moves."""
        other = self.old if version == self.new else self.new
        return {"current": version, "previous": other, "history": [{}] * moves}


def build_two(folder: Path, checkpoints: Sequence[str] = (), shards: tuple[int, int] = (1, 3)) -> TwoVersions:
    """Build both. checkpoints: the older's and the newer's encoder, if not two tiny ones. shards: of each."""
    narrow, wide = checkpoints or (
        write_sentence_transformer(str(folder / "narrow"), 16, seed=1),
        write_sentence_transformer(str(folder / "wide"), 32, seed=2),
    )
    root = build_root(folder, narrow, num_shards=shards[0])
    old = publish.current(root, ALIAS)
    build_root(folder, wide, num_shards=shards[1])
    return TwoVersions(root, old, publish.current(root, ALIAS))


QUERIES = TEXTS[::7]
