"""What the serving benchmark serves: real passages under several encoders and cut into shards, and real questions.

Everything is built by Pinakes itself under one root; what is there already is not built again.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster import jobs
from cluster.progress import Progress
from cluster.session import session
from pipelines import publish
from pipelines.config import ClusterConfig, load_config
from tests.bench.common import need_data, write_wiki
from tests.checkpoints import write_paq

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SETS = ("squad", "nq")
_PART_SIZE = 256
_SEED = 6


@dataclass
class Corpus:
    """The root under `folder`, with one config for each index. wiki_rows: passages besides those of SETS."""

    folder: Path
    wiki_rows: int
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def root(self) -> str:
        return str(self.folder / "root")

    @property
    def questions(self) -> Path:
        """The file of all questions, a JSON list in a fixed random order."""
        path = self.folder / "questions.json"
        if not path.is_file():
            texts = []
            for name in SETS:
                with gzip.open(need_data() / name / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
                    texts += [json.loads(line)["question"] for line in lines]
            random.Random(_SEED).shuffle(texts)
            path.write_text(json.dumps(texts))
        return path

    def config(self, name: str) -> str:
        return str(self.folder / f"{name}.yaml")

    def build(self, index: str, checkpoints: dict[str, str], **shards: int) -> None:
        """Build a version under each config name, and point the alias `index` to the last of them.

        checkpoints: by config name. shards: their number, by config name, where it is not one.
        """
        names = list(checkpoints)
        missing = [n for n in names if not self._find(n, self._content(index, checkpoints[n], shards.get(n, 1)))]
        if missing:
            with session(ClusterConfig()):
                for name in missing:
                    print(f"  building {name}", flush=True)
                    made = jobs.run(load_config(self.config(name)), Progress(quiet=True))["version"]
                    Path(self.folder, f"{name}.version").write_text(made["version"])
        for name in names:
            version = Path(self.folder, f"{name}.version").read_text()
            self.versions[name] = publish.read_version(self.root, index, version)
        publish.promote(self.root, index, self.versions[names[-1]]["version"])

    def _content(self, index: str, checkpoint: str, num_shards: int) -> str:
        content = {
            "root": self.root,
            "corpus": {"name": "bench", "sources": self._sources(), "part_size": _PART_SIZE},
            "encoder": {"checkpoint": checkpoint},
            "index": {"name": index, "factory": "Flat", "recall_queries": 100, "num_shards": num_shards},
        }
        return yaml.safe_dump(content)

    def _find(self, name: str, content: str) -> bool:
        """Tell whether the version of this very config was built; if not, write the config."""
        config = Path(self.config(name))
        if config.is_file() and config.read_text() == content and Path(self.folder, f"{name}.version").is_file():
            return True
        config.write_text(content)
        Path(self.folder, f"{name}.version").unlink(missing_ok=True)
        return False

    def paq(self, projection: int) -> str:
        """Return the directory of a tiny random encoder in PAQ's layout with vectors of that width."""
        directory = self.folder / f"paq-{projection}"
        if not (directory / "config.json").is_file():
            write_paq(str(directory), projection)
        return str(directory)

    def files(self, name: str = "one") -> dict[str, str]:
        """Return where index and passages of a MiniLM version of one shard lie, and the model."""
        version = self.versions[name]
        folder = Path(self.root, "indexes", version["name"], version["version"])
        files = {"index": str(folder / "shard-000.faiss"), "passages": str(folder / "passages-000.arrow")}
        return {**files, "checkpoint": model_directory()}

    def _sources(self) -> Sequence[str]:
        passages = [str(need_data() / name / "passages.tsv.gz") for name in SETS]
        wiki = self.folder / f"wiki-{self.wiki_rows}.tsv"
        if self.wiki_rows and not wiki.is_file():
            write_wiki(wiki, self.wiki_rows)
        return [*passages, *([str(wiki)] if self.wiki_rows else [])]


def model_directory() -> str:
    """Return the directory of all-MiniLM-L6-v2."""
    from pipelines.models.fetch import fetch

    return fetch(MINILM)
