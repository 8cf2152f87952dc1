"""Linear layers as oneDNN runs them best on a CPU: weights laid out once, activation and residual in the product.

torch reorders a weight at every call and writes a product to memory before the activation reads it back. Its own
oneDNN operators, which its compiler emits, take a prepared weight and do what follows on the product while it is still
in registers, before it is rounded to bf16: faster and a little more exact. Called directly they need no compiler, no
start-up and no fixed shapes.

Imports torch: import this where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

_ROWS = 2048  # tokens of a usual micro-batch: what oneDNN chooses the weights' layout for; any number works
# Where a transformers module calls an activation right on a linear layer's output: the names of the two.
PAIRS = (("dense", "intermediate_act_fn"), ("lin1", "activation"), ("ffn", "activation"))
_GELUS = {"GELUActivation": "none", "GELU": "none", "NewGELUActivation": "tanh", "GELUTanh": "tanh"}
_RESIDUALS = ("SelfOutput", "Output")  # classes that do norm(dense(hidden) + residual)


class FusedLinear(nn.Module):
    """A Linear with a prepared weight; its GELU ("none": exact, "tanh": approximated) when `gelu` is given."""

    def __init__(self, linear: nn.Linear, gelu: str | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.after = ("none", "") if gelu is None else ("gelu", gelu)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        name, algorithm = self.after
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, name, [], algorithm)
        return result

    def plus(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return linear(hidden) + residual, rounded once."""
        add = torch.ops.mkldnn._linear_pointwise.binary
        result: torch.Tensor = add(hidden, residual, self.weight, self.bias, "add")
        return result


class ExactNorm(nn.Module):
    """A LayerNorm over bf16 with its weight and bias in fp32, which torch's CPU kernel takes as they are."""

    def __init__(self, norm: nn.LayerNorm, exact: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = exact

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(hidden, self.shape, self.weight, self.bias, self.eps)


class FusedResidual(nn.Module):
    """norm(linear(hidden) + residual)."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.linear, self.norm = FusedLinear(linear), _exact(norm)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.linear.plus(hidden, residual))
        return result


Change = tuple[nn.Module, str, nn.Module]
"""A module, the name of one of its children, and that child as it was."""


def ways(model: nn.Module) -> list[tuple[str, Callable[[nn.Module], list[Change]]]]:
    """Return what can be done to the model's layers where it is: in words, and the function that does it in place."""
    weight = next(model.parameters())
    if can_fuse(model):
        return [("fused linear layers", fuse)]
    if weight.device.type == "cuda" and weight.dtype in (torch.bfloat16, torch.float16) and find_spec("triton"):
        from pipelines.models import fused_gpu

        norms = ("norms in one kernel with their residual", fused_gpu.fuse_norms)
        return [norms, ("GELU within a product", fused_gpu.fuse_gelus)]
    return []


def can_fuse(model: nn.Module) -> bool:
    """Tell whether oneDNN multiplies the model's dtype here."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bf16 = parameter.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return parameter.dtype is torch.float32 or bool(bf16)


def fuse(model: nn.Module) -> list[Change]:
    """Fuse the model's linear layers in place. Returns what was changed, for `undo`."""
    changes = list(_changes(model))
    for parent, name, _ in changes:
        setattr(parent, name, _fused(parent, name))
    return changes


def undo(changes: list[Change]) -> None:
    for parent, name, original in reversed(changes):
        setattr(parent, name, original)


def _changes(model: nn.Module) -> Iterator[Change]:
    inside: set[nn.Module] = set()  # a shared layer is met, and changed, once
    for module in model.modules():
        for name, child in module.named_children():
            if child in inside:
                continue
            if is_residual(child):
                inside.update(child.modules())
                yield module, name, child
            elif type(child) is nn.Linear or _exact(child) is not child:
                inside.add(child)
                yield module, name, child
        for linear, activation in PAIRS:
            if gelu_of(module, linear) is not None:
                yield module, activation, getattr(module, activation)


def is_residual(module: nn.Module) -> bool:
    """Tell whether this is a transformers layer that projects, adds its second input, and normalises."""
    names = {name for name, _ in module.named_children()}
    is_dense = type(getattr(module, "dense", None)) is nn.Linear
    return is_dense and names == {"dense", "LayerNorm", "dropout"} and type(module).__name__.endswith(_RESIDUALS)


def gelu_of(parent: Any, linear: str) -> str | None:
    """Return how the GELU behind the child `linear` of a module is computed; None when there is no GELU there."""
    activation = dict(PAIRS).get(linear)
    if activation is None or not isinstance(getattr(parent, linear, None), nn.Linear | FusedLinear):
        return None
    return _GELUS.get(type(getattr(parent, activation, None)).__name__)


def _exact(module: Any) -> Any:
    """Return the LayerNorm with its unrounded weights, where they are known; any other module as it is."""
    exact = getattr(module, "exact", None)
    return module if exact is None else ExactNorm(module, exact)


def _fused(parent: Any, name: str) -> nn.Module:
    child = getattr(parent, name)
    if isinstance(child, nn.Linear):
        return FusedLinear(child, gelu_of(parent, name))
    if is_residual(child):
        return FusedResidual(child.dense, child.LayerNorm)
    if isinstance(child, nn.LayerNorm):
        return _exact(child)
    return nn.Identity()  # the activation, which its linear layer now does
