"""Triton: layer normalisation that ends in codes."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.overlap import overlap, wait_for_inputs
from qtool.engine.kernels.registers import levels_of, lifted_codes

FILLED_ROWS = 4096  # so many rows keep every multiprocessor busy
OPTIONS = {"enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def layer_norm_quantize_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    table: tl.tensor,
    codes: tl.tensor,
    rows: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    TOP: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Normalises and quantizes whole rows of `x` (rows, WIDTH)."""
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    there = column < WIDTH
    inside = (row < rows)[:, None] & there[None, :]
    offsets = row[:, None] * WIDTH + column[None, :]
    values = tl.load(x + offsets, mask=inside, other=0.0)
    mean = tl.sum(values, 1) * (1.0 / WIDTH)
    # The deviations are squared only once the mean is known: a sum of squares would cancel.
    values = tl.where(inside, values - mean[:, None], 0.0)
    variance = tl.sum(values * values, 1) * (1.0 / WIDTH)
    values *= tl.div_rn(1.0, tl.sqrt_rn(variance + eps))[:, None]
    if HAS_WEIGHT:
        values *= tl.load(weight + column, mask=there, other=0.0)[None, :]
    if HAS_BIAS:
        values += tl.load(bias + column, mask=there, other=0.0)[None, :]
    inverse, zero = tl.div_rn(1.0, tl.load(scale)), tl.load(zero_point).to(tl.float32)
    lifted = lifted_codes(tl.fma(values, inverse, zero), TOP)
    levels = levels_of(table, lifted) if HAS_TABLE else lifted.to(tl.uint8)
    tl.store(codes + offsets, levels, mask=inside)


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    bits: int,
) -> Tensor:
    """Codes of a normalised `x`; see `qtool.engine.ops.layer_norm_quantize`."""
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.uint8)
    if x.numel() == 0:
        return codes
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    block, warps = block_of(rows, width)
    with torch.cuda.device_of(x):
        layer_norm_quantize_kernel[(triton.cdiv(rows, block["BLOCK_ROWS"]),)](
            x,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            scale,
            zero_point,
            None if table is None else table.contiguous(),
            codes,
            rows,
            eps,
            WIDTH=width,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_TABLE=table is not None,
            TOP=2**bits - 1 if table is None else 255,
            num_warps=warps,
            **block,
            **overlap(x.device),
            **OPTIONS,
        )
    return codes


def block_of(rows: int, width: int) -> tuple[dict[str, int], int]:
    """The block of a program for rows of `width` values, and its warps.

    Rows stay in registers. Where there are many, a warp takes two of 768 values, and a program as
    many narrower ones or as many warps as come to the same; few rows are done sooner by more warps.
    """
    padded = triton.next_power_of_2(width)
    values = 2048 if rows >= FILLED_ROWS else 1024
    block_rows = max(1, values // padded)
    each = 2048 if rows >= FILLED_ROWS else 256
    warps = min(max(block_rows * padded // each, 1), 16)
    return {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": padded}, warps
