"""Triton: uniform codes and levels of a table, per tensor or per token."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"BLOCK_ROWS": 4, "BLOCK_WIDTH": 256}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def uniform_codes(
    values: tl.tensor, step: tl.tensor, zero: tl.tensor, TOP: tl.constexpr
) -> tl.tensor:
    """Codes of float32 `values` as int32; `step` and `zero`, float32 too, broadcast to them."""
    ratio = tl.div_rn(values, step)
    # Adding and taking away 1.5 * 2^23 rounds half to even, as long as the ratio is below 2^22.
    ratio = tl.minimum(tl.maximum(ratio, -2097152.0), 2097152.0)
    level = (ratio + 12582912.0) - 12582912.0 + zero
    return tl.minimum(tl.maximum(level, 0.0), TOP).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_uniform_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    table: tl.tensor,
    codes: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    SCALE_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    TOP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Quantizes one tile of `x` (rows, width); a step of 0 reads one parameter for all rows."""
    blocks = tl.cdiv(width, BLOCK_WIDTH)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    valid = row < rows
    inside = valid[:, None] & (column < width)[None, :]
    offsets = row[:, None] * width + column[None, :]
    values = tl.load(x + offsets, mask=inside, other=0.0)
    step = tl.load(scale + row * SCALE_STEP, mask=valid, other=1.0)
    zero = tl.load(zero_point + row * ZERO_STEP, mask=valid, other=0).to(tl.float32)
    code = uniform_codes(values, step[:, None], zero[:, None], TOP)
    if HAS_TABLE:
        code = tl.load(table + code, mask=inside, other=0)
    tl.store(codes + offsets, code.to(tl.uint8), mask=inside)


def quantize_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Uniform codes of `x`; see `qtool.engine.ops.quantize_uniform`."""
    return _launch(x, scale, zero_point, None, bits)


def quantize_table(x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor) -> Tensor:
    """Levels of `x`; see `qtool.engine.ops.quantize_table`."""
    return _launch(x, scale, zero_point, table.contiguous(), 8)


def _launch(
    x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor | None, bits: int
) -> Tensor:
    x, scale, zero_point = x.contiguous(), scale.contiguous(), zero_point.contiguous()
    codes = torch.empty_like(x, dtype=torch.uint8)
    if x.numel() == 0:
        return codes
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    blocks = triton.cdiv(rows, BLOCK["BLOCK_ROWS"]) * triton.cdiv(width, BLOCK["BLOCK_WIDTH"])
    with torch.cuda.device_of(x):
        quantize_uniform_kernel[(blocks,)](
            x,
            scale,
            zero_point,
            codes if table is None else table,
            codes,
            rows,
            width,
            SCALE_STEP=int(scale.numel() > 1),
            ZERO_STEP=int(zero_point.numel() > 1),
            TOP=2**bits - 1,
            HAS_TABLE=table is not None,
            **BLOCK,
            **OPTIONS,
        )
    return codes
