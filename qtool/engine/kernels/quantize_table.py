"""Triton: levels of a table, per tensor or per token."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.quantize_uniform import BLOCK, OPTIONS, uniform_levels


@triton.jit  # type: ignore[untyped-decorator]
def quantize_table_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    zero_point: tl.tensor,
    table: tl.tensor,
    levels: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    SCALE_STEP: tl.constexpr,
    ZERO_STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Quantizes one tile of `x` (rows, width); the table stays in the first-level cache."""
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
    code = uniform_levels(values, step[:, None], zero[:, None], 255)
    tl.store(levels + offsets, tl.load(table + code, mask=inside, other=0), mask=inside)


def quantize_table(x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor) -> Tensor:
    """Levels of `x`; see `qtool.engine.ops.quantize_table`."""
    x, scale, zero_point = x.contiguous(), scale.contiguous(), zero_point.contiguous()
    levels = torch.empty_like(x, dtype=torch.uint8)
    if x.numel() == 0:
        return levels
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    blocks = triton.cdiv(rows, BLOCK["BLOCK_ROWS"]) * triton.cdiv(width, BLOCK["BLOCK_WIDTH"])
    with torch.cuda.device_of(x):
        quantize_table_kernel[(blocks,)](
            x,
            scale,
            zero_point,
            table.contiguous(),
            levels,
            rows,
            width,
            SCALE_STEP=int(scale.numel() > 1),
            ZERO_STEP=int(zero_point.numel() > 1),
            **BLOCK,
            **OPTIONS,
        )
    return levels
