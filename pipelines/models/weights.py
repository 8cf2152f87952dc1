"""Load weights completely or not at all, into plain transformers models.

Imports torch: import this where it is used.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models.files import refuse, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What torch, safetensors and transformers raise for damaged or unsafe files.
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError, ImportError),
    *(AssertionError, struct.error, pickle.UnpicklingError, SafetensorError),
)

# Buffers that older releases saved and newer ones compute: never weights.
_OLD_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")
# Layers behind the last hidden state, which no encoder here reads: BERT's pooler and language-model heads.
UNUSED_HEADS = re.compile(r"(^|\.)(pooler|cls|lm_head|predictions|vocab_(transform|layer_norm|projector))\.")

_NAMED_CODE = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message
_DEEPEST = 20  # levels of a config; a damaged one may contain itself
_one_at_a_time = threading.RLock()


def torch_dtype(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}", expected=", ".join(DTYPES))
    return DTYPES[dtype]


def read_torch_file(path: str, *, mmap: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors of a `pytorch_model.bin` through torch's weights-only unpickler, on the CPU.

    mmap: map the file instead of reading it (names and shapes cost nothing then); ignored for files in torch's old
    format. Raises CheckpointError when the file is damaged, holds anything but tensors, or wants to run code.
    """
    content = _load(path, mmap=mmap)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        refuse("the weights file is no state dict", path, expected="a dictionary of tensors")
    return dict(content)


@dataclass(frozen=True)
class NativeFile:
    """What a DPR `.cp` file holds for inference. params: its `encoder_params` as plain values, one level deep."""

    tensors: dict[str, torch.Tensor]
    params: dict[str, Any]


def read_native_file(path: str) -> NativeFile:
    """Return the model of a DPR `.cp` file, mapped from the disk where torch's format allows it.

    Optimizer and scheduler state is dropped. OmegaConf objects, which files of 2021 and later hold, are read as inert
    stand-ins. Raises CheckpointError when the file is damaged, is no such checkpoint, or names any other class.
    """
    # torch keeps one list for the process: a second reader must not shorten it under the first.
    with _STAND_INS_LOCK, torch.serialization.safe_globals(_stand_ins()):
        content = _load(path, mmap=True)
    expected = "a DPR checkpoint: a dictionary with model_dict and encoder_params"
    state = content.get("model_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        refuse("the .cp file holds no model", path, expected=expected, hint="train it with DPR, or get it again")
    tensors = {str(name): tensor for name, tensor in state.items() if not _OLD_BUFFERS.search(str(name))}
    params = _plain(content.get("encoder_params") or {}, 0)
    if not isinstance(params, dict):
        refuse("the .cp file's encoder_params are no dictionary", path, expected=expected)
    nested = params.pop("encoder", None)  # 2021 and later: all but do_lower_case
    return NativeFile(tensors, params | (nested if isinstance(nested, dict) else {}))


class _StandIn:
    """Take the place of a class that must not run: keep the state it was saved with, do nothing."""

    def __new__(cls, *_: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _empty(*_: Any) -> dict[Any, Any]:
    """Stand in for collections.defaultdict, whose items the unpickler fills in."""
    return {}


# What OmegaConf 2 pickles refer to, beside numpy scalars in optimizer and scheduler state.
_STAND_INS = """
    omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.base.Metadata
    omegaconf.base.ContainerMetadata omegaconf.nodes.AnyNode omegaconf.nodes.StringNode omegaconf.nodes.IntegerNode
    omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode omegaconf.nodes.ValueNode omegaconf.base.UnionNode
    omegaconf.nodes.InterpolationResultNode typing.Any typing.Union typing.Optional typing.Dict typing.List
    operator.getitem _operator.getitem builtins.dict builtins.list builtins.str builtins.int builtins.long
    builtins.float builtins.bool builtins.object builtins.NoneType numpy.dtype numpy.ndarray
    numpy.core.multiarray.scalar numpy._core.multiarray.scalar numpy.core.multiarray._reconstruct
    numpy._core.multiarray._reconstruct
"""
_STAND_INS_LOCK = threading.Lock()


def _stand_ins() -> list[Any]:
    return [(_empty, "collections.defaultdict"), *((_StandIn, name) for name in _STAND_INS.split())]


def _plain(value: Any, depth: int) -> Any:
    """Return dictionaries, lists and scalars of a value that may hold OmegaConf stand-ins; None for anything else."""
    if depth > _DEEPEST:
        return None
    if isinstance(value, _StandIn):
        state = value.state if isinstance(value.state, dict) else {}
        return _plain(state.get("_content", state.get("_val")), depth + 1)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def _load(path: str, *, mmap: bool) -> Any:
    """Run torch's weights-only unpickler, on the CPU. Raises CheckpointError for damage and for code, by its name."""
    try:
        with open(path, "rb") as handle:
            is_zip = handle.read(4) == b"PK\x03\x04"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        named = _NAMED_CODE.search(str(error))
        what = "the weights file is damaged or holds code" + (f": {named[1]}" if named else "")
        expected = "a state dict: only tensors and plain containers"
        hint = "do not load this file elsewhere unless you trust its author"
        raise CheckpointError(what, where=path, expected=expected, hint=hint) from error
    except _LOAD_ERRORS as error:
        hint = "copy or download it again"
        raise CheckpointError(f"the weights file is damaged: {_first_line(error)}", where=path, hint=hint) from error


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
    if torch_type is not torch.float32:
        _remember_norms(model, state)
    return model.eval()


def _remember_norms(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Give every LayerNorm of a bf16 or fp16 model its unrounded weight and bias, as a plain attribute `exact`.

    Rounding these few numbers costs as much cosine as all other rounding of weights together: kernels that take them
    in fp32 beside such inputs use them (see `fused`).
    """
    prefix = model.base_model_prefix + "."
    for name, module in model.named_modules():
        if type(module) is not torch.nn.LayerNorm or module.weight is None or module.bias is None:
            continue
        spellings = [
            spelling
            for stem in (name, prefix + name, name.removeprefix(prefix))
            for spelling in ((f"{stem}.weight", f"{stem}.bias"), (f"{stem}.gamma", f"{stem}.beta"))
        ]
        for weight, bias in spellings:
            exact = [state[key].float() for key in (weight, bias) if key in state]
            own = [module.weight, module.bias]
            # Equal after rounding: it is this layer's, however the names were mapped.
            if len(exact) == 2 and all(torch.equal(e.to(o.dtype), o) for e, o in zip(exact, own, strict=True)):
                module.exact = tuple(exact)
                break


def check_names(missing: list[str], unexpected: list[str], directory: str, model: str) -> None:
    """Raise CheckpointError unless both lists of tensor names are empty."""
    for names, word in ((missing, "lack"), (unexpected, "hold unexpected")):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            hint = "the checkpoint is incomplete, or another kind of model than its config.json says"
            refuse(f"the weights {word} {shown}", directory, expected=f"the tensors of {model}", hint=hint)


def load_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """Return a fp32 Linear with these weights. Raises CheckpointError when they do not fit each other."""
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = f"{list(weight.shape)} and {None if bias is None else list(bias.shape)}"
        raise CheckpointError(f"a linear layer's weight and bias do not fit: {shapes}", expected="(out, in) and (out,)")
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float32)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and progress bar: what it would say is checked and raised here.

    One thread at a time: while it loads, transformers changes its own classes and torch's default dtype and puts them
    back after, and of two threads the later one would put back what the earlier one had changed, for good.
    """
    from transformers.utils import logging

    with _one_at_a_time:
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
