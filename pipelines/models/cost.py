"""What a text costs: the multiplications of a model, counted, and what its device could do at most, measured.

Imports torch: import this where it is used.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.models import fused
from pipelines.models.weights import torch_dtype

_log = logging.getLogger(__name__)

_LIMIT_SECONDS = 0.15  # of the device, once for a process
_LIMIT_SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns: large enough for the best rate, small enough to repeat
_REPEATS = 10  # products between two looks at the clock, on a GPU


@dataclass(frozen=True)
class Cost:
    """FLOPs of the matrix products of one text of L tokens: `constant + linear * L + quadratic * L * L`.

    An addition and a multiplication count as two. What is no matrix product (norms, softmax) is not counted.
    """

    linear: float
    quadratic: float
    constant: float = 0.0

    def of(self, length_N: npt.NDArray[Any]) -> float:
        """Return the FLOPs of N texts together. length_N: (N,) their tokens, without padding."""
        length_N = length_N.astype(np.float64)
        each_N = self.constant + self.linear * length_N + self.quadratic * length_N**2
        return float(each_N.sum())


def count_flops(tower: Any) -> Cost | None:
    """Return what a text (or an image) costs this tower; None for one without matrix products, or that can't be told.

    The transformer is built once more on torch's meta device, without weights or memory, and run there under torch's
    counter: shapes alone decide, so that no kernel and no packing of ours changes the count.
    """
    backbone = getattr(tower, "backbone", None)
    if backbone is None:
        return None
    model = getattr(backbone, "model", backbone)
    inside = set(backbone.modules())
    head = sum(2 * m.in_features * m.out_features for m in tower.modules() if type(m) is nn.Linear and m not in inside)
    try:
        found = _count(model)
    except Exception as error:  # a figure of the summary is no reason to fail
        _log.warning("the cost of a %s cannot be counted: %s", model.config.model_type, error)
        return None
    return Cost(found.linear, found.quadratic, found.constant + head)


def _count(model: Any) -> Cost:
    """Return the cost of the transformer alone, from its FLOPs on one and two texts of three lengths."""
    empty = _without_weights(model)
    if model.main_input_name == "pixel_values":
        shape = (model.config.num_channels, model.config.image_size, model.config.image_size)
        one, two = (_run(empty, torch.zeros(count, *shape, device="meta")) for count in (1, 2))
        return Cost(0.0, 0.0, float(two - one))
    sizes = ((1, 2), (2, 2), (2, 4), (2, 6))  # texts, tokens
    one, *both = (_run(empty, torch.zeros(size, dtype=torch.int64, device="meta")) for size in sizes)
    shared = 2 * one - both[0]  # DeBERTa projects its positions once for a micro-batch
    at_2, at_4, at_6 = ((flops - shared) / 2 for flops in both)
    quadratic = (at_6 - 2 * at_4 + at_2) / 8
    linear = (at_4 - at_2) / 2 - 6 * quadratic
    return Cost(linear, quadratic, at_2 - 2 * linear - 4 * quadratic)


def _without_weights(model: Any) -> Any:
    """Return a copy of a transformers model with shapes and no values."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # plain products, which the counter knows
    with torch.device("meta"):
        empty = type(model)(config).eval().requires_grad_(False)
    empty.config.pad_token_id = None  # DeBERTa looks for padding, and a meta tensor has no values to look at
    if getattr(model, "pooler", None) is None and hasattr(empty, "pooler"):
        empty.pooler = None
    return empty


@torch.no_grad()
def _run(model: Any, inputs: torch.Tensor) -> int:
    """Return the FLOPs of one call."""
    with FlopCounterMode(display=False) as counter:
        model(**{model.main_input_name: inputs})
    return int(counter.get_total_flops())


@lru_cache(maxsize=8)
def measure_matrix_limit(device: str, compute: str, num_threads: int) -> float:
    """Return the FLOP/s of the fastest matrix product found here: square ones in `compute` arithmetic, for 0.15 s.

    num_threads: what torch computes with on a CPU, as it is set already. Measured once in a process.
    """
    kind, dtype = device.partition(":")[0], torch_dtype(compute)
    size = _LIMIT_SIZES[kind]
    linear: nn.Module = nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)
    hidden_LH = torch.randn(size, size, device=device).to(dtype)
    if fused.can_fuse(linear):
        linear = fused.FusedLinear(linear)
    repeats = 1 if kind == "cpu" else _REPEATS
    _products(linear, hidden_LH, 1)  # the first one prepares
    best, started = _products(linear, hidden_LH, repeats), time.perf_counter()
    while time.perf_counter() - started < _LIMIT_SECONDS:
        best = min(best, _products(linear, hidden_LH, repeats))
    return 2.0 * size**3 * repeats / best


@torch.no_grad()
def _products(linear: nn.Module, hidden_LH: torch.Tensor, repeats: int) -> float:
    """Return the seconds of that many products."""
    started = time.perf_counter()
    for _ in range(repeats):
        linear(hidden_LH)
    if hidden_LH.is_cuda:
        torch.cuda.synchronize(hidden_LH.device)
    return time.perf_counter() - started
