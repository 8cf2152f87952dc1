"""What the index benchmark works on: real sentences and real questions, encoded once by Pinakes itself and kept.

A sentence of a `wiki` passage is a passage of its own here, in the file's order, which is sorted by topic. Questions
are SQuAD's and NQ's; none of them is a stored vector. The first of them are given to the builds, to tune on and to
verify with; the next ones are unseen by any of that, and have their exact results beside them.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench.common import need_data

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
K = 10
NUM_GIVEN, NUM_UNSEEN = 1000, 2000  # questions
_FEWEST_WORDS = 3
_PART_SIZE = 4096
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Array = npt.NDArray[Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """The folder of one corpus of sentences; every path below it is made by `prepare`."""

    folder: Path

    @property
    def root(self) -> str:
        return str(self.folder / "root")

    @property
    def vectors(self) -> Path:
        """Return the file of all vectors, (N, D) fp32, alone in its folder as autofaiss wants it."""
        return self.folder / "vectors" / "vectors.npy"

    @property
    def given(self) -> Path:
        """Return the JSONL of the questions that a build gets."""
        return self.folder / "given.jsonl"

    @property
    def unseen(self) -> Path:
        """Return the vectors of questions, (Q, D) fp32, that no build sees."""
        return self.folder / "unseen.npy"

    @property
    def exact(self) -> Path:
        """Return the rows, (Q, K) int64, that exact search finds for them."""
        return self.folder / "exact.npy"

    @property
    def questions(self) -> Path:
        """Return the vectors, (Q, D) fp32, of all questions in the order in which they are dealt out."""
        return self.folder / "questions.npy"

    def manifests(self) -> Result:
        """Return {"snapshot", "embeddings"}, or {} when the data is not ready."""
        path = self.folder / "data.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def sentences(num: int) -> Iterator[tuple[str, str, str]]:
    """Yield up to `num` (id, text, title), in the order of the wiki file."""
    count = 0
    with gzip.open(need_data() / "wiki" / "psgs_w100.tsv.gz", "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            pieces = [p for p in _SENTENCE_END.split(row["text"]) if len(p.split()) >= _FEWEST_WORDS]
            for number, piece in enumerate(pieces[: num - count]):
                yield f"{row['id']}-{number}", piece, row["title"]
            count += len(pieces)
            if count >= num:
                return


def questions() -> list[str]:
    """Return all questions of SQuAD and NQ in a fixed random order."""
    texts = []
    for name in ("squad", "nq"):
        with gzip.open(need_data() / name / "questions.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["question"] for line in lines]
    texts = list(dict.fromkeys(texts))
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def prepare(job: dict[str, Any]) -> Result:
    """Ingest, encode and lay out `job["num"]` sentences below `job["folder"]`; what is there already is not redone."""
    data, num = Data(Path(job["folder"])), job["num"]
    if data.manifests():
        return _told(data)
    data.vectors.parent.mkdir(parents=True, exist_ok=True)
    source = data.folder / "sentences.tsv"
    if not source.exists():  # written once: a snapshot belongs to the file as it was
        with source.with_suffix(".part").open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writerow(["id", "text", "title"])
            writer.writerows(sentences(num))
        source.with_suffix(".part").rename(source)
    found = _encoded(data.root, str(source), min(_PART_SIZE, max(1, num // 8)))
    _lay_out(data, found["embeddings"])
    (data.folder / "data.json").write_text(json.dumps(found))
    return _told(data)


def _told(data: Data) -> Result:
    embedded = data.manifests()["embeddings"]
    return {"num_rows": embedded["num_rows"], "dim": embedded["dim"], "encode_seconds": embedded["seconds"]}


def _encoded(root: str, source: str, part_size: int) -> Result:
    from cluster.encode import encode
    from cluster.ingest import ingest
    from cluster.progress import Progress
    from cluster.session import session
    from pipelines.config import ClusterConfig, CorpusConfig, EncoderConfig
    from pipelines.encode import resolve

    config, cluster = CorpusConfig(name="sentences", sources=[source], part_size=part_size), ClusterConfig()
    with session(cluster):
        snapshot = ingest(root, config, Progress())
        embedded = encode(root, snapshot, resolve(EncoderConfig(checkpoint=ENCODER)), cluster, Progress())
    return {"snapshot": snapshot, "embeddings": embedded}


def _lay_out(data: Data, embedded: Result) -> None:
    """Write the vectors and the questions as the peers and the measurements take them."""
    from pipelines import embeddings
    from pipelines.encode import Encoder
    from pipelines.index.exact import exact_topk
    from pipelines.retrieve import bound_encoder
    from pipelines.storage import Store

    store = Store(data.root).child("embeddings", embedded["snapshot"], embedded["encoder"]["fingerprint"])
    emb_ND = np.lib.format.open_memmap(data.vectors, "w+", np.float32, (embedded["num_rows"], embedded["dim"]))
    for vectors_ND, rows_N in embeddings.iter_blocks(store, embedded["parts"], embedded["dim"]):
        emb_ND[rows_N[0] : rows_N[-1] + 1] = vectors_ND
    emb_ND.flush()
    texts = questions()
    data.given.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts[:NUM_GIVEN]))
    asked_QD = Encoder(bound_encoder(embedded), "query").encode_queries(texts).astype(np.float32)
    np.save(data.questions, asked_QD)
    unseen_QD = asked_QD[NUM_GIVEN : NUM_GIVEN + NUM_UNSEEN]
    np.save(data.unseen, unseen_QD)
    blocks = embeddings.iter_blocks(store, embedded["parts"], embedded["dim"])
    np.save(data.exact, exact_topk(unseen_QD, blocks, K, "ip")[1])
