"""PAQ's vectors: `embeddings.pt.{k}`, each one tensor (n_k, D), fp16, whose row i belongs to line i of the QA pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from pipelines.errors import InputError

Array = npt.NDArray[Any]

_ROWS_IN_BLOCK = 16_384
_EXPECTED = "a floating-point tensor of shape (N, D), saved by torch.save"


def read_tensor(path: str) -> Iterator[tuple[None, Array]]:
    """Yield (None, vectors (N, D) float) of a saved tensor, block by block, mapped from the disk where torch can.

    Raises InputError when the file is damaged, holds anything but one such tensor, or wants to run code.
    """
    import torch

    with open(path, "rb") as handle:
        is_zip = handle.read(4) == b"PK\x03\x04"  # torch's format since 1.6, the only one that maps
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch has a dozen kinds for damaged and for unsafe files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = "copy or download it again; do not load it elsewhere unless you trust its author"
        what = f"the tensor file is damaged or holds code: {lines[0]}"
        raise InputError(what, where=path, expected=_EXPECTED, hint=hint) from error
    if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.dim() != 2:
        shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else ""
        raise InputError(f"the file holds a {type(tensor).__name__}{shape}", where=path, expected=_EXPECTED)
    if not tensor.is_floating_point():
        raise InputError(f"the tensor holds {tensor.dtype}", where=path, expected=_EXPECTED)
    for start in range(0, len(tensor), _ROWS_IN_BLOCK):
        block = tensor[start : start + _ROWS_IN_BLOCK].detach()
        yield None, (block.float() if block.dtype == torch.bfloat16 else block).numpy()
