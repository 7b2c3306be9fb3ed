"""Triton: integer linear layer with the leading bits of resident 8-bit weights.

The shift is an argument, so that one kernel serves every width and a switch compiles nothing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["shift"])  # type: ignore[untyped-decorator]
def linear_nested_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    x_zero: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    in_features: tl.tensor,
    shift: tl.tensor,
    SCALE_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Computes one tile of `y` (rows, channels) from weights shifted by `shift`."""
    blocks = tl.cdiv(channels, BLOCK_N)
    program = tl.program_id(0)
    m_start = (program // blocks).to(tl.int64) * BLOCK_M
    n_start = (program % blocks).to(tl.int64) * BLOCK_N
    m, n = m_start + tl.arange(0, BLOCK_M), n_start + tl.arange(0, BLOCK_N)
    m_valid, n_valid = m < rows, n < channels
    x_rows = x + m_start * in_features + tl.arange(0, BLOCK_M) * in_features
    weight_rows = weight + n_start * in_features + tl.arange(0, BLOCK_N) * in_features
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    x_sums = tl.zeros((BLOCK_M,), tl.int32)
    weight_sums = tl.zeros((BLOCK_N,), tl.int32)
    for k_start in range(0, in_features, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = k < in_features
        codes = tl.load(
            x_rows[:, None] + k[None, :], mask=m_valid[:, None] & inside[None, :], other=128
        )
        left = (codes ^ 128).to(tl.int8, bitcast=True)
        right = tl.load(
            weight_rows[:, None] + k[None, :], mask=n_valid[:, None] & inside[None, :], other=0
        )
        right = right >> shift.to(tl.int8)
        sums = tl.dot(left, tl.trans(right), sums, out_dtype=tl.int32)
        x_sums += tl.sum(left.to(tl.int32), 1)
        weight_sums += tl.sum(right.to(tl.int32), 1)
    zero = tl.load(x_zero + m * ZERO_STEP, mask=m_valid, other=0) - 128
    level_sums = 2 * weight_sums + in_features
    sums = 2 * sums + x_sums[:, None] - zero[:, None] * level_sums[None, :]
    scale = tl.load(x_scale + m * SCALE_STEP, mask=m_valid, other=0.0)
    channel_scale = tl.load(weight_scale + n, mask=n_valid, other=0.0)
    result = sums.to(tl.float32) * (scale[:, None] * channel_scale[None, :])
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n_valid, other=0.0)[None, :]
    tl.store(
        y + m[:, None] * channels + n[None, :], result, mask=m_valid[:, None] & n_valid[None, :]
    )


def linear_nested(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """Linear layer with the leading bits of its weight; see `qtool.engine.ops.linear_nested`."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, channels, in_features = math.prod(x.shape[:-1]), len(weight), x.shape[-1]
    y = weight_scale.new_empty(*x.shape[:-1], channels)
    if y.numel() == 0:
        return y
    blocks = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(channels, TILE["BLOCK_N"])
    with torch.cuda.device_of(x):
        linear_nested_kernel[(blocks,)](
            x,
            x_scale.contiguous(),
            x_zero.contiguous(),
            weight,
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            rows,
            channels,
            in_features,
            8 - bits,
            SCALE_STEP=int(x_scale.numel() > 1),
            ZERO_STEP=int(x_zero.numel() > 1),
            HAS_BIAS=bias is not None,
            **TILE,
            **OPTIONS,
        )
    return y
