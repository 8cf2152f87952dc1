"""The two towers of CLIP: texts and images to vectors of one space.

Imports torch: import this where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipelines.pixels import PixelRule, open_image


class ClipTextTower(nn.Module):
    """Map a right-padded micro-batch to vectors: the last hidden state at the first end token, projected.

    The backbone is causal and computes in its own dtype; projection and normalisation are fp32.
    """

    def __init__(self, backbone: Any, projection: nn.Linear, end_id: int, *, normalise: bool) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection.float()
        self.end_id, self.normalise = end_id, normalise
        self.dim = projection.out_features

    @torch.inference_mode()
    def forward(
        self, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, type_ids_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return emb_BD (fp32) for int64 ids and mask (1 = token, padding on the right); there are no types."""
        device = self.projection.weight.device
        input_ids_BL, mask_BL = input_ids_BL.to(device), mask_BL.to(device)
        hidden_BLH = self.backbone(input_ids=input_ids_BL, attention_mask=mask_BL).last_hidden_state
        end_B = (input_ids_BL == self.end_id).int().argmax(dim=1)  # a text may spell out the token: the first counts
        emb_BD = self.projection(hidden_BLH[torch.arange(len(end_B), device=end_B.device), end_B].float())
        return nn.functional.normalize(emb_BD, dim=1) if self.normalise else emb_BD


class ClipImageTower(nn.Module):
    """Map image files to vectors: the class token behind its norm, projected; projection and norms' output in fp32.

    num_tokens: patches and class token of one picture, what a token budget counts.
    """

    def __init__(self, backbone: Any, projection: nn.Linear, rule: PixelRule, *, normalise: bool) -> None:
        super().__init__()
        self.backbone, self.projection = backbone, projection.float()
        self.rule, self.normalise = rule, normalise
        self.dim = projection.out_features
        self.num_tokens = int(backbone.embeddings.num_positions)

    @torch.inference_mode()
    def forward(self, pixel_BCHW: torch.Tensor) -> torch.Tensor:
        """Return emb_BD (fp32) of fp32 pixels as the rule makes them."""
        pooled_BH = self.backbone(pixel_values=pixel_BCHW).pooler_output
        emb_BD = self.projection(pooled_BH.float())
        return nn.functional.normalize(emb_BD, dim=1) if self.normalise else emb_BD

    def encode_images(self, images: Sequence[bytes], batch_images: int = 32) -> npt.NDArray[np.float32]:
        """Return emb_ND (N, D) fp32 of N image files, in their order, `batch_images` at a time.

        Files are decoded by as many threads as torch computes with. Raises InputError for one that cannot be decoded.
        """
        emb_ND = np.zeros((len(images), self.dim), np.float32)
        device = self.projection.weight.device
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            for start in range(0, len(images), batch_images):
                batch = images[start : start + batch_images]
                pixel_BCHW = torch.from_numpy(np.stack(list(pool.map(self._pixels, batch)))).to(device)
                emb_ND[start : start + len(batch)] = self(pixel_BCHW).cpu().numpy()
        return emb_ND

    def _pixels(self, data: bytes) -> npt.NDArray[np.float32]:
        return self.rule(open_image(data))
