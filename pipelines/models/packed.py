"""Run a transformer without computing padding: the tokens of a micro-batch in one row, attention within each text.

Everything but attention works on one token at a time, so a micro-batch of B texts can be a single row of its T real
tokens. Attention gets the texts' boundaries: on CUDA it is a kernel of ours, or torch's variable-length flash
attention, on a CPU batched products over texts of one length. transformers' attention interface carries them, for
every model that asks it for its attention and takes positions as an argument; which do is tried when a model is loaded,
against its own padded result. The others (MPNet and DeBERTa with relative positions) run padded.

Imports torch and transformers: import this where it is used.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipelines.models import fused

_log = logging.getLogger(__name__)

_NAME = "pinakes_packed"
_BY_TORCH = "pinakes_packed_by_torch"
# Families whose layers look at nothing but positions, attention and single tokens. Anything new is tried first.
_PACKABLE = ("albert", "bert", "camembert", "distilbert", "dpr", "electra", "roberta", "xlm-roberta")
_AFTER_PADDING = ("camembert", "roberta", "xlm-roberta")  # their positions start behind the padding id
_SCORES = 600_000  # attention scores at once on a CPU: about what fits a core's second-level cache
_SHORT = 32  # tokens of a text, below which a call costs more than its work
_ROW_STEP = 16  # tokens: oneDNN prepares its products for one number of rows, and keeps a bounded number of them
_TRIAL_LENGTHS = (5, 9, 9, 3)  # of the texts tried when a model is loaded; two are alike
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative difference (of the norms) by which another order of the same sums may change hidden states."""


@dataclass(frozen=True)
class Boundaries:
    """Where the texts of a packed row lie. Counts are ints of the CPU: nothing here waits for a device.

    starts_B1: (B + 1,) int32 on the model's device. longest: tokens. runs: (start, texts, tokens a text) of each
    stretch of texts of one length.
    """

    starts_B1: torch.Tensor
    longest: int
    runs: tuple[tuple[int, int, int], ...]


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Boundaries, float], torch.Tensor]
"""(query_THD, key_THD, value_THD, boundaries, scale) to out_THD."""


