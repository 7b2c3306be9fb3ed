"""Choosing scales and zero points, and quantization that gradients pass through.

The simulated products here work on integer-valued float32 tensors and apply scales in the order
the engine applies them, so that a simulated layer and its integer form give the same numbers
whenever integer sums stay below 2^24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PERCENTILES = (1.0, 0.99999, 0.9999, 0.999)
_SHRINK_STEPS = 20
INT8_BITS = 8
_SHRINK_FLOOR = 0.4
_ACTIVATION_FLOOR = 0.1
_SAMPLE = 65_536
_LOG2_CANDIDATES = (1.0, 0.9999, 0.999, 0.99, 0.97, 0.95)
_SQRT_HALF_CARRY = 0x800000 - 0x3504F4


class _Levels(torch.autograd.Function):
    """Snapping whose gradient passes where `_save_passing` said, over the scale."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        passing, scale = ctx.saved_tensors
        return (gradient * passing).div_(scale), None, None, None, None


class _UniformLevels(_Levels):
    """Snap to integers less the zero point; the gradient passes inside the range of codes."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        top: int,
        unrounded: Tensor | None,
    ) -> Tensor:
        ratio = x / scale
        codes = ratio.round().add_(zero)
        levels = codes.clamp(0, top)
        _save_passing(ctx, levels == codes, unrounded, scale)
        return _with_unrounded(levels.sub_(zero), unrounded, ratio)


class _TableLevels(_Levels):
    """Look up the level of a fine code; the gradient passes inside the range of the fine grid."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        scale: Tensor,
        zero: Tensor,
        table: Tensor,
        unrounded: Tensor | None,
    ) -> Tensor:
        ratio = x / scale
        codes = ratio.round().add_(zero)
        fine = codes.clamp(0, len(table) - 1)
        _save_passing(ctx, fine == codes, unrounded, scale)
        levels = (table - zero).index_select(0, fine.int().flatten()).view(x.shape)
        return _with_unrounded(levels, unrounded, ratio)


def _save_passing(ctx: Any, inside: Tensor, unrounded: Tensor | None, scale: Tensor) -> None:  # noqa: ANN401
    """Remember where gradients pass: inside the range, and where nothing was rounded."""
    ctx.save_for_backward(inside if unrounded is None else inside.logical_or_(unrounded), scale)


def _with_unrounded(levels: Tensor, unrounded: Tensor | None, ratio: Tensor) -> Tensor:
    # With weights of 0 and 1 `lerp` is exact, and on a CPU several times as fast as `where`.
    return levels if unrounded is None else levels.lerp_(ratio, unrounded.to(levels.dtype))


class _Log2Value(torch.autograd.Function):
    """Snap to scale-free powers of two; the gradient passes where the value is not cut to zero."""

    @staticmethod
    def forward(ctx: Any, ratio: Tensor, bits: int) -> Tensor:  # noqa: ANN401
        # The code is the exponent field of the ratio, with a carry above sqrt(1/2), up to sign.
        field = (ratio.view(torch.int32) + _SQRT_HALF_CARRY) >> 23
        code = (127 - field).clamp_(min=0)
        kept = (ratio > 0) & (code < min(2**bits - 1, 127))
        ctx.save_for_backward(kept)
        snapped: Tensor = (127 - code).mul_(kept).bitwise_left_shift_(23).view(torch.float32)
        return snapped

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (kept,) = ctx.saved_tensors
        return gradient * kept, None


def uniform_levels(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, unrounded: Tensor | None = None
) -> Tensor:
    """Quantize to code minus zero point, kept as float32: integers in -z .. 2^b-1-z.

    Args:
        x: Values, any shape.
        scale: Step size, broadcastable to `x`.
        zero_point: Code of zero, same shape as `scale`, integer type.
        bits: Width of the code.
        unrounded: True where `x / scale` stays as it is, same shape as `x`.

    Returns:
        `clamp(round(x / scale) + z, 0, 2^b - 1) - z`; straight-through gradient inside the range.
    """
    zero = zero_point.to(x.dtype)
    levels: Tensor = _UniformLevels.apply(x, scale, zero, 2**bits - 1, unrounded)
    return levels


