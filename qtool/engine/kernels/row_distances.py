"""Triton: squared distances of rows to targets of the same sum, and the differences."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def row_distances_kernel(
    x: tl.tensor,
    target: tl.tensor,
    distances: tl.tensor,
    differences: tl.tensor,
    inner: tl.tensor,
    outer_step: tl.tensor,
    inner_step: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One row: of `x` (outer, inner, width) with any steps, of the others contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row // inner * outer_step + row % inner * inner_step
    found = tl.load(x + place + column, mask=inside, other=0.0)
    wanted = tl.load(target + row * width + column, mask=inside, other=0.0)
    away = found - wanted * tl.sum(found, 0)
    tl.store(differences + row * width + column, away, mask=inside)
    tl.store(distances + row, tl.sum(away * away, 0))


def row_distances(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (A, B) and differences (A, B, T); see `qtool.engine.training`."""
    outer, inner, width = x.shape
    distances = torch.empty(outer, inner, dtype=torch.float32, device=x.device)
    differences = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            row_distances_kernel[(outer * inner,)](
                x,
                target,
                distances,
                differences,
                inner,
                x.stride(0),
                x.stride(1),
                width,
                BLOCK=block_of(width),
                **OPTIONS,
            )
    return distances, differences


def block_of(width: int) -> int:
    """Columns of a program for rows of so many."""
    return int(triton.next_power_of_2(width))
