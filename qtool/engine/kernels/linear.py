"""Triton: integer linear layer on int8 tensor cores, from packed weights to values or codes.

Both factors enter the product as int8, activations less 128. The zero points are put right once, at
the end, from the sums of rows and columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.quantize_uniform import uniform_codes

# A tile that spills no registers on compute capability 8.0, 9.0 and 10.0. Multiplication and
# addition stay apart, since fusing them would change the last bit.
TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


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
    out_scale: tl.tensor,
    out_zero: tl.tensor,
    out_table: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    in_features: tl.tensor,
    row_bytes: tl.tensor,
    group_channels: tl.tensor,
    SCALE_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GELU: tl.constexpr,
    QUANTIZES: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    TOP: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Computes one tile of `y` (groups, rows, group_channels); int8 weights are codes - `OFFSET`.

    `QUANTIZES` makes codes of the values, with one quantizer for each group of output channels.
    """
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
    if HAS_GELU:
        result = 0.5 * result * (1.0 + tl.erf(result * 0.7071067811865476))
    valid = m_valid[:, None] & n_valid[None, :]
    if QUANTIZES:
        group = n // group_channels
        offsets = m[:, None] * group_channels + (group * rows * group_channels + n % group_channels)
        step = tl.load(out_scale + group, mask=n_valid, other=1.0)
        middle = tl.load(out_zero + group, mask=n_valid, other=0).to(tl.float32)
        code = uniform_codes(result, step[None, :], middle[None, :], TOP)
        if HAS_TABLE:
            code = tl.load(out_table + group[None, :] * 256 + code, mask=valid, other=0)
        tl.store(y + offsets, code.to(tl.uint8), mask=valid)
    else:
        tl.store(y + m[:, None] * channels + n[None, :], result, mask=valid)


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
    y = weight_scale.new_empty(*x.shape[:-1], len(weight))
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits, in_features)
    return _launch(y, x, x_scale, x_zero, *parameters)


def linear_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
    activation: str,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Tensor:
    """Integer linear layer that ends in codes; see `qtool.engine.ops.linear_quantize`."""
    groups = len(out_scale)
    shape = (*x.shape[:-1], len(weight) // groups)
    y = x.new_empty(shape if groups == 1 else (groups, *shape))
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits, in_features)
    output = (activation, out_scale, out_zero, out_table, out_bits)
    return _launch(y, x, x_scale, x_zero, *parameters, *output)


def _launch(
    y: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero: Tensor | None = None,
    out_table: Tensor | None = None,
    out_bits: int = 8,
) -> Tensor:
    """Fills `y` with values, or with codes where there are quantizers for them."""
    if y.numel() == 0:
        return y
    x, weight = x.contiguous(), weight.contiguous()
    rows, channels = math.prod(x.shape[:-1]), len(weight)
    blocks = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(channels, TILE["BLOCK_N"])
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
            None if out_scale is None else out_scale.contiguous(),
            None if out_zero is None else out_zero.contiguous(),
            None if out_table is None else out_table.contiguous(),
            rows,
            channels,
            in_features,
            weight.shape[1],
            channels if out_scale is None else channels // len(out_scale),
            SCALE_STEP=int(x_scale.numel() > 1),
            ZERO_STEP=int(x_zero.numel() > 1),
            HAS_BIAS=bias is not None,
            HAS_GELU=activation == "gelu",
            QUANTIZES=out_scale is not None,
            HAS_TABLE=out_table is not None,
            TOP=2**out_bits - 1 if out_table is None else 255,
            BITS=weight_bits,
            OFFSET=128 if weight_bits == 8 else 0,
            **TILE,
            **OPTIONS,
        )
    return y