def _interface(kernel: Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return `kernel` as transformers' attention interface calls it: heads before tokens, out_1THD."""

    def attend(
        module: nn.Module,
        query_1HTD: torch.Tensor,
        key_1HTD: torch.Tensor,
        value_1HTD: torch.Tensor,
        attention_mask: None,
        scaling: float | None = None,
        boundaries: Boundaries | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        assert boundaries is not None, "packed attention needs the texts' boundaries"
        query, key, value = (x[0].transpose(0, 1) for x in (query_1HTD, key_1HTD, value_1HTD))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel(query, key, value, boundaries, scale).unsqueeze(0), None

    return attend


def _attend(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, boundaries: Boundaries, scale: float
) -> torch.Tensor:
    """Attend within each text, by what is fastest on the device."""
    if not query_THD.is_cuda:
        return _attend_on_cpu(query_THD, key_THD, value_THD, boundaries, scale)
    from pipelines.models import kernels

    return kernels.attend(query_THD, key_THD, value_THD, boundaries.starts_B1, boundaries.longest, scale)


def _attend_by_torch(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, boundaries: Boundaries, scale: float
) -> torch.Tensor:
    """Attend within each text by torch's variable-length flash attention, which only CUDA has."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = boundaries.starts_B1, boundaries.longest
    out_THD: torch.Tensor = varlen_attn(query_THD, key_THD, value_THD, starts, starts, longest, longest, scale=scale)
    return out_THD


def _attend_on_cpu(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, boundaries: Boundaries, scale: float
) -> torch.Tensor:
    """Attend within each text, a few texts of one length at a time, so that the scores stay in the cache."""
    out_THD = torch.zeros(query_THD.shape, dtype=query_THD.dtype)
    heads, width = query_THD.shape[1:]
    for start, length, count in _chunks(boundaries, heads):
        stop = start + count * length
        query, key, value = (
            x[start:stop].view(count, length, heads, width).transpose(1, 2) for x in (query_THD, key_THD, value_THD)
        )
        out_CHLD = _softmax_attention(query, key, value, scale)
        out_THD[start:stop].view(count, length, heads, width).copy_(out_CHLD.transpose(1, 2))
    return out_THD


def _softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Return softmax(query key' scale) value for (C, H, L, D) of texts without padding.

    oneDNN's batched bf16 products are twice as fast as torch's fused CPU kernel, which multiplies by way of fp32 where
    there is no AMX; in fp32 the fused kernel is the faster.
    """
    if query.dtype is not torch.bfloat16:
        return nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
    count, heads, length, width = query.shape
    query, key, value = (x.reshape(count * heads, length, width) for x in (query, key, value))
    nothing, out_BLD = query.new_zeros(1, 1, 1), torch.empty_like(query)
    at_once = max(1, _SCORES // (length * length))
    for first in range(0, count * heads, at_once):
        pieces = [query, key, value, out_BLD]
        if at_once < count * heads:
            pieces = [x[first : first + at_once] for x in pieces]
        few_query, few_key, few_value, out = pieces
        score_BLL = torch.baddbmm(nothing, few_query, few_key.transpose(1, 2), beta=0, alpha=scale)
        torch.bmm(_softmax(score_BLL), few_value, out=out)
    return out_BLD.view(count, heads, length, width)


def _softmax(score_BLL: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last dimension.

    oneDNN's takes two thirds of the time, but is three calls instead of one, between which a server's other threads
    want Python's lock: for texts as short as queries torch's own. The two round differently, so that the length alone
    decides: a text's numbers must not depend on how many come with it.
    """
    if score_BLL.shape[-1] < _SHORT:
        return torch.softmax(score_BLL, -1)
    return torch.softmax(score_BLL.to_mkldnn(), -1).to_dense()


def _chunks(boundaries: Boundaries, heads: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, tokens a text, texts): the runs cut to a bounded number of attention scores."""
    for start, texts, length in boundaries.runs:
        step = max(1, _SCORES // (heads * length * length))
        for first in range(0, texts, step):
            yield start + first * length, length, min(step, texts - first)


AttentionInterface.register(_NAME, _interface(_attend))
AttentionInterface.register(_BY_TORCH, _interface(_attend_by_torch))


class Transformer(nn.Module):
    """A transformers encoder that computes no padding, where it can; called like the model it holds.

    It takes ids, mask and types in the CPU's memory, wherever the model is, and returns hidden states there: (B, L, H),
    zero at padding. packs: 0 when it computes padding; else what a packed row's tokens are rounded up to a multiple of.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.packs = model, model.config, 0
        self.tune()

    @property
    def device(self) -> torch.device:
        return self._some_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._some_weight.dtype

    @property
    def _some_weight(self) -> torch.Tensor:
        weight: torch.Tensor = next(self.model.parameters())  # of an embedding: a fused layer's are no parameters
        return weight

    def tune(self) -> None:
        """Choose the fastest way that gives the model's own result; runs it on a few made-up tokens."""
        own = self._trial()
        for what, fuse in fused.ways(self.model):
            changes = fuse(self.model)
            if not self._agrees(own, what):
                fused.undo(changes)
        if self.config.model_type in _PACKABLE and self._has_kernel():
            self._pack(own)

    def _pack(self, own: torch.Tensor) -> None:
        """Pack the texts if a kernel here does that right; the first that does is the fastest."""
        attention = self.config._attn_implementation
        on_cpu = self.device.type == "cpu"
        ways = {_NAME: "packed texts"} if on_cpu else {_NAME: "packed texts", _BY_TORCH: "torch's packed attention"}
        for name, what in ways.items():
            self.model.set_attn_implementation(name)
            self.packs = _ROW_STEP if on_cpu else 1
            if self._agrees(own, what):
                return
        self.model.set_attn_implementation(attention)
        self.packs = 0

    def _agrees(self, own: torch.Tensor, what: str) -> bool:
        kind = self.config.model_type
        try:
            found = self._trial()
        except Exception as error:  # no such kernel for this device or head width, or no compiler for ours
            _log.warning("%s: %s are not used: %s", kind, what, str(error).partition("\n")[0])
            return False
        difference = float((found - own).norm() / own.norm().clamp(min=1e-12))
        if difference <= _CLOSE[self.dtype]:  # false for NaN
            return True
        _log.warning("%s: %s change the model's result by %.2g and are not used", kind, what, difference)
        return False

    def _has_kernel(self) -> bool:
        return self.device.type == "cpu" or self.dtype in (torch.bfloat16, torch.float16)

    def _longest(self) -> int:
        limit = getattr(self.config, "max_position_embeddings", None) or max(_TRIAL_LENGTHS) + _first(self.config)
        return max(1, int(limit) - _first(self.config))

    @torch.inference_mode()
    def _trial(self) -> torch.Tensor:
        """Return the hidden states of a few made-up texts, where they have tokens, as fp32 on the CPU."""
        length_B = torch.tensor(_TRIAL_LENGTHS).clamp(max=self._longest())
        mask_BL = (torch.arange(int(length_B.max())) < length_B[:, None]).long()
        pad = int(getattr(self.config, "pad_token_id", None) or 0)
        ids_BL = torch.arange(mask_BL.numel()).view(mask_BL.shape) * 7 % (self.config.vocab_size - pad - 1) + pad + 1
        hidden_BLH = self(ids_BL * mask_BL + pad * (1 - mask_BL), mask_BL).last_hidden_state
        return hidden_BLH.float().cpu()[mask_BL.bool()]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Return last_hidden_state (B, L, H), and pooler_output where the model has a pooler."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        if not self.packs:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **types}
            return self.model(**{name: move(tensor, self.device) for name, tensor in inputs.items()})
        hidden_BLH = self._forward_packed(input_ids, attention_mask.bool(), types)
        pooler = getattr(self.model, "pooler", None)
        pooled = None if pooler is None else self._pool(pooler, hidden_BLH)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_BLH, pooler_output=pooled)

    def _pool(self, pooler: Any, hidden_BLH: torch.Tensor) -> torch.Tensor:
        # ALBERT's pooler is a bare Linear on the first hidden state, with its tanh beside it.
        if hasattr(self.model, "pooler_activation"):
            pooled: torch.Tensor = self.model.pooler_activation(pooler(hidden_BLH[:, 0]))
        else:
            pooled = pooler(hidden_BLH)
        return pooled

    def _forward_packed(
        self, ids_BL: torch.Tensor, mask_BL: torch.Tensor, types: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return hidden_BLH. ids_BL, mask_BL (bool) and types lie in the CPU's memory."""
        device, (texts, longest) = self.device, ids_BL.shape
        place_T = mask_BL.flatten().nonzero().flatten()
        packed = {"input_ids": ids_BL.flatten()[place_T], "position_ids": _positions(place_T, longest, self.config)}
        if "token_type_ids" in inspect.signature(self.model.forward).parameters:
            known = types.get("token_type_ids")
            packed["token_type_ids"] = torch.zeros_like(place_T) if known is None else known.flatten()[place_T]
        unused = -len(place_T) % self.packs  # behind the texts, copies of the last token
        inputs = {name: move(_extended(tensor, unused), device).unsqueeze(0) for name, tensor in packed.items()}
        boundaries = _boundaries(mask_BL.sum(1), device)
        hidden_TH = self.model(**inputs, boundaries=boundaries).last_hidden_state[0, : len(place_T)]
        if len(place_T) == mask_BL.numel():
            return hidden_TH.view(texts, longest, -1)
        hidden_BLH = hidden_TH.new_zeros(texts * longest, hidden_TH.shape[-1])
        return hidden_BLH.index_copy_(0, move(place_T, device), hidden_TH).view(texts, longest, -1)


def pack(model: Any) -> Any:
    """Put the fastest form of its transformer into a transformers model with a head; returns the model."""
    prefix = model.base_model_prefix
    setattr(model, prefix, Transformer(getattr(model, prefix)))
    return model


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on `device`; to CUDA from pinned memory, so that the CPU does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _extended(tensor_T: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([tensor_T, tensor_T[-1:].expand(rows)]) if rows else tensor_T


def _positions(place_T: torch.Tensor, longest: int, config: Any) -> torch.Tensor:
    """Return position_T of the packed tokens: 0, 1, ... in each text, behind the padding id for RoBERTa and its kin.

    place_T: where they lie in texts padded to the longest, one behind the other.
    """
    return place_T % longest + _first(config)


def _first(config: Any) -> int:
    return int(config.pad_token_id) + 1 if config.model_type in _AFTER_PADDING else 0


def _boundaries(length_B: torch.Tensor, device: torch.device) -> Boundaries:
    starts_B1 = torch.zeros(len(length_B) + 1, dtype=torch.int32)
    torch.cumsum(length_B, 0, out=starts_B1[1:])
    lengths, counts = torch.unique_consecutive(length_B, return_counts=True)
    runs, start = [], 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        if length:
            runs.append((start, count, length))
        start += length * count
    return Boundaries(move(starts_B1, device), int(length_B.max()), tuple(runs))
