"""How likely passages are to be worth asking about: by a model, by a file of scores, or all the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.models.base import PassageRanker
from pipelines.questions import Line, Texts, batches, check_passage, checked

_LOOKUP_DEFAULT = -1000.0  # as in PAQ's shipped configs; its class alone says -10000
_BATCH = 64


class DummyRanker:
    """Give every passage the same score."""

    def __init__(self, score: float = 0.0) -> None:
        self._score = score

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.full(len(texts), self._score, dtype=np.float32)


class LookupRanker:
    """Give every passage the score recorded under its id, else the default.

    Memory: all the scores, about 150 bytes each.
    """

    def __init__(self, scores: Mapping[str, float], default: float = _LOOKUP_DEFAULT) -> None:
        self._scores, self._default = scores, default

    @classmethod
    def read(cls, url: str, default: float = _LOOKUP_DEFAULT) -> LookupRanker:
        """Read a TSV of id and score, without header. Raises InputError, with the line, for anything else."""
        scores: dict[str, float] = {}
        texts = Texts(url)
        for text in texts:
            cells = text.rstrip("\r\n").split("\t")
            if len(cells) != 2:
                raise texts.refuse(f"the row has {len(cells)} fields", "id and score, separated by a tab")
            scores[cells[0]] = _number(cells[1], texts.where)
        return cls(scores, default)

    def score_ids(self, ids: Sequence[str]) -> list[float]:
        return [self._scores.get(passage_id, self._default) for passage_id in ids]


def _number(cell: str, where: str) -> float:
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if math.isnan(score):
        raise InputError(f"the score {cell!r} is no number", where=where)
    return score


def rank(lines: Iterable[Line], ranker: PassageRanker | LookupRanker, batch_size: int = _BATCH) -> Iterator[Line]:
    """Yield each passage's line with its score in metadata.ps_score: a log-probability where a model ranks.

    Raises InputError for a line that is no passage.
    """
    for batch in batches(checked(lines, check_passage), batch_size):
        if isinstance(ranker, LookupRanker):
            scores = ranker.score_ids([str(line["passage_id"]) for line in batch])
        else:
            scores = [float(score) for score in ranker.score([line["passage"] for line in batch])]
        for line, score in zip(batch, scores, strict=True):
            yield line | {"metadata": line.get("metadata", {}) | {"ps_score": score}}
