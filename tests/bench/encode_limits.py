"""What the machine allows: its measured rate of matrix products, and how many of them a text takes."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_TOKENS = 2048  # rows of the measured products: a micro-batch
_REPEATS = 12
_TYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}

_barrier: Any = None


def transformer_flops(directory: str, length_N: npt.NDArray[np.int64]) -> int:
    """Return the floating-point operations of all texts in a BERT's layers, exactly, without any padding.

    A text of L tokens takes, in each layer, 2 L (4 H^2 + 2 H I) in the linear layers and 4 L^2 H in attention's two
    products. Embeddings, pooling and all that is no matrix product are left out, as in the limit.
    """
    layers, hidden, inner = shape(directory)
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner)
    length_N = np.asarray(length_N, np.int64)
    return layers * (linear * int(length_N.sum()) + 4 * hidden * int((length_N**2).sum()))


def shape(directory: str) -> tuple[int, int, int]:
    """Return (layers, hidden width, inner width) of a BERT directory."""
    config = json.loads(Path(directory, "config.json").read_text())
    return config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]


def matrix_limit(directory: str, compute: str, workers: int) -> dict[str, Any]:
    """Measure torch's linear layers of the model's shapes, one thread in each of `workers` processes at once.

    Returns "flops" (FLOP/s of all processes together, of the best shape and repeat of each) and "shapes", which says it
    for each shape.
    """
    _, hidden, inner = shape(directory)
    sizes = [(hidden, inner), (inner, hidden), (hidden, hidden)]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers)
    with ProcessPoolExecutor(workers, context, initializer=_share, initargs=(barrier,)) as pool:
        found = list(pool.map(_rates, [sizes] * workers, [_TYPES[compute]] * workers))
    totals = [sum(rates) for rates in zip(*found, strict=True)]
    shapes = {f"{_TOKENS}x{inside}x{out}": total for (inside, out), total in zip(sizes, totals, strict=True)}
    return {"flops": max(totals), "shapes": shapes, "compute": compute, "processes": workers}


def _share(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _rates(sizes: list[tuple[int, int]], dtype: str) -> list[float]:
    """Return the best FLOP/s of each (in, out) in this process, measured while the others do the same."""
    import torch

    torch.set_num_threads(1)
    best = []
    for inside, out in sizes:
        x, weight, bias = (
            torch.randn(*size).to(getattr(torch, dtype)) for size in ((_TOKENS, inside), (out, inside), (out,))
        )
        seconds = []
        _barrier.wait()
        with torch.inference_mode():
            for _ in range(_REPEATS):
                started = time.perf_counter()
                torch.nn.functional.linear(x, weight, bias)
                seconds.append(time.perf_counter() - started)
        best.append(2 * _TOKENS * inside * out / min(seconds))
    return best
