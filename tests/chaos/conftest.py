"""The corpus, the tiny checkpoint and the undisturbed run that every chaos test compares with."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.driver import content_of, run, write_config
from tests.checkpoints import write_sentence_transformer

NUM_ROWS = 1500
_WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "war",
    "and",
    "peace",
    "rested",
    "in",
    "an",
    "old",
    "library",
    "of",
    "many",
    "rooms",
    "near",
    "the",
    "sea",
]


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nobody disturbed made: its result, and the sha256 of every data file."""

    corpus: str
    checkpoint: str
    result: dict[str, Any]
    content: dict[str, str]

    def config(self, folder: Path) -> str:
        return write_config(folder / "c.yaml", self.corpus, self.checkpoint, str(folder / "root"))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    rng = random.Random(0)
    lines = [
        f"p{i}\t{' '.join(rng.choices(_WORDS, k=rng.randint(3, 40)))} {i}\ttitle {i % 7}\n" for i in range(NUM_ROWS)
    ]
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(lines))
    write_sentence_transformer(str(folder / "model"))
    plain = Undisturbed(str(folder / "corpus.tsv"), str(folder / "model"), {}, {})
    result = run(plain.config(folder))
    return Undisturbed(plain.corpus, plain.checkpoint, result, content_of(folder / "root"))
