"""Triton: integer linear layer on int8 tensor cores, from packed or prepared weights.

Both factors enter the product as int8, activations less 128. The zero points are put right once, at
the end, from the sums of rows and columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles that spill no registers on compute capability 8.0, 9.0 and 10.0. Multiplication and addition
# stay apart, since fusing them would change the last bit.
PACKED = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
PREPARED = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}
PACKED_OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
PREPARED_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def _plane(
    rows: tl.tensor,
    valid: tl.tensor,
    k_start: tl.tensor,
    in_features: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Fields (BLOCK_N, BLOCK_K) of the plane that begins at the pointers `rows` (BLOCK_N,)."""
    byte = k_start * WIDTH // 8 + tl.arange(0, BLOCK_K * WIDTH // 8)
    inside = valid[:, None] & (byte < (in_features * WIDTH + 7) // 8)[None, :]
    fields = tl.load(rows[:, None] + byte[None, :], mask=inside, other=0)
    if WIDTH <= 4:
        fields = tl.interleave(fields & 15, fields >> 4)
    if WIDTH <= 2:
        fields = tl.interleave(fields & 3, fields >> 2)
    if WIDTH == 1:
        fields = tl.interleave(fields & 1, fields >> 1)
    return fields


@triton.jit  # type: ignore[untyped-decorator]
def unpacked(
    rows: tl.tensor,
    valid: tl.tensor,
    k_start: tl.tensor,
    in_features: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Weights (BLOCK_N, BLOCK_K) as int8, zero past the last feature; 8-bit codes less 128."""
    if BITS == 8:
        codes = _plane(rows, valid, k_start, in_features, 8, BLOCK_K) ^ 128
    else:
        if BITS & 4:
            codes = _plane(rows, valid, k_start, in_features, 4, BLOCK_K)
            rows += (in_features + 1) // 2
        if BITS & 2:
            pairs = _plane(rows, valid, k_start, in_features, 2, BLOCK_K)
            codes = (codes | (pairs << 4)) if BITS & 4 else pairs
            rows += (in_features + 3) // 4
        if BITS & 1:
            codes |= _plane(rows, valid, k_start, in_features, 1, BLOCK_K) << (BITS - 1)
    k = k_start + tl.arange(0, BLOCK_K)
    return tl.where((k < in_features)[None, :], codes, 0).to(tl.int8, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def linear_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    x_zero: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    weight_zero: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    in_features: tl.tensor,
    row_bytes: tl.tensor,
    SCALE_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PREPARED: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Computes one tile of `y` (rows, channels); int8 weights are codes less `OFFSET`."""
    blocks = tl.cdiv(channels, BLOCK_N)
    program = tl.program_id(0)
    m_start = (program // blocks).to(tl.int64) * BLOCK_M
    n_start = (program % blocks).to(tl.int64) * BLOCK_N
    m, n = m_start + tl.arange(0, BLOCK_M), n_start + tl.arange(0, BLOCK_N)
    m_valid, n_valid = m < rows, n < channels
    x_rows = x + m_start * in_features + tl.arange(0, BLOCK_M) * in_features
    weight_rows = weight + n_start * row_bytes + tl.arange(0, BLOCK_N) * row_bytes
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
        if IS_PREPARED:
            right = tl.load(
                weight_rows[:, None] + k[None, :],
                mask=n_valid[:, None] & inside[None, :],
                other=0,
            )
        else:
            right = unpacked(weight_rows, n_valid, k_start, in_features, BITS, BLOCK_K)
        sums = tl.dot(left, tl.trans(right), sums, out_dtype=tl.int32)
        x_sums += tl.sum(left.to(tl.int32), 1)
        weight_sums += tl.sum(right.to(tl.int32), 1)
    zero = tl.load(x_zero + m * ZERO_STEP, mask=m_valid, other=0) - 128
    weight_shift = tl.load(weight_zero + n, mask=n_valid, other=0) - OFFSET
    column = weight_sums - in_features * weight_shift
    sums -= x_sums[:, None] * weight_shift[None, :] + zero[:, None] * column[None, :]
    scale = tl.load(x_scale + m * SCALE_STEP, mask=m_valid, other=0.0)
    channel_scale = tl.load(weight_scale + n, mask=n_valid, other=0.0)
    result = sums.to(tl.float32) * (scale[:, None] * channel_scale[None, :])
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n_valid, other=0.0)[None, :]
    tl.store(
        y + m[:, None] * channels + n[None, :], result, mask=m_valid[:, None] & n_valid[None, :]
    )


def linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
) -> Tensor:
    """Integer linear layer; see `qtool.engine.ops.linear`."""
    x, weight = x.contiguous(), weight.contiguous()
    rows, channels = math.prod(x.shape[:-1]), len(weight)
    prepared = weight.dtype == torch.int8
    y = weight_scale.new_empty(*x.shape[:-1], channels)
    if y.numel() == 0:
        return y
    tile, options = (PREPARED, PREPARED_OPTIONS) if prepared else (PACKED, PACKED_OPTIONS)
    blocks = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(channels, tile["BLOCK_N"])
    with torch.cuda.device_of(x):
        linear_kernel[(blocks,)](
            x,
            x_scale.contiguous(),
            x_zero.contiguous(),
            weight,
            weight_scale.contiguous(),
            weight_zero.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            rows,
            channels,
            in_features,
            weight.shape[1],
            SCALE_STEP=int(x_scale.numel() > 1),
            ZERO_STEP=int(x_zero.numel() > 1),
            HAS_BIAS=bias is not None,
            IS_PREPARED=prepared,
            BITS=weight_bits,
            OFFSET=2 ** (weight_bits - 1) if prepared or weight_bits == 8 else 0,
            **tile,
            **options,
        )
    return y
