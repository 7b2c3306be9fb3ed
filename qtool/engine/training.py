"""What training does beside the products of networks: on a GPU in one pass over memory each.

PyTorch takes five to fifteen passes for each of these, forwards and backwards, which on a GPU costs
launches and memory traffic. Elsewhere it is as good as anything.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from qtool.engine import dispatch
from qtool.engine.geometry import layout_of


def has_kernels(device: torch.device) -> bool:
    """Whether kernels do the work for tensors of a device."""
    return dispatch.takes_triton(device)


def _kernels(name: str) -> Any:  # noqa: ANN401  (a module)
    return importlib.import_module(f"qtool.engine.kernels.{name}")


class _Count(torch.autograd.Function):
    """Count in steps from 0 to `top`; the gradient passes in between, in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, top: int) -> Tensor:  # noqa: ANN401
        ctx.top, ctx.fused = top, has_kernels(x.device)
        if ctx.fused:
            x = x.contiguous(memory_format=layout_of(x))
            ctx.save_for_backward(x, step)
            levels: Tensor = _kernels("count_levels").count_levels(x, step, top)
            return levels
        ratio = x / step
        ctx.save_for_backward(ratio, step)
        return ratio.clamp(0, top).round_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        if ctx.fused:
            x, step = ctx.saved_tensors
            gradient = gradient.contiguous(memory_format=layout_of(x))
            passed, share = _kernels("count_levels").count_gradients(gradient, x, step, ctx.top)
            return passed, share.view_as(step), None
        ratio, step = ctx.saved_tensors
        passing = torch.ops.aten.hardtanh_backward(gradient, ratio, 0, ctx.top).div_(step)
        return passing, (passing * ratio).sum().neg_(), None


def count_levels(x: Tensor, step: Tensor, top: int) -> Tensor:
    """Whole numbers from 0 to `top` next to `x` over a learnt step, in the type of `x`.

    The gradient of `x` passes straight through where nothing was cut off; the step gets what that
    makes of it.

    Args:
        x: Of any shape.
        step: What a level is worth, ().
        top: The highest level.

    Reference: LSQ (arXiv 1902.08153), without the product that follows.
    """
    levels: Tensor = _Count.apply(x, step, top)
    return levels


class _KernelSums(torch.autograd.Function):
    """`kernel_sums` on a GPU."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, points: Tensor, bandwidth: float) -> Tensor:  # noqa: ANN401
        values = values.contiguous()
        ctx.save_for_backward(values, points)
        ctx.bandwidth = bandwidth
        sums: Tensor = _kernels("kernel_sums").kernel_sums(values, points, bandwidth)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        passed: Tensor = _kernels("kernel_sums").kernel_gradients(
            gradient, *ctx.saved_tensors, ctx.bandwidth
        )
        return passed, None, None


def kernel_sums(values: Tensor, points: Tensor, bandwidth: float) -> Tensor:
    """Sums of `exp(-((value - point) / bandwidth)^2 / 2)` over the values of each row, by kernels.

    Args:
        values: float32 (B, M); they get a gradient.
        points: float32 (P,); they get none.
        bandwidth: Standard deviation of the Gaussian.

    Returns:
        float32 (B, P).
    """
    sums: Tensor = _KernelSums.apply(values, points, bandwidth)
    return sums


class _RowDistances(torch.autograd.Function):
    """`row_distances` on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor) -> Tensor:  # noqa: ANN401
        x = x if x.stride(-1) == 1 else x.contiguous()
        found: Tensor
        found, differences = _kernels("row_distances").row_distances(x, target.contiguous())
        ctx.save_for_backward(differences)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (differences,) = ctx.saved_tensors
        return differences * (2.0 * gradient).unsqueeze(-1), None


def row_distances(x: Tensor, target: Tensor) -> Tensor:
    """Squared distance of every row to its target times the sum of the row, by kernels.

    The sum counts as given: no gradient passes through it.

    Args:
        x: float32 (A, B, T); it gets a gradient.
        target: float32 (A, B, T).

    Returns:
        float32 (A, B).
    """
    found: Tensor = _RowDistances.apply(x, target)
    return found
