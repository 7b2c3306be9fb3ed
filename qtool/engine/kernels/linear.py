"""Triton: integer linear layer on int8 tensor cores, ending in values or in codes.

Weights are unpacked once, to int8 levels without zero points, and stay on the GPU beside the packed
ones: taken apart in the product they would cost more than they save from some hundred rows on. Both
factors enter the product as int8, activations less 128; what that adds is put right at the end,
from the sums of the weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.overlap import overlap, wait_for_inputs
from qtool.engine.kernels.registers import exp2, levels_of, lifted_codes, reciprocal
from qtool.engine.kernels.tiles import Ending, Tile, linear_tile
from qtool.engine.kernels.unpack_codes import unpack_codes
from qtool.engine.resident import derived


class Resident(NamedTuple):
    """Weights as the product takes them.

    Attributes:
        levels: Codes less their zero points, or less 128 where that leaves int8; int8 (N, K).
        shift: What is left of the zero points, int32 (N,), or None.
        sums: Sum of the levels less `shift` of every channel, int32 (N,).
    """

    levels: Tensor
    shift: Tensor | None
    sums: Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _halves(sums: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The left and the right half of the columns."""
    parts = sums.reshape(sums.shape[0], 2, sums.shape[1] // 2).permute(0, 2, 1).split()
    return parts[0], parts[1]


@triton.jit  # type: ignore[untyped-decorator]
def _gelu(x: tl.tensor) -> tl.tensor:
    """The product with the normal distribution function, within 6e-7 of it.

    The logarithm (base 2) of its odds is x times a polynomial in x squared, fitted up to 5.5; what
    lies beyond comes out as 0 and x. A third of the time of the error function.
    """
    square = x * x
    odds = tl.fma(square, 5.209924047733239e-09, -3.850456380405376e-07)
    odds = tl.fma(square, odds, 1.1452440048742574e-05)
    odds = tl.fma(square, odds, -0.00015938948490656912)
    odds = tl.fma(square, odds, -9.559270984027535e-05)
    odds = tl.fma(square, odds, 0.10483857989311218)
    odds = tl.fma(square, odds, 2.3022072315216064)
    return x * reciprocal(1.0 + exp2(-x * odds))


@triton.jit  # type: ignore[untyped-decorator]
def _finish(
    sums: tl.tensor,
    x_sums: tl.tensor,
    m_start: tl.tensor,
    n_start: tl.tensor,
    x_scale: tl.tensor,
    x_zero: tl.tensor,
    weight_shift: tl.tensor,
    weight_sums: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    out_scale: tl.tensor,
    out_zero: tl.tensor,
    out_table: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    group_channels: tl.tensor,
    SCALE_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GELU: tl.constexpr,
    QUANTIZES: tl.constexpr,
    FOLDED: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    TOP: tl.constexpr,
) -> None:
    """From raw sums (M, N) to what is stored in `y`.

    `FOLDED`: `weight_scale` and `bias` hold all that is done to sums up to the activation, or up to
    codes where there is none.
    """
    m_inside, n_inside = tl.arange(0, sums.shape[0]), tl.arange(0, sums.shape[1])
    m, n = m_start + m_inside, n_start + n_inside
    m_valid, n_valid = m < rows, n < channels
    valid = m_valid[:, None] & n_valid[None, :]
    scale = tl.load(weight_scale + n, mask=n_valid, other=0.0)[None, :]
    offset = tl.load(bias + n, mask=n_valid, other=0.0)[None, :] if HAS_BIAS else 0.0
    if FOLDED:
        values = tl.fma(sums.to(tl.float32), scale, offset)
    else:
        column_sums = tl.load(weight_sums + n, mask=n_valid, other=0)
        if ZERO_STEP:
            zero = tl.load(x_zero + m, mask=m_valid, other=0) - 128
            sums -= zero[:, None] * column_sums[None, :]
        else:
            sums -= ((tl.load(x_zero) - 128) * column_sums)[None, :]
        if HAS_SHIFT:
            sums -= x_sums[:, None] * tl.load(weight_shift + n, mask=n_valid, other=0)[None, :]
        if SCALE_STEP:
            scale = tl.load(x_scale + m, mask=m_valid, other=0.0)[:, None] * scale
        else:
            scale = tl.load(x_scale) * scale
        values = sums.to(tl.float32) * scale
        if HAS_BIAS:
            values += offset
    if QUANTIZES:
        if ONE_GROUP:  # no registers for the quantizer of each column
            group = n_start // group_channels
            inside_group = tl.multiple_of(n_start % group_channels, 16) + n_inside
        else:
            group = (tl.where(n_valid, n, 0) // group_channels)[None, :]
            inside_group = n % group_channels
        if HAS_GELU:
            values = _gelu(values)
        if HAS_GELU or not FOLDED:
            inverse = tl.div_rn(1.0, tl.load(out_scale + group))
            values = tl.fma(values, inverse, tl.load(out_zero + group).to(tl.float32))
        lifted = lifted_codes(values, TOP)
        if not HAS_TABLE:
            levels = lifted.to(tl.uint8)
        elif ONE_GROUP:
            levels = levels_of(out_table + group * 256, lifted)
        else:
            levels = levels_of(out_table, lifted + group * 256)
        start = group.to(tl.int64) * rows + m_start
        places = y + start * group_channels + m_inside[:, None] * group_channels
        tl.store(places + inside_group[None, :], levels, mask=valid)
    else:
        first = m_start.to(tl.int64) * channels + n_start
        inside = m_inside[:, None] * channels + n_inside[None, :]
        if HAS_RESIDUAL:
            values += tl.load(residual + first + inside, mask=valid, other=0.0)
        tl.store(y + first + inside, values, mask=valid)


@triton.jit  # type: ignore[untyped-decorator]
def linear_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    x_zero: tl.tensor,
    weight: tl.tensor,
    weight_shift: tl.tensor,
    weight_sums: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    y: tl.tensor,
    out_scale: tl.tensor,
    out_zero: tl.tensor,
    out_table: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    in_features: tl.tensor,
    group_channels: tl.tensor,
    SCALE_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GELU: tl.constexpr,
    QUANTIZES: tl.constexpr,
    FOLDED: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    TOP: tl.constexpr,
    EVEN_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Computes one tile of `y` (groups, rows, group_channels).

    `QUANTIZES` makes codes of the values, with one quantizer for each group of output channels.
    """
    # Programs walk down bands of `BAND` tiles, so that those at work share rows and channels.
    m_blocks, n_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    band = tl.program_id(0) // (BAND * n_blocks)
    place = tl.program_id(0) % (BAND * n_blocks)
    height = tl.minimum(m_blocks - band * BAND, BAND)
    m_start, n_start = (band * BAND + place % height) * BLOCK_M, place // height * BLOCK_N
    m, n = m_start + tl.arange(0, BLOCK_M), n_start + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the last one are read from the first: nothing of them is written.
    m, n = tl.where(m < rows, m, 0).to(tl.int64), tl.where(n < channels, n, 0)
    x_tile = x + (m * in_features)[:, None] + k[None, :]
    weight_tile = weight + (n * in_features)[None, :] + k[:, None]
    wait_for_inputs(OVERLAPS)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    x_sums = tl.zeros((BLOCK_M,), tl.int32)
    for k_start in range(0, in_features, BLOCK_K):
        if EVEN_K:
            codes, right = tl.load(x_tile), tl.load(weight_tile)
        else:
            inside = k_start + k < in_features
            codes = tl.load(x_tile, mask=inside[None, :], other=128)
            right = tl.load(weight_tile, mask=inside[:, None], other=0)
        left = (codes ^ 128).to(tl.int8, bitcast=True)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        if HAS_SHIFT:
            x_sums += tl.sum(left.to(tl.int32), 1)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K
    # Wide tiles end part by part, each with registers for its own columns only.
    if BLOCK_N <= 64:
        parts = (sums,)
    elif BLOCK_N == 128:
        parts = _halves(sums)
    else:
        left_sums, right_sums = _halves(sums)
        first, second = _halves(left_sums)
        third, fourth = _halves(right_sums)
        parts = (first, second, third, fourth)  # type: ignore[assignment]
    for part in tl.static_range(len(parts)):
        _finish(
            parts[part],
            x_sums,
            m_start,
            n_start + part * (BLOCK_N // len(parts)),
            x_scale,
            x_zero,
            weight_shift,
            weight_sums,
            weight_scale,
            bias,
            residual,
            y,
            out_scale,
            out_zero,
            out_table,
            rows,
            channels,
            group_channels,
            SCALE_STEP,
            ZERO_STEP,
            HAS_SHIFT,
            HAS_BIAS,
            HAS_RESIDUAL,
            HAS_GELU,
            QUANTIZES,
            FOLDED,
            ONE_GROUP,
            HAS_TABLE,
            TOP,
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
    residual: Tensor | None = None,
) -> Tensor:
    """Integer linear layer; see `qtool.engine.ops.linear`."""
    y = weight_scale.new_empty(*x.shape[:-1], len(weight))
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits, in_features)
    return _launch(y, x, x_scale, x_zero, *parameters, residual=residual)


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
    *,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Fills `y` with values, or with codes where there are quantizers for them."""
    if y.numel() == 0:
        return y
    resident = derived(_unpacking(weight_bits, in_features), weight, weight_zero)
    rows, channels = math.prod(x.shape[:-1]), len(weight)
    ending = Ending.VALUES if out_scale is None else Ending.CODES
    if tile is None:
        tile = linear_tile(rows, channels, in_features, ending, x.device)
    groups = 1 if out_scale is None else len(out_scale)
    plain = x_scale.numel() == x_zero.numel() == 1 and resident.shift is None
    folded = False
    if plain and out_scale is not None and out_zero is not None:
        folded = True
        parameters = [x_scale, x_zero, resident.sums, out_scale, out_zero]
        if bias is not None:
            parameters.append(bias)
        weight_scale, bias = derived(_folding(activation), weight_scale, *parameters).unbind()
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(channels, tile.columns)
    with torch.cuda.device_of(x):
        linear_kernel[(blocks,)](
            x.contiguous(),
            x_scale.contiguous(),
            x_zero.contiguous(),
            resident.levels,
            resident.shift,
            resident.sums,
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            None if residual is None else residual.contiguous(),
            y,
            None if out_scale is None else out_scale.contiguous(),
            None if out_zero is None else out_zero.contiguous(),
            None if out_table is None else out_table.contiguous(),
            rows,
            channels,
            in_features,
            channels // groups,
            SCALE_STEP=int(x_scale.numel() > 1),
            ZERO_STEP=int(x_zero.numel() > 1),
            HAS_SHIFT=resident.shift is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_GELU=activation == "gelu",
            QUANTIZES=out_scale is not None,
            FOLDED=folded,
            ONE_GROUP=groups == 1 or channels // groups % tile.columns == 0,
            HAS_TABLE=out_table is not None,
            TOP=2**out_bits - 1 if out_table is None else 255,
            EVEN_K=in_features % tile.depth == 0,
            **tile.constants(),
            **tile.options(),
            **overlap(x.device),
        )
    return y


@functools.cache
def _unpacking(bits: int, in_features: int) -> Callable[[Tensor, Tensor], Resident]:
    def unpack(weight: Tensor, weight_zero: Tensor) -> Resident:
        codes = unpack_codes(weight, bits, in_features)
        zeros = weight_zero[:, None].short()
        if bits < 8 or bool((weight_zero == 128).all()):
            levels, shift = (codes.short() - zeros).to(torch.int8), None
        else:
            levels, shift = (codes ^ 128).view(torch.int8), weight_zero - 128
        sums = levels.sum(1, dtype=torch.int32)
        return Resident(levels, shift, sums if shift is None else sums - in_features * shift)

    return unpack


@functools.cache
def _folding(activation: str) -> Callable[..., Tensor]:
    """What makes one factor and one addend of all that is done to the sums of a channel."""

    def fold(
        weight_scale: Tensor,
        x_scale: Tensor,
        x_zero: Tensor,
        sums: Tensor,
        out_scale: Tensor,
        out_zero: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        factor = weight_scale.double() * x_scale.double()
        addend = (128 - x_zero.double()) * sums * factor
        if bias is not None:
            addend += bias
        if activation == "none":
            repeats = len(sums) // len(out_scale)
            factor /= out_scale.repeat_interleave(repeats)
            addend /= out_scale.repeat_interleave(repeats)
            addend += out_zero.repeat_interleave(repeats)
        return torch.stack([factor, addend]).float()

    return fold
