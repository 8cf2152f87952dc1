"""Run texts, or pairs of texts, through a classifier: what every reranker and ranker shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.models import tokens
from pipelines.models.base import Tokens

Forward = Callable[[Any, Any, Any], Any]
"""(ids_BL, mask_BL, types_BL or None) to logits_BC, torch tensors."""


@dataclass
class TextClassifier:
    """A classifier over texts or pairs of texts, in micro-batches of similar length. device: of `forward`'s weights."""

    forward: Forward
    encoder: tokens.TextEncoder
    batch_size: int
    device: str

    def logits(self, texts: Sequence[tokens.Text]) -> npt.NDArray[np.float32]:
        """Return logits_NC (fp32), one row for each text, in the order given; (0, 1) for no texts."""
        rows = self.encoder.encode(texts)
        order = np.argsort(rows.lengths, kind="stable")
        batches = [order[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        if not batches:
            return np.zeros((0, 1), dtype=np.float32)
        logits_NC = np.concatenate([self._run(rows, batch) for batch in batches])
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        result: npt.NDArray[np.float32] = logits_NC[inverse]
        return result

    def _run(self, rows: Tokens, batch: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Pad the rows `batch` and run them."""
        import torch

        padded = tokens.pad(rows, batch, self.encoder.pad_id)
        ids, mask, types = [None if array is None else torch.from_numpy(array).to(self.device) for array in padded]
        with torch.inference_mode():
            logits_BC: npt.NDArray[np.float32] = self.forward(ids, mask, types).cpu().numpy()
        return logits_BC
