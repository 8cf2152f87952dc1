"""The tower every bi-encoder family shares: a transformer, a pooling, and small layers behind it.

Imports torch: import this where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""In the order in which several of them are concatenated."""

_EMPTY = 1e-9  # floor of a token count, as in sentence-transformers


class EncoderTower(nn.Module):
    """Map a right-padded micro-batch to vectors: `head(backbone(...))`.

    The backbone computes in its own dtype; pooling, the layers and normalisation always in fp32, so the vectors are
    fp32. `backbone` and `head` are public so that another batching (packed sequences) can drive them apart.
    """

    def __init__(
        self,
        backbone: Any,
        dim: int,
        modes: Sequence[str],
        layers: Sequence[nn.Module] = (),
        *,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # its output is never read
        self.dim = dim
        self.modes = tuple(modes)
        self.layers = nn.Sequential(*layers).float()
        self.normalise = normalise

    @torch.inference_mode()
    def forward(
        self, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, type_ids_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return emb_BD (fp32) for int64 ids, int64 mask (1 = token, padding on the right), int64 types or None."""
        types = {} if type_ids_BL is None else {"token_type_ids": type_ids_BL}
        hidden_BLH = self.backbone(input_ids=input_ids_BL, attention_mask=mask_BL, **types).last_hidden_state
        return self.head(hidden_BLH, mask_BL)

    def head(self, hidden_BLH: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Pool the last hidden states and apply the layers behind them. Returns emb_BD (fp32)."""
        pooled = [pool(mode, hidden_BLH, mask_BL) for mode in self.modes]
        emb_BD = self.layers(torch.cat(pooled, dim=1))
        return nn.functional.normalize(emb_BD, dim=1) if self.normalise else emb_BD


def pool(mode: str, hidden_BLH: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Return the (B, H) fp32 summary of each text's tokens; padded positions never count.

    mean is sum / max(count, 1e-9), mean_sqrt_len_tokens divides by the root of the count, weightedmean weights
    position i by i + 1 (sentence-transformers, Pooling).
    """
    if mode == "cls":
        return hidden_BLH[:, 0].float()
    if mode == "lasttoken":
        last_B = mask_BL.sum(dim=1).clamp(min=1) - 1
        return hidden_BLH[torch.arange(len(last_B), device=last_B.device), last_B].float()
    mask_BL1 = mask_BL.unsqueeze(-1)
    if mode == "max":
        return hidden_BLH.masked_fill(mask_BL1 == 0, float("-inf")).max(dim=1).values.float()
    if mode == "weightedmean":
        position_L = torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)
        weight_BL1 = (mask_BL * position_L).unsqueeze(-1).float()
        return (hidden_BLH * weight_BL1).sum(dim=1) / weight_BL1.sum(dim=1).clamp(min=_EMPTY)
    total_BH = (hidden_BLH * mask_BL1).sum(dim=1, dtype=torch.float32)
    count_B1 = mask_BL1.sum(dim=1).float().clamp(min=_EMPTY)
    return total_BH / (count_B1 if mode == "mean" else count_B1.sqrt())


class Normalise(nn.Module):
    """L2-normalise; a zero vector stays zero."""

    def forward(self, emb_BD: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(emb_BD, dim=1)


class Truncate(nn.Module):
    """Keep the first `dim` components (Matryoshka checkpoints)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, emb_BD: torch.Tensor) -> torch.Tensor:
        return emb_BD[:, : self.dim]
