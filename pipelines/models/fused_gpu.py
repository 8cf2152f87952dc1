"""Layers as a GPU runs them best: GELU within a product, residual and norm in one pass over memory.

A GPU multiplies so fast that much of a transformer's time goes into reading and writing what lies between its products.
torch adds a residual in one kernel, writes the sum in half precision, and normalises it in another; here the sum stays
in registers, in fp32, and the norm's weights stay unrounded, so that the result is a little more exact too. cuBLAS
computes a GELU on a product that is still in fp32, by the form with tanh (Hendrycks and Gimpel 2016), which is off by
at most 5e-4; writing the product in bf16 first costs more than that. Query, key and value in one product gain nothing.

Imports torch: import this where it is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipelines.models.fused import PAIRS, Change, gelu_of, is_residual


class ResidualNorm(nn.Module):
    """norm(linear(hidden) + residual), all behind the product in one kernel."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        super().__init__()
        exact = getattr(norm, "exact", (norm.weight.detach(), norm.bias.detach()))
        self.linear, self.eps = linear, norm.eps
        self.weight, self.bias = (tensor.to(linear.weight.device, torch.float32) for tensor in exact)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        from pipelines.models.kernels import add_norm

        return add_norm(self.linear(hidden), residual, self.weight, self.bias, self.eps)


def fuse_norms(model: nn.Module) -> list[Change]:
    """Put the residual and the norm behind a projection into one kernel. Returns what was changed."""
    changes = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if is_residual(child)
    ]
    for parent, name, child in changes:
        layer: Any = child
        setattr(parent, name, ResidualNorm(layer.dense, layer.LayerNorm))
    return changes


class GeluLinear(nn.Module):
    """gelu(linear(hidden)) in one kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), linear.bias.detach()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        result: torch.Tensor = torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=True)
        return result.view(*hidden.shape[:-1], -1)


def fuse_gelus(model: nn.Module) -> list[Change]:
    """Compute a GELU within the product before it. Returns what was changed."""
    changes: list[Change] = []
    for module in list(model.modules()):
        for name, activation in PAIRS:
            layer: Any = getattr(module, name, None)
            if type(layer) is nn.Linear and layer.bias is not None and gelu_of(module, name) is not None:
                changes += [(module, name, layer), (module, activation, getattr(module, activation))]
                setattr(module, name, GeluLinear(layer))
                setattr(module, activation, nn.Identity())
    return changes
