"""Non-uniform activation quantizers whose levels are 8-bit integers, chosen optimally.

A b-bit code may stand for any 2^b of the 256 levels of a fine uniform grid. The engine looks the
level up and multiplies 8-bit integers as ever, so nothing about the product is approximate; the
levels sit where the activations are: close together around zero after GELU and softmax, wide apart
in the tails.

Reference: optimal scalar quantization (Lloyd 1982, Max 1960), solved exactly by dynamic programming
(Bruce 1965) instead of iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.quant import quantizers

GRID_BITS = 8
"""Width of the fine grid, and of the integers the engine multiplies."""

_GRID = 2**GRID_BITS
_TAILS = (0.0, 1e-5, 1e-4, 1e-3)
"""Shares of the values that may fall outside the grid on either side."""


def identity(device: torch.device | str = "cpu") -> Tensor:
    """The table that keeps every fine code, uint8 (256,)."""
    return torch.arange(_GRID, device=device).to(torch.uint8)


def optimal_table(values: Tensor, weights: Tensor, *, bits: int) -> tuple[Tensor, float]:
    """Choose 2^b of 256 integer levels with the least weighted squared error.

    Args:
        values: Values in units of the fine grid, already shifted so that level 0 is the lowest; any
            shape, values outside 0..255 are quantized to the ends.
        weights: Weight of each value, same shape.
        bits: Width of a code, 2 to 8.

    Returns:
        The level of every fine code, uint8 (256,), non-decreasing with at most 2^bits distinct
        values, and the mean weighted squared error in squared grid units.
    """
    flat, weight = values.flatten().double(), weights.flatten().double()
    bins = flat.round().clamp(0, _GRID - 1).long()
    sums = torch.zeros(3, _GRID + 1, dtype=torch.float64, device=flat.device)
    for row, moment in enumerate((weight, weight * flat, weight * flat * flat)):
        sums[row].index_add_(0, bins + 1, moment)
    mass, first, second = sums.cumsum(1).cpu()
    # Entry (i, j): one level for the fine codes i..j-1.
    mass, first, second = (m[None, :] - m[:, None] for m in (mass, first, second))
    fine = torch.arange(_GRID + 1, dtype=torch.float64)
    centre = torch.where(mass > 0, first / mass.clamp_min(1e-300), (fine[:, None] + fine - 1) / 2)
    level = centre.round().clamp(0, _GRID - 1)
    cost = second - 2 * level * first + level * level * mass
    cost = cost.masked_fill(fine[:, None] >= fine, float("inf"))
    best = cost[0]
    starts: list[Tensor] = []
    for _ in range(2**bits - 1):
        # Fewer levels than allowed stay possible: a code that is not needed is not used.
        found, start = (best[:, None] + cost).min(dim=0)
        worse = found >= best
        starts.append(torch.where(worse, -1, start))
        best = torch.where(worse, best, found)
    table = torch.empty(_GRID, dtype=torch.uint8)
    stop = _GRID
    for choice in reversed(starts):
        start_at = int(choice[stop])
        if start_at < 0:
            continue
        table[start_at:stop] = int(level[start_at, stop])
        stop = start_at
    table[:stop] = int(level[0, stop])
    error = float(best[_GRID]) / max(float(weight.sum()), 1e-300)
    return table.to(values.device), error


def search_table(
    x: Tensor, *, bits: int, channel_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fine grid and table of least squared error for one tensor of activations.

    Args:
        x: Calibration values (..., K); a sample of their rows is used.
        bits: Width of a code.
        channel_weights: What a squared error in each channel costs, (K,); None means 1.

    Returns:
        Scale (1,) and zero point (1,) of the fine grid, and the table, uint8 (256,).
    """
    rows, counts = quantizers.sampled_rows(x)
    weights = counts[:, None].expand_as(rows)
    if channel_weights is not None:
        weights = weights * (channel_weights / channel_weights.mean().clamp_min(1e-30))
    shares = [*_TAILS, *(1.0 - tail for tail in _TAILS)]
    ends = quantizers.quantiles(rows, counts[:, None].expand_as(rows), shares)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for low, high in zip(ends[: len(_TAILS)], ends[len(_TAILS) :], strict=True):
        scale, zero = quantizers.uniform_parameters(low.view(1), high.view(1), bits=GRID_BITS)
        table, error = optimal_table(rows / scale + zero, weights, bits=bits)
        error *= float(scale) ** 2
        if best is None or error < best[0]:
            best = (error, scale, zero, table)
    if best is None:
        raise AssertionError("there is always a grid")
    return best[1:]
