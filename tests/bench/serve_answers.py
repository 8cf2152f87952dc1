"""Whether answers are what they say: each score computed again from the named version's own encoder and vectors."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import embeddings
from pipelines.encode import Encoder
from pipelines.manifest import read_manifest
from pipelines.retrieve import bound_encoder, encoder_name
from pipelines.storage import Store
from tests.bench.serve_client import Answers
from tests.bench.serve_data import Corpus

Array = npt.NDArray[Any]
Wrong = dict[str, Any]

CLOSE = 5e-3
"""Largest difference of two scores, over the product of the vectors' lengths, that is rounding: a query is encoded in
bf16 beside others, here and there."""


@dataclass
class _Version:
    """The vectors of one version's passages and of all questions."""

    name: str
    vectors_ND: Array
    queries_QD: Array
    best_Q: Array

    @classmethod
    def of(cls, root: str, manifest: dict[str, Any], questions: list[str]) -> _Version:
        store = Store(root).child("embeddings", manifest["snapshot"], manifest["embeddings"])
        parts = read_manifest(store, "embeddings")["parts"]
        vectors_ND = np.concatenate([block for block, _ in embeddings.iter_blocks(store, parts, manifest["dim"])])
        queries_QD = Encoder(bound_encoder(manifest), "query").encode_queries(questions)
        best = [(queries_QD[i : i + 256] @ vectors_ND.T).max(axis=1) for i in range(0, len(questions), 256)]
        return cls(manifest["version"], vectors_ND, queries_QD, np.concatenate(best))

    def error(self, question: int, rows: Array, scores: Array) -> float:
        """Return how far an answer is from this version's: its scores, and its best score from the best there is."""
        query, vectors = self.queries_QD[question], self.vectors_ND[rows]
        lengths = np.linalg.norm(query) * np.linalg.norm(vectors, axis=1)
        off = np.abs(vectors @ query - scores) / lengths
        return float(max(off.max(), abs(self.best_Q[question] - scores[0]) / lengths[0]))


@dataclass
class Check:
    """Checks answers against the versions built under these config names."""

    corpus: Corpus
    names: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, answers: Answers) -> tuple[list[Wrong], dict[str, int]]:
        """Return the answers that are not their version's, and how many each version gave.

        facts then holds the largest error, and the smallest that an answer has under a version it does not name: that
        shows what the check would find.
        """
        questions = json.loads(self.corpus.questions.read_text())
        asked = np.unique(answers.question_N)
        place = {int(question): at for at, question in enumerate(asked)}
        texts = [questions[int(question)] for question in asked]
        found = {name: _Version.of(self.corpus.root, self.corpus.versions[name], texts) for name in self.names}
        names = {version.name: name for name, version in found.items()}
        wrong: list[Wrong] = []
        largest, nearest, seen = 0.0, float("inf"), Counter[str]()
        for body, question in zip(answers.bodies, answers.question_N.tolist(), strict=True):
            answer = json.loads(body)
            rows = np.array([hit["row"] for hit in answer["hits"]])
            scores = np.array([hit["score"] for hit in answer["hits"]])
            name = names.get(answer["version"], answer["version"])
            seen[name] += 1
            encoder = encoder_name(self.corpus.versions[name]) if name in found else None
            errors = {other: version.error(place[question], rows, scores) for other, version in found.items()}
            own = errors.pop(name, float("inf"))
            largest, nearest = max(largest, own), min(nearest, *errors.values())
            if own > CLOSE or answer["encoder"] != encoder:
                wrong.append({"version": name, "error": own, "question": questions[question], "answer": answer})
        self.facts |= {"largest_error": largest, "smallest_error_of_another_version": nearest, "allowed": CLOSE}
        return wrong, dict(seen)
