"""Load weights completely or not at all, into plain transformers models.

Imports torch: import this where it is used.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models.files import refuse, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What torch, safetensors and transformers raise for damaged or unsafe files.
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, ImportError),
    *(pickle.UnpicklingError, SafetensorError),
)

# Buffers that older releases saved and newer ones compute: never weights.
_OLD_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")
# Layers behind the last hidden state, which no encoder here reads: BERT's pooler and language-model heads.
UNUSED_HEADS = re.compile(r"(^|\.)(pooler|cls|lm_head|predictions|vocab_(transform|layer_norm|projector))\.")


def torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
    return DTYPES[dtype]


def read_torch_file(path: str, *, mmap: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors of a `pytorch_model.bin` through torch's weights-only unpickler, on the CPU.

    mmap: map the file instead of reading it (names and shapes cost nothing then); ignored for files in torch's old
    format. Raises CheckpointError when the file is damaged, holds anything but tensors, or wants to run code.
    """
    try:
        with open(path, "rb") as handle:
            is_zip = handle.read(4) == b"PK\x03\x04"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        expected = "a state dict: only tensors and plain containers"
        hint = "do not load this file elsewhere unless you trust its author"
        what = "the weights file is damaged or holds code"
        raise CheckpointError(what, where=path, expected=expected, hint=hint) from error
    except _LOAD_ERRORS as error:
        hint = "copy or download it again"
        raise CheckpointError(f"the weights file is damaged: {_first_line(error)}", where=path, hint=hint) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        refuse("the weights file is no state dict", path, expected="a dictionary of tensors")
    return dict(content)


def read_weights(directory: str) -> dict[str, torch.Tensor]:
    """Return the checkpoint's whole state dict on the CPU, without the buffers that old releases saved."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        if not path.endswith(".safetensors"):
            state.update(read_torch_file(path, mmap=False))
            continue
        try:
            state.update(load_file(path))
        except _LOAD_ERRORS as error:
            hint = "copy or download it again"
            what = f"the weights file is damaged: {_first_line(error)}"
            raise CheckpointError(what, where=path, hint=hint) from error
    if not state:
        refuse("the checkpoint has no weights", directory, expected="model.safetensors or pytorch_model.bin")
    return {name: tensor for name, tensor in state.items() if not _OLD_BUFFERS.search(name)}


def read_config(directory: str) -> Any:
    """Return the transformers config of the directory. Raises CheckpointError; never runs the checkpoint's own code."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"config.json cannot be used: {_first_line(error)}", where=directory) from error


def build_model(
    model_class: Any,
    config: Any,
    state: dict[str, torch.Tensor],
    dtype: str,
    directory: str,
    *,
    needs_pooler: bool = False,
) -> Any:
    """Return `model_class` with the weights `state` in `dtype`, in evaluation mode, on the CPU.

    Missing tensors are refused, but for a BERT pooler's where nothing reads it; so are unexpected tensors that are
    not UNUSED_HEADS. Raises CheckpointError with the names.
    """
    torch_type = torch_dtype(dtype)
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=torch_type, output_loading_info=True
            )
    except _LOAD_ERRORS as error:
        what = f"the weights do not fit the model: {_first_line(error)}"
        raise CheckpointError(what, where=directory, expected=f"the tensors of {model_class.__name__}") from error
    missing = sorted(name for name in report["missing_keys"] if needs_pooler or not name.startswith("pooler."))
    unexpected = sorted(name for name in report["unexpected_keys"] if not UNUSED_HEADS.search(name))
    check_names(missing, unexpected, directory, model_class.__name__)
    return model.eval()


def check_names(missing: list[str], unexpected: list[str], directory: str, model: str) -> None:
    """Raise CheckpointError unless both lists of tensor names are empty."""
    for names, word in ((missing, "lack"), (unexpected, "hold unexpected")):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            hint = "the checkpoint is incomplete, or another kind of model than its config.json says"
            refuse(f"the weights {word} {shown}", directory, expected=f"the tensors of {model}", hint=hint)


def load_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """Return a fp32 Linear with these weights."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and progress bar: what it would say is checked and raised here."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
