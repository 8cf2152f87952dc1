"""The tower every bi-encoder family shares: a transformer, a pooling, and small layers behind it; and word vectors'.

Imports torch: import this where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pipelines.models.files import read_json, refuse
from pipelines.models.packed import Transformer, move
from pipelines.models.weights import check_names, load_linear, read_weights

_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")
_CHUNK = 1024  # words of a text that are looked up at once
_EMPTY = 1e-9  # floor of a token count, as in sentence-transformers


class EncoderTower(nn.Module):
    """Map a right-padded micro-batch to vectors: `head(backbone(...))`.

    The backbone computes in its own dtype; pooling, the layers and normalisation always in fp32, so the vectors are
    fp32. Inputs lie in the CPU's memory, the vectors where the tower is.
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

    def on(self, device: str) -> EncoderTower:
        """Go to `device`, ready to encode there the fastest way; to be called once. Returns itself."""
        self.eval().to(device)
        self.backbone = Transformer(self.backbone)
        return self

    @property
    def packs(self) -> int:
        """0 when padding is computed; else what the tokens of a micro-batch are rounded up to a multiple of."""
        return int(getattr(self.backbone, "packs", 0))

    @torch.inference_mode()
    def forward(
        self, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, type_ids_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return emb_BD (fp32) for int64 ids, int64 mask (1 = token, padding on the right), int64 types or None."""
        types = {} if type_ids_BL is None else {"token_type_ids": type_ids_BL}
        hidden_BLH = self.backbone(input_ids=input_ids_BL, attention_mask=mask_BL, **types).last_hidden_state
        return self.head(hidden_BLH, move(mask_BL, hidden_BLH.device))

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


class WordTower(nn.Module):
    """Pool the vectors of a text's words, each times its weight, then apply the layers behind.

    vectors_VH: in the compute dtype. weights: one a word, or None for 1. modes: of max, mean, mean_sqrt_len_tokens.
    Sums are fp32 in chunks of words and fp64 over them, so that a very long text stays exact in little memory.
    """

    def __init__(
        self,
        vectors_VH: torch.Tensor,
        weights: Sequence[float] | None,
        dim: int,
        modes: Sequence[str],
        layers: Sequence[nn.Module] = (),
        *,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(vectors_VH)
        self.register_buffer("weight_V", None if weights is None else torch.tensor(weights, dtype=torch.float32))
        self.dim = dim
        self.modes = tuple(modes)
        self.layers = nn.Sequential(*layers).float()
        self.normalise = normalise

    @torch.inference_mode()
    def forward(
        self, input_ids_BL: torch.Tensor, mask_BL: torch.Tensor, type_ids_BL: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return emb_BD (fp32) for int64 ids and mask (1 = word, padding on the right); L may be 0."""
        device = self.vectors.weight.device
        input_ids_BL, mask_BL = input_ids_BL.to(device), mask_BL.to(device)
        shape = (len(input_ids_BL), self.vectors.embedding_dim)
        total_BH = torch.zeros(shape, dtype=torch.float64, device=input_ids_BL.device)
        weight_B = torch.zeros(shape[0], dtype=torch.float64, device=input_ids_BL.device)
        top_BH = torch.full(shape, float("-inf"), dtype=torch.float32, device=input_ids_BL.device)
        for ids_BL, part_BL in zip(input_ids_BL.split(_CHUNK, 1), mask_BL.split(_CHUNK, 1), strict=True):
            weight_BL = part_BL.float() if self.weight_V is None else part_BL * self.weight_V[ids_BL]
            word_BLH = self.vectors(ids_BL).float() * weight_BL.unsqueeze(-1)
            total_BH += word_BLH.sum(dim=1)
            weight_B += weight_BL.sum(dim=1)
            if "max" in self.modes and ids_BL.shape[1]:
                masked_BLH = word_BLH.masked_fill(part_BL.unsqueeze(-1) == 0, float("-inf"))
                top_BH = torch.maximum(top_BH, masked_BLH.amax(dim=1))
        count_B1 = weight_B.clamp(min=_EMPTY).unsqueeze(-1)
        pooled = {
            "max": top_BH.masked_fill(top_BH == float("-inf"), 0.0),  # no word at all: zero, as the means are
            "mean": total_BH / count_B1,
            "mean_sqrt_len_tokens": total_BH / count_B1.sqrt(),
        }
        emb_BD = self.layers(torch.cat([pooled[mode].float() for mode in self.modes], dim=1))
        return nn.functional.normalize(emb_BD, dim=1) if self.normalise else emb_BD


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


def load_layers(extras: Sequence[tuple[str, str]], truncate: int | None = None) -> list[nn.Module]:
    """Return the layers of a sentence-transformers directory behind its pooling, then the truncation.

    extras: (kind, folder) of each layer. truncate: the number of components to keep. Raises CheckpointError when
    weights are missing, unexpected or of another shape than their config.json says.
    """
    layers = [_layer(kind, folder) for kind, folder in extras if kind != "Dropout"]
    return [*layers, Truncate(truncate)] if truncate else layers


def _layer(kind: str, folder: str) -> nn.Module:
    if kind == "Normalize":
        return Normalise()
    config, state = read_json(folder, "config.json"), read_weights(folder)
    wanted = {"norm.weight", "norm.bias"} if kind == "LayerNorm" else {"linear.weight"}
    if kind == "Dense" and config.get("bias", True):
        wanted.add("linear.bias")
    check_names(sorted(wanted - set(state)), sorted(set(state) - wanted), folder, f"a {kind} layer")
    sizes = [config["dimension"]] if kind == "LayerNorm" else [config["out_features"], config["in_features"]]
    shapes = {"norm.weight": sizes, "norm.bias": sizes, "linear.weight": sizes, "linear.bias": sizes[:1]}
    if any(list(state[name].shape) != shapes[name] for name in wanted):
        refuse(f"the {kind} weights do not have the shape config.json gives", folder)
    if kind == "LayerNorm":
        norm = nn.LayerNorm(config["dimension"], dtype=torch.float32)
        norm.load_state_dict({"weight": state["norm.weight"], "bias": state["norm.bias"]})
        return norm
    linear = load_linear(state["linear.weight"], state.get("linear.bias"))
    return nn.Sequential(linear, _activation(folder, config))


def _activation(folder: str, config: dict[str, Any]) -> nn.Module:
    """Return the activation the Dense layer's config names; null means none, no key at all the default: tanh."""
    dotted = config.get("activation_function", "torch.nn.Tanh") or "torch.nn.Identity"
    name = str(dotted).rsplit(".", 1)[-1]
    if not str(dotted).startswith("torch.nn.") or name not in _ACTIVATIONS:
        refuse(f"unknown activation {dotted!r}", folder, expected=", ".join(_ACTIVATIONS))
    module: nn.Module = getattr(nn, name)()
    return module
