"""Choosing scales and zero points, and quantization that gradients pass through.

The simulated products here work on integer-valued float32 tensors and apply scales in the order
the engine applies them, so that a simulated layer and its integer form give the same numbers
whenever integer sums stay below 2^24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PERCENTILES = (1.0, 0.99999, 0.9999, 0.999)
_SHRINK_STEPS = 20
_SHRINK_FLOOR = 0.4
_SAMPLE = 65_536
_LOG2_CANDIDATES = (1.0, 0.9999, 0.999, 0.99, 0.97, 0.95)
_SQRT_HALF = 0.70710678


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes as if nothing had happened."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class _Log2Value(torch.autograd.Function):
    """Snap to scale-free powers of two; the gradient passes where the value is not cut to zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, ratio: Tensor, bits: int) -> Tensor:
        mantissa, exponent = torch.frexp(ratio)
        code = (mantissa <= _SQRT_HALF).int() - exponent
        value: Tensor = torch.exp2(-code.clamp_min(0).float())
        kept = (mantissa > 0) & (code < min(2**bits - 1, 127))
        ctx.save_for_backward(kept)
        snapped: Tensor = value * kept
        return snapped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (kept,) = ctx.saved_tensors
        return gradient * kept, None


def straight_through_round(x: Tensor) -> Tensor:
    """Round half to even with the identity as gradient (straight-through estimator)."""
    rounded: Tensor = _Round.apply(x)
    return rounded


def uniform_levels(x: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int) -> Tensor:
    """Quantize to code minus zero point, kept as float32: integers in -z .. 2^b-1-z.

    Args:
        x: Values, any shape.
        scale: Step size, broadcastable to `x`.
        zero_point: Code of zero, same shape as `scale`, integer type.
        bits: Width of the code.

    Returns:
        `clamp(round(x / scale) + z, 0, 2^b - 1) - z`; straight-through gradient inside the range.
    """
    zero = zero_point.to(x.dtype)
    codes = (straight_through_round(x / scale) + zero).clamp(0, 2**bits - 1)
    return codes - zero


def log2_levels(x: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Quantize non-negative values to powers of two: 2^-q, or 0 for the top code.

    Args:
        x: Values, any shape, for instance attention after softmax.
        scale: Value of code 0, one element.
        bits: Width of the code q.

    Returns:
        The powers of two as float32, without the scale; straight-through gradient.

    Reference: log2 quantizer of post-softmax attention (FQ-ViT, arXiv 2111.13824, equation 9).
    """
    levels: Tensor = _Log2Value.apply(x / scale, bits)
    return levels


def uniform_parameters(low: Tensor, high: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the uniform quantizer that covers `low`..`high` and zero.

    Zero is always inside, so that constant tensors and one-sided ranges have an exact zero.

    Args:
        low: Smallest values, any shape.
        high: Largest values, same shape.
        bits: Width of the code.

    Returns:
        Scale (float32) and zero point (int32, 0..2^b-1), same shape.
    """
    top = float(2**bits - 1)
    low = low.float().clamp_max(0.0)
    high = high.float().clamp_min(0.0)
    scale = ((high - low) / top).clamp_min(1e-8)
    zero_point = torch.round(-low / scale).clamp(0.0, top)
    return scale, zero_point.to(torch.int32)


def _sampled(x: Tensor) -> Tensor:
    flat = x.detach().float().flatten()
    if flat.numel() <= _SAMPLE:
        return flat
    return flat[:: flat.numel() // _SAMPLE + 1]


def search_activation_range(x: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Per-tensor range of least squared error, from percentiles and a common shrink.

    Args:
        x: Calibration values, any shape; a strided sample of 65,536 is used.
        bits: Width of the code.

    Returns:
        Scale and zero point, one element each, shape (1,).

    Reference: percentile search of RepQ-ViT (arXiv 2212.08254), refined by shrinking.
    """
    values = _sampled(x)
    ordered = values.sort().values
    last = len(ordered) - 1
    candidates = []
    for percentile in _PERCENTILES:
        low, high = ordered[round((1.0 - percentile) * last)], ordered[round(percentile * last)]
        candidates.append((low, high))
    low, high = ordered[0], ordered[last]
    for step in range(1, _SHRINK_STEPS):
        for floor in (_SHRINK_FLOOR, 0.1):
            factor = 1.0 - (1.0 - floor) * step / _SHRINK_STEPS
            candidates.append((low * factor, high * factor))
            candidates.append((low, high * factor))
            candidates.append((low * factor, high))
    best: tuple[float, Tensor, Tensor] | None = None
    for low, high in candidates:
        scale, zero = uniform_parameters(low.view(1), high.view(1), bits=bits)
        error = float(
            (uniform_levels(values, scale, zero, bits=bits) * scale - values).square().mean()
        )
        if best is None or error < best[0]:
            best = (error, scale, zero)
    if best is None:
        raise AssertionError("there is always a candidate")
    return best[1], best[2]


def search_weight_range(weight: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Per-output-channel range of least squared error.

    Args:
        weight: (N, K).
        bits: Width of the code.

    Returns:
        Scale (N,) and zero point (N,).
    """
    rows = weight.detach().float()
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    best_scale, best_zero = uniform_parameters(low, high, bits=bits)
    best_error = torch.full_like(best_scale, float("inf"))
    for step in range(_SHRINK_STEPS * 2):
        factor = 1.0 - (1.0 - _SHRINK_FLOOR) * step / (_SHRINK_STEPS * 2)
        scale, zero = uniform_parameters(low * factor, high * factor, bits=bits)
        levels = uniform_levels(rows, scale[:, None], zero[:, None], bits=bits)
        error = (levels * scale[:, None] - rows).square().mean(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def search_log2_scale(x: Tensor, *, bits: int) -> Tensor:
    """Scale of the log2 quantizer with least squared error.

    Args:
        x: Non-negative calibration values, any shape.
        bits: Width of the code.

    Returns:
        Scale, shape (1,).
    """
    values = _sampled(x)
    ordered = values.sort().values
    best: tuple[float, Tensor] | None = None
    for percentile in _LOG2_CANDIDATES:
        scale = ordered[round(percentile * (len(ordered) - 1))].clamp_min(1e-8).view(1)
        error = float((log2_levels(values, scale, bits=bits) * scale - values).square().mean())
        if best is None or error < best[0]:
            best = (error, scale)
    if best is None:
        raise AssertionError("there is always a candidate")
    return best[1]
