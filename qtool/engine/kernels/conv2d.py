"""Triton: integer convolution as an implicit matrix product on int8 tensor cores.

The windows that a matrix product needs as rows are gathered while they are read; they never lie in
memory. Padding is read as the code of zero, so the sums over rows that put the zero points right
count it like any code. Windows that only lie side by side are a linear layer on patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.activations import activated
from qtool.engine.geometry import cuts_patches, output_size
from qtool.engine.kernels.linear import linear
from qtool.engine.kernels.quantize_uniform import quantize_table, quantize_uniform

# WIDE for many output channels in a group, NARROW for depthwise kernels and few channels.
WIDE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
NARROW = {"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 32}
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
def _unpacked(
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
def conv2d_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    x_zero: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    weight_zero: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    places: tl.tensor,
    depth: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    y_height: tl.tensor,
    y_width: tl.tensor,
    group_channels: tl.tensor,
    row_bytes: tl.tensor,
    GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Computes some output channels of a group at some of all `places` (picture, row, column)."""
    n_blocks = tl.cdiv(group_channels, BLOCK_N)
    program = tl.program_id(0)
    group = program % GROUPS
    n_block = program // GROUPS % n_blocks
    m = (program // GROUPS // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_inside = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    n = (group * group_channels + n_inside).to(tl.int64)
    m_valid, n_valid = m < places, n_inside < group_channels
    picture = m // (y_height * y_width)
    place = (m % (y_height * y_width)).to(tl.int32)
    top = place // y_width * STRIDE_H - PADDING_H
    left_edge = place % y_width * STRIDE_W - PADDING_W
    planes = x + (picture * GROUPS + group) * depth * height * width
    weight_rows = weight + n * row_bytes
    zero_code = tl.load(x_zero)
    terms = depth * KERNEL_H * KERNEL_W
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    x_sums = tl.zeros((BLOCK_M,), tl.int32)
    weight_sums = tl.zeros((BLOCK_N,), tl.int32)
    for k_start in range(0, terms, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        inside = k < terms
        channel = k // (KERNEL_H * KERNEL_W)
        row = top[:, None] + (k // KERNEL_W % KERNEL_H * DILATION_H)[None, :]
        column = left_edge[:, None] + (k % KERNEL_W * DILATION_W)[None, :]
        there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        codes = tl.load(
            planes[:, None] + (channel * height * width)[None, :] + row * width + column,
            mask=m_valid[:, None] & inside[None, :] & there,
            other=0,
        )
        codes = tl.where(there, codes, zero_code.to(tl.uint8))
        codes = tl.where(inside[None, :], codes ^ 128, 0)
        left = codes.to(tl.int8, bitcast=True)
        right = _unpacked(weight_rows, n_valid, k_start, terms, BITS, BLOCK_K)
        sums = tl.dot(left, tl.trans(right), sums, out_dtype=tl.int32)
        x_sums += tl.sum(left.to(tl.int32), 1)
        weight_sums += tl.sum(right.to(tl.int32), 1)
    weight_shift = tl.load(weight_zero + n, mask=n_valid, other=0) - OFFSET
    column_sums = weight_sums - terms * weight_shift
    sums -= x_sums[:, None] * weight_shift[None, :] + (zero_code - 128) * column_sums[None, :]
    channel_scale = tl.load(weight_scale + n, mask=n_valid, other=0.0)
    result = sums.to(tl.float32) * (tl.load(x_scale) * channel_scale)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n_valid, other=0.0)[None, :]
    area = y_height * y_width
    target = (picture * (GROUPS * group_channels))[:, None] + n[None, :]
    tl.store(y + target * area + place[:, None], result, mask=m_valid[:, None] & n_valid[None, :])


def conv2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Integer convolution; see `qtool.engine.ops.conv2d`."""
    size = output_size(
        x.shape[2:], kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )
    if cuts_patches(kernel, stride, padding, dilation, groups):
        shared = (weight, weight_scale, weight_zero, bias, weight_bits)
        patches = _patches(x, size, kernel)
        rows = linear(patches, x_scale, x_zero, *shared, patches.shape[-1])
        return rows.permute(0, 3, 1, 2)
    x, weight = x.contiguous(), weight.contiguous()
    y = weight_scale.new_empty(len(x), len(weight), *size)
    if y.numel() == 0:
        return y
    group_channels = len(weight) // groups
    tile = WIDE if group_channels > NARROW["BLOCK_N"] else NARROW
    places = len(x) * size[0] * size[1]
    blocks = triton.cdiv(places, tile["BLOCK_M"]) * triton.cdiv(group_channels, tile["BLOCK_N"])
    with torch.cuda.device_of(x):
        conv2d_kernel[(blocks * groups,)](
            x,
            x_scale,
            x_zero,
            weight,
            weight_scale.contiguous(),
            weight_zero.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            places,
            x.shape[1] // groups,
            x.shape[2],
            x.shape[3],
            *size,
            group_channels,
            weight.shape[1],
            GROUPS=groups,
            KERNEL_H=kernel[0],
            KERNEL_W=kernel[1],
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            PADDING_H=padding[0],
            PADDING_W=padding[1],
            DILATION_H=dilation[0],
            DILATION_W=dilation[1],
            HAS_BIAS=bias is not None,
            BITS=weight_bits,
            OFFSET=128 if weight_bits == 8 else 0,
            **tile,
            **OPTIONS,
        )
    return y


def conv2d_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Tensor:
    """Integer convolution that ends in codes; see `qtool.engine.ops.conv2d_quantize`."""
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits)
    y = conv2d(x, x_scale, x_zero, *parameters, kernel, stride, padding, dilation, groups)
    y = activated(y, activation)
    if out_table is not None:
        return quantize_table(y, out_scale, out_zero, out_table)
    return quantize_uniform(y, out_scale, out_zero, out_bits)


def _patches(x: Tensor, size: tuple[int, int], kernel: Sequence[int]) -> Tensor:
    """What lies under the kernel at every place, (B, H', W', C * kernel area)."""
    x = x[..., : size[0] * kernel[0], : size[1] * kernel[1]]
    cut = x.reshape(*x.shape[:2], size[0], kernel[0], size[1], kernel[1])
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