def table_levels(
    x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor, *, unrounded: Tensor | None = None
) -> Tensor:
    """Quantize to the levels of a table, less the zero point, kept as float32.

    Args:
        x: Values, any shape.
        scale: Step of the fine grid, one element.
        zero_point: Fine code of zero, one element, integer type.
        table: Level of every fine code, uint8 (256,).
        unrounded: True where `x / scale` stays as it is, same shape as `x`.

    Returns:
        `table[clamp(round(x / scale) + z, 0, 255)] - z`; straight-through gradient inside the grid.
    """
    zero = zero_point.to(x.dtype)
    levels: Tensor = _TableLevels.apply(x, scale, zero, table.to(x.dtype), unrounded)
    return levels


def activation_levels(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    *,
    bits: int,
    unrounded: Tensor | None = None,
) -> Tensor:
    """`table_levels` where there is a table, else `uniform_levels`."""
    if table is None:
        return uniform_levels(x, scale, zero_point, bits=bits, unrounded=unrounded)
    return table_levels(x, scale, zero_point, table, unrounded=unrounded)


def random_mask(x: Tensor, share: float, *, generator: torch.Generator | None) -> Tensor:
    """A mask of the shape of `x`, true in about a `share` of places, from one byte each."""
    words = torch.randint(
        -(2**63), 2**63 - 1, (x.numel() // 8 + 1,), generator=generator, device=x.device
    )
    drawn = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return drawn < round(256 * share)


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


def _restored(x: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Tensor:
    """Quantize uniformly and back."""
    codes = (x / scale).round_().add_(zero).clamp_(0, 2**bits - 1)
    return codes.sub_(zero).mul_(scale)


def sampled_rows(x: Tensor, *, values: int = 4 * _SAMPLE) -> tuple[Tensor, Tensor]:
    """Rows to choose ranges by: those that hold the largest values, and an even sample of the rest.

    What is rare and large, such as a query that looks at one place, would slip through an even
    sample, and a range chosen without it would cut it off.

    Args:
        x: Values (..., K).
        values: About how many values to keep.

    Returns:
        Rows as float32 (R, K), and how many rows of `x` each of them stands for, (R,).
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    wanted = max(64, values // x.shape[-1])
    if len(rows) <= wanted:
        return rows.float(), torch.ones(len(rows), device=rows.device)
    extremes = rows.abs().amax(dim=1).topk(wanted // 4).indices
    rest = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    rest[extremes] = False
    others = rest.nonzero()[:, 0]
    even = others[:: len(others) // (wanted - len(extremes)) + 1]
    counts = torch.ones(len(extremes) + len(even), device=rows.device)
    counts[len(extremes) :] = len(others) / len(even)
    return rows[torch.cat((extremes, even))].float(), counts


def _sampled(x: Tensor) -> tuple[Tensor, Tensor]:
    """`sampled_rows` of single values, (S, 1) and (S,)."""
    return sampled_rows(x.reshape(-1, 1), values=_SAMPLE)


def quantiles(values: Tensor, counts: Tensor, shares: Sequence[float]) -> list[Tensor]:
    """The values below which given shares of a sample lie.

    Args:
        values: Sample, any shape.
        counts: How many values each one stands for, same shape.
        shares: Shares, 0 (the smallest value) to 1 (the largest).

    Returns:
        One 0-dimensional tensor per share.
    """
    ordered, order = values.flatten().sort()
    mass = counts.flatten()[order].double().cumsum(0)
    wanted = torch.tensor(shares, dtype=torch.float64, device=mass.device) * mass[-1]
    places = torch.searchsorted(mass, wanted).clamp_max(len(ordered) - 1)
    return list(ordered[places])


def _range_candidates(values: Tensor, counts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ranges worth trying: percentiles, and the full range shrunk on either side or both."""
    ends = quantiles(values, counts, [1.0 - p for p in _PERCENTILES] + list(_PERCENTILES))
    candidates = list(zip(ends[: len(_PERCENTILES)], ends[len(_PERCENTILES) :], strict=True))
    low, high = candidates[0]
    for step in range(1, _SHRINK_STEPS):
        factor = 1.0 - (1.0 - _ACTIVATION_FLOOR) * step / _SHRINK_STEPS
        candidates += [
            (low * factor, high * factor),
            (low, high * factor),
            (low * factor, high),
        ]
    return candidates


def search_activation_range(
    x: Tensor, *, bits: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-tensor range of least squared error, from percentiles and shrunk ranges.

    With a weight, the error is that of the product `x @ weight.T`: what a channel's error costs
    depends on what the layer makes of the channel.

    Args:
        x: Calibration values (..., K); a sample of them is used (`sampled_rows`).
        bits: Width of the code.
        weight: The layer's weight (N, K), or None for the plain error of `x`.

    Returns:
        Scale and zero point, one element each, shape (1,).

    Reference: percentile search of RepQ-ViT (arXiv 2212.08254); output error as in PTQ4ViT
    (arXiv 2111.12293).
    """
    single, single_counts = _sampled(x)
    values, counts = (single, single_counts) if weight is None else sampled_rows(x)
    if weight is not None and len(weight) > weight.shape[1]:
        # A square root of W^T W measures the same error with fewer columns.
        weight = torch.linalg.cholesky_ex(_regularised_gram(weight.detach())).L.T
    best: tuple[float, Tensor, Tensor] | None = None
    for low, high in _range_candidates(single, single_counts):
        scale, zero = uniform_parameters(low.view(1), high.view(1), bits=bits)
        difference = _restored(values, scale, zero, bits=bits).sub_(values)
        if weight is not None:
            difference = difference @ weight.detach().T
        error = float(difference.square().mean(dim=1) @ counts)
        if best is None or error < best[0]:
            best = (error, scale, zero)
    if best is None:
        raise AssertionError("there is always a candidate")
    return best[1], best[2]


def _regularised_gram(weight: Tensor) -> Tensor:
    gram = weight.float().T @ weight.float()
    gram.diagonal().add_(1e-4 * gram.diagonal().mean().clamp_min(1e-12))
    return gram


def search_weight_range(weight: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Per-output-channel range of least squared error.

    Eight bits are spread evenly around zero: int8 units multiply signed bytes, and a level that a
    shifted range gains there would need a ninth bit.

    Args:
        weight: (N, K).
        bits: Width of the code.

    Returns:
        Scale (N,) and zero point (N,).
    """
    rows = weight.detach().float()
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    if bits == INT8_BITS:
        high = torch.maximum(-low * 127 / 128, high)
        low = -high * 128 / 127
    best_scale, best_zero = uniform_parameters(low, high, bits=bits)
    best_error = torch.full_like(best_scale, float("inf"))
    for step in range(_SHRINK_STEPS * 2):
        factor = 1.0 - (1.0 - _SHRINK_FLOOR) * step / (_SHRINK_STEPS * 2)
        scale, zero = uniform_parameters(low * factor, high * factor, bits=bits)
        restored = _restored(rows, scale[:, None], zero[:, None], bits=bits)
        error = restored.sub_(rows).square_().mean(dim=1)
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
    values, counts = _sampled(x)
    best: tuple[float, Tensor] | None = None
    for end in quantiles(values, counts, _LOG2_CANDIDATES):
        scale = end.clamp_min(1e-8).view(1)
        difference = log2_levels(values, scale, bits=bits) * scale - values
        error = float(difference.square()[:, 0] @ counts)
        if best is None or error < best[0]:
            best = (error, scale)
    if best is None:
        raise AssertionError("there is always a candidate")
    return best[1]
