"""Mixed precision: which layer gets how many bits when their mean may not exceed a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qtool.errors import UsageError

_PARTS = 4000
"""Parts into which the budget is cut; costs are rounded up to whole parts."""


def allocate(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], *, average: float
) -> dict[str, int]:
    """Choose a width per layer with the least total loss, by dynamic programming.

    Args:
        losses: Per layer, what each width costs in accuracy.
        sizes: Per layer, what one bit costs: its weights, or its multiply-adds.
        average: Largest mean width, weighted with the sizes.

    Returns:
        A width per layer, in the order of `losses`. The mean never exceeds `average`.

    Raises:
        UsageError: Even the narrowest widths exceed the budget.

    Reference: the multiple-choice knapsack of HAWQ-V3 (arXiv 2011.10680, section 3.4).
    """
    budget = average * sum(sizes[name] for name in losses)
    part = max(budget, 1.0) / _PARTS
    steps = {
        name: {bits: math.ceil(sizes[name] * bits / part - 1e-9) for bits in widths}
        for name, widths in losses.items()
    }
    least = sum(min(costs.values()) for costs in steps.values())
    if least > _PARTS:
        narrowest = max(min(widths) for widths in losses.values())
        raise UsageError(
            f"a mean of {average:g} bits is below what the narrowest widths give",
            remedy=f"ask for a little more than {narrowest}, or keep fewer layers at wide widths",
        )
    best = [0.0] * (_PARTS + 1)
    taken: list[list[int]] = []
    for name, widths in losses.items():
        best, choice = _added(best, [(steps[name][b], loss, b) for b, loss in widths.items()])
        taken.append(choice)
    chosen: dict[str, int] = {}
    left = _PARTS
    for name, choice in zip(reversed(list(losses)), reversed(taken), strict=True):
        chosen[name] = choice[left]
        left -= steps[name][chosen[name]]
    return {name: chosen[name] for name in losses}


def _added(
    best: Sequence[float], options: Sequence[tuple[int, float, int]]
) -> tuple[list[float], list[int]]:
    """Least loss for every number of parts with one more layer, and the width it takes."""
    found = [math.inf] * len(best)
    choice = [options[0][2]] * len(best)
    for cost, loss, bits in options:
        for spent in range(cost, len(best)):
            total = best[spent - cost] + loss
            if total < found[spent]:
                found[spent], choice[spent] = total, bits
    return found, choice


def mean_bits(chosen: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Mean width weighted with the sizes; 0 when nothing has a size."""
    total = sum(sizes[name] for name in chosen)
    return sum(bits * sizes[name] for name, bits in chosen.items()) / total if total else 0.0
