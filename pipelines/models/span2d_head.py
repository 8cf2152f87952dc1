"""The layers of PAQ's answer extractor, and how its pairs are scored in bounded memory.

Imports torch: import this where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

_HIDDEN_VALUES = 1 << 24  # fp32 values of one hidden layer that are alive at once: 64 MiB
_NO_SPAN = float("-inf")


class PairHead(nn.Module):
    """A BERT, the two maps of its last hidden states, and the MLP over pairs of them (in fp32).

    layers: the Linears of the MLP, ReLU between them; the last one gives the logit.
    """

    def __init__(self, backbone: Any, start: nn.Linear, end: nn.Linear, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.backbone, self.start, self.end = backbone, start, end
        self.first, self.rest = layers[0], nn.ModuleList(layers[1:])
        self.widest = max(layer.out_features for layer in layers)

    @torch.inference_mode()
    def best_in_band(
        self,
        ids_BL: npt.NDArray[np.int64],
        mask_BL: npt.NDArray[np.int64],
        text_BL: npt.NDArray[np.bool_],
        size: int,
        count: int,
    ) -> list[list[tuple[float, int, int]]]:
        """Return the `count` likeliest (logit, i, j) of each row, among text tokens i <= j < i + size."""
        left_BLM, right_BLM = self._halves(ids_BL, mask_BL)
        text = torch.from_numpy(text_BL).to(left_BLM.device)
        allowed_BLK = text.unsqueeze(2) & nn.functional.pad(text, (0, size - 1)).unfold(1, size, 1)
        # Token i + k for each i and k: a view, not a copy.
        right_BLKM = nn.functional.pad(right_BLM, (0, 0, 0, size - 1)).unfold(1, size, 1).transpose(2, 3)
        parts = [self._logits(left_BLM[:, a:b], right_BLKM[:, a:b]) for a, b in self._chunks(left_BLM, size)]
        logit_BLK = torch.cat(parts, dim=1).masked_fill(~allowed_BLK, _NO_SPAN)
        top = logit_BLK.flatten(1).topk(min(count, logit_BLK[0].numel()), dim=1)
        rows = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        return [
            [
                (logit, flat // size, flat // size + flat % size)
                for logit, flat in zip(*row, strict=True)
                if logit > _NO_SPAN
            ]
            for row in rows
        ]

    @torch.inference_mode()
    def all_pairs(
        self, ids_BL: npt.NDArray[np.int64], mask_BL: npt.NDArray[np.int64]
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the (L, L) fp32 logits of each row, unmasked."""
        left_BLM, right_BLM = self._halves(ids_BL, mask_BL)
        for left_1LM, right_1LM in zip(left_BLM.split(1), right_BLM.split(1), strict=True):
            length = left_1LM.shape[1]
            chunks = self._chunks(left_1LM, length)
            parts = [self._logits(left_1LM[:, a:b], right_1LM.unsqueeze(1)) for a, b in chunks]
            yield torch.cat(parts, dim=1)[0].cpu().numpy()

    def _halves(
        self, ids_BL: npt.NDArray[np.int64], mask_BL: npt.NDArray[np.int64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A s and B e + b, both (B, L, M): the first layer of the MLP, one token at a time."""
        device = self.first.weight.device
        ids, mask = torch.from_numpy(ids_BL).to(device), torch.from_numpy(mask_BL).to(device)
        hidden_BLH = self.backbone(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight_s, weight_e = self.first.weight.split([self.start.out_features, self.end.out_features], dim=1)
        left_BLM = nn.functional.linear(self.start(hidden_BLH), weight_s)
        return left_BLM, nn.functional.linear(self.end(hidden_BLH), weight_e, self.first.bias)

    def _logits(self, left_BlM: torch.Tensor, right_BlKM: torch.Tensor) -> torch.Tensor:
        """Return logit_BlK of the pairs of `l` left tokens with K right tokens each."""
        hidden_BlKM = left_BlM.unsqueeze(2) + right_BlKM
        for layer in self.rest:
            hidden_BlKM = layer(hidden_BlKM.relu_())
        return hidden_BlKM.squeeze(3)

    def _chunks(self, left_BLM: torch.Tensor, per_token: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of left tokens whose hidden layers fit the memory bound."""
        batch, length, _ = left_BLM.shape
        step = max(1, _HIDDEN_VALUES // (batch * per_token * self.widest))
        for start in range(0, length, step):
            yield start, min(start + step, length)
