"""Triton: counting in learnt steps, and the gradients of that, each in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"BLOCK": 2048}
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def count_levels_kernel(
    x: tl.tensor,
    step: tl.tensor,
    levels: tl.tensor,
    count: tl.tensor,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rounds `x` over the step to whole numbers from 0 to TOP."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    ratio = tl.minimum(tl.maximum(tl.div_rn(values, tl.load(step)), 0.0), TOP)
    # Adding and taking away 1.5 * 2^23 rounds half to even.
    level = (ratio + 12582912.0) - 12582912.0
    tl.store(levels + place, level.to(levels.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def count_gradients_kernel(
    gradient: tl.tensor,
    x: tl.tensor,
    step: tl.tensor,
    passed: tl.tensor,
    shares: tl.tensor,
    count: tl.tensor,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of `x`, and what each program adds to that of the step."""
    program = tl.program_id(0)
    place = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    scale = tl.load(step)
    ratio = tl.div_rn(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), scale)
    arrived = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    passing = tl.where((ratio > 0.0) & (ratio < TOP), tl.div_rn(arrived, scale), 0.0)
    tl.store(passed + place, passing.to(passed.dtype.element_ty), mask=inside)
    tl.store(shares + program, tl.sum(passing * ratio, 0))


def count_levels(x: Tensor, step: Tensor, top: int) -> Tensor:
    """Levels of `x`, dense, in its type and layout; see `qtool.engine.training.count_levels`."""
    levels = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            count_levels_kernel[_grid(x)](x, step, levels, x.numel(), TOP=top, **BLOCK, **OPTIONS)
    return levels


def count_gradients(gradient: Tensor, x: Tensor, step: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the step; `gradient` lies in memory as `x` does."""
    passed = torch.empty_like(x)
    (programs,) = _grid(x)
    shares = torch.empty(programs, dtype=torch.float32, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            count_gradients_kernel[(programs,)](
                gradient, x, step, passed, shares, x.numel(), TOP=top, **BLOCK, **OPTIONS
            )
    # Programs leave what they found and none waits for another, so that the sum is always the same.
    return passed, shares.sum().neg_()


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), BLOCK["BLOCK"]),)
