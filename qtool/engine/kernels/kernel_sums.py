"""Triton: Gaussian kernels around a few points, summed over many values, and the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"BLOCK": 2048}
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def kernel_sums_kernel(
    values: tl.tensor,
    points: tl.tensor,
    sums: tl.tensor,
    count: tl.tensor,
    inverse: tl.tensor,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sums of one block of a row of `values` (rows, count), to `sums` (rows, blocks, POINTS)."""
    row, block = tl.program_id(0), tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    found = tl.load(values + row.to(tl.int64) * count + place, mask=inside, other=0.0)
    target = sums + (row * tl.num_programs(1) + block) * POINTS
    for index in tl.static_range(POINTS):
        away = (found - tl.load(points + index)) * inverse
        near = tl.where(inside, tl.exp(-0.5 * away * away), 0.0)
        tl.store(target + index, tl.sum(near, 0))


@triton.jit  # type: ignore[untyped-decorator]
def kernel_gradients_kernel(
    gradient: tl.tensor,
    values: tl.tensor,
    points: tl.tensor,
    passed: tl.tensor,
    count: tl.tensor,
    inverse: tl.tensor,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """What one block of a row gets of the gradients (rows, POINTS) of its sums."""
    row, block = tl.program_id(0), tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    start = row.to(tl.int64) * count
    found = tl.load(values + start + place, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for index in tl.static_range(POINTS):
        away = (found - tl.load(points + index)) * inverse
        total -= tl.load(gradient + row * POINTS + index) * away * tl.exp(-0.5 * away * away)
    tl.store(passed + start + place, total * inverse, mask=inside)


def kernel_sums(values: Tensor, points: Tensor, bandwidth: float) -> Tensor:
    """Sums (B, P); see `qtool.engine.training.kernel_sums`."""
    rows, count = values.shape
    blocks = triton.cdiv(count, BLOCK["BLOCK"])
    sums = torch.empty(rows, blocks, len(points), dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        kernel_sums_kernel[(rows, blocks)](
            values, points, sums, count, 1 / bandwidth, POINTS=len(points), **BLOCK, **OPTIONS
        )
    return sums.sum(dim=1)


def kernel_gradients(gradient: Tensor, values: Tensor, points: Tensor, bandwidth: float) -> Tensor:
    """The gradient of `values` (B, M) from that of the sums (B, P)."""
    rows, count = values.shape
    passed = torch.empty_like(values)
    with torch.cuda.device_of(values):
        kernel_gradients_kernel[(rows, triton.cdiv(count, BLOCK["BLOCK"]))](
            gradient.contiguous(),
            values,
            points,
            passed,
            count,
            1 / bandwidth,
            POINTS=len(points),
            **BLOCK,
            **OPTIONS,
        )
    return passed
