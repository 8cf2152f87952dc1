"""Run texts, or pairs of texts, through a classifier: what every reranker and ranker shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelines.errors import PinakesError
from pipelines.models import tokens
from pipelines.models.engine import Engine, Forward, default_budget, fetch

_AHEAD = 4096  # texts tokenised at once for a GPU


class TextClassifier:
    """A classifier over texts or pairs of texts: a tokeniser and the engine.

    width: logits a text. token_budget: padded tokens in a micro-batch, by default what suits `device`, where the
    weights of `forward` are.
    """

    def __init__(
        self, forward: Forward, encoder: tokens.TextEncoder, width: int, device: str, token_budget: int | None = None
    ) -> None:
        self.encoder = encoder
        self.engine = Engine(forward, encoder.pad_id, width, device, token_budget or default_budget(device))

    def logits(self, texts: Sequence[tokens.Text]) -> npt.NDArray[np.float32]:
        """Return logits_NC (N, C) fp32, one row for each text, in the order given.

        A GPU computes some texts while the next are tokenised. Raises PinakesError when a logit is not finite: it would
        have no place in an order.
        """
        step = max(1, len(texts)) if self.engine.device == "cpu" else _AHEAD
        slices = [texts[start : start + step] for start in range(0, max(1, len(texts)), step)]
        logits = [self.engine.start(self.encoder.encode(some)) for some in slices]
        logits_NC = np.concatenate([fetch(some) for some in logits])
        if not np.isfinite(logits_NC).all():
            hint = "in fp16 a model may overflow: set compute to bf16 or fp32; else the checkpoint is broken"
            raise PinakesError("the model gives scores that are not finite", hint=hint)
        return logits_NC
