"""Triton: layer normalisation that ends in codes."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.quantize_uniform import uniform_codes

# Rows stay in registers: a program takes as many narrow ones, or as many warps for a wide one, as
# leave each thread some eight to sixteen values.
BLOCK_ELEMENTS = 1024
WARP_ELEMENTS = 512
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Normalises and quantizes whole rows of `x` (rows, WIDTH)."""
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
    code = uniform_codes(values, tl.load(scale), tl.load(zero_point).to(tl.float32), TOP)
    if HAS_TABLE:
        code = tl.load(table + code, mask=inside, other=0)
    tl.store(codes + offsets, code.to(tl.uint8), mask=inside)


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
    block, warps = block_of(width)
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
            **OPTIONS,
        )
    return codes


def block_of(width: int) -> tuple[dict[str, int], int]:
    """The block of a program for rows of `width` values, and its warps."""
    padded = triton.next_power_of_2(width)
    rows = max(1, BLOCK_ELEMENTS // padded)
    warps = min(max(rows * padded // WARP_ELEMENTS, 4), 16)
    return {"BLOCK_ROWS": rows, "BLOCK_WIDTH": padded}, warps
