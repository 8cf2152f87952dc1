"""Kernels of our own for CUDA. Imports Triton, which comes with torch's CUDA builds: import this where it is used."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_PER_PROGRAM = 4096  # numbers that one program normalises, in whole rows
_BLOCK = 64  # tokens: the fastest of 32, 64, 128 for passages on an H200


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]
    out, hidden, residual, weight, bias, num_rows, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    is_column = column < width
    inside = (row < num_rows) & is_column
    at = row * width + column
    total = tl.load(hidden + at, inside, 0.0).to(tl.float32) + tl.load(residual + at, inside, 0.0).to(tl.float32)
    centred = tl.where(is_column, total - tl.sum(total, 1, keep_dims=True) / width, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) / width
    scale = tl.load(weight + column, is_column, 0.0)
    shift = tl.load(bias + column, is_column, 0.0)
    tl.store(out + at, centred * tl.rsqrt(variance + eps) * scale + shift, inside)


def add_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight_H: torch.Tensor, bias_H: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return layer_norm(hidden + residual) over the last dimension H, computed in fp32 and rounded once.

    hidden, residual: alike in shape, in bf16 or fp16. weight_H, bias_H: (H,) fp32.
    """
    hidden, residual = hidden.contiguous(), residual.contiguous()
    width = hidden.shape[-1]
    num_rows = hidden.numel() // width
    columns = triton.next_power_of_2(width)
    rows = max(1, _PER_PROGRAM // columns)
    out = torch.empty_like(hidden)
    grid = (triton.cdiv(num_rows, rows),)
    _add_norm[grid](out, hidden, residual, weight_H, bias_H, num_rows, width, eps, ROWS=rows, COLUMNS=columns)
    return out


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    out, query, key, value, starts, query_step, key_step, value_step, out_step, scale,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    text, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + text).to(tl.int64)
    length = (tl.load(starts + text + 1) - start).to(tl.int32)
    first = tl.program_id(2) * QUERIES
    if first >= length:
        return
    column = tl.arange(0, WIDTH) + head * WIDTH
    place = first + tl.arange(0, QUERIES)
    is_query = (place < length)[:, None]
    query_QD = tl.load(query + (start + place)[:, None] * query_step + column[None, :], is_query, 0.0)
    # The softmax is built up over blocks of keys: what is summed so far shrinks when a larger score turns up.
    most_Q = tl.full([QUERIES], float("-inf"), tl.float32)
    sum_Q = tl.zeros([QUERIES], tl.float32)
    total_QD = tl.zeros([QUERIES, WIDTH], tl.float32)
    for begin in range(0, length, KEYS):
        other = begin + tl.arange(0, KEYS)
        is_key = other < length
        key_DK = tl.load(key + (start + other)[None, :] * key_step + column[:, None], is_key[None, :], 0.0)
        value_KD = tl.load(value + (start + other)[:, None] * value_step + column[None, :], is_key[:, None], 0.0)
        score_QK = tl.where(is_key[None, :], tl.dot(query_QD, key_DK) * scale, float("-inf"))
        new_Q = tl.maximum(most_Q, tl.max(score_QK, 1))
        share_QK = tl.exp2(score_QK - new_Q[:, None])
        shrink_Q = tl.exp2(most_Q - new_Q)
        sum_Q = sum_Q * shrink_Q + tl.sum(share_QK, 1)
        total_QD = tl.dot(share_QK.to(value_KD.dtype), value_KD, total_QD * shrink_Q[:, None])
        most_Q = new_Q
    tl.store(out + (start + place)[:, None] * out_step + column[None, :], total_QD / sum_Q[:, None], is_query)


def attend(
    query_THD: torch.Tensor,
    key_THD: torch.Tensor,
    value_THD: torch.Tensor,
    starts_B1: torch.Tensor,
    longest: int,
    scale: float,
) -> torch.Tensor:
    """Return softmax(query key' scale) value within each text of a packed row, out_THD, as flash attention computes it.

    The texts here are short: blocks of 64 tokens waste less of them than flash attention's 128, and a text's bits do
    not depend on the others'. query, key, value: bf16 or fp16, heads side by side (D and H contiguous; rows may be
    further apart); D a power of 2 from 16 on. starts_B1: (B + 1,) int32. longest: tokens.
    """
    num_heads, width = query_THD.shape[1:]
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
    steps = [x.stride(0) for x in (query_THD, key_THD, value_THD, out_THD)]
    grid = (len(starts_B1) - 1, num_heads, triton.cdiv(longest, _BLOCK))
    in_base_2 = scale * math.log2(math.e)
    _attend[grid](out_THD, query_THD, key_THD, value_THD, starts_B1, *steps, in_base_2,
                  WIDTH=width, QUERIES=_BLOCK, KEYS=_BLOCK, num_warps=4, num_stages=3)  # fmt: skip
    return out_THD
