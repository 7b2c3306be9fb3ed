"""Bits per layer for a budget: the choice that costs the model's answers least.

Reference: the multiple-choice knapsack of HAWQ-V3 (arXiv 2011.10680, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qtool.errors import UsageError

_PARTS = 4000
"""Parts into which the budget is cut; what a choice takes is rounded up to whole parts."""


class Option(NamedTuple):
    """One width of a layer.

    Attributes:
        bits: The width.
        takes: What it takes of the budget.
        costs: What it costs the model's answers.
    """

    bits: int
    takes: float
    costs: float


def allot(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, int] | None:
    """Choose a width for every layer with the least total cost, by dynamic programming.

    Args:
        options: The widths of every layer.
        budget: What all layers together may take.

    Returns:
        Bits by layer, in the order of `options`, or None where not even the widths that take least
        fit. The budget is never exceeded; of equal choices the wider one is taken.
    """
    least = {name: min(option.takes for option in own) for name, own in options.items()}
    spare = budget - sum(least.values())
    if spare < 0:
        return None
    part = max(spare, 1e-300) / _PARTS
    best = [0.0] * (_PARTS + 1)
    taken: list[list[tuple[Option, int]]] = []
    for name, own in options.items():
        steps = [
            (option, math.ceil((option.takes - least[name]) / part))
            for option in sorted(own, key=lambda option: option.bits)
        ]
        best, choice = _added(best, [(o, step) for o, step in steps if step <= _PARTS])
        taken.append(choice)
    chosen: dict[str, Option] = {}
    left = _PARTS
    for name, choice in zip(reversed(list(options)), reversed(taken), strict=True):
        chosen[name], step = choice[left]
        left -= step
    widths = {name: chosen[name] for name in options}
    while _improved(widths, options, budget):
        pass
    return {name: option.bits for name, option in widths.items()}


def _added(
    best: Sequence[float], steps: Sequence[tuple[Option, int]]
) -> tuple[list[float], list[tuple[Option, int]]]:
    """Least cost for every number of parts with one more layer, and what it takes of them."""
    found = [math.inf] * len(best)
    choice = [steps[0]] * len(best)
    for option, step in steps:
        for spent in range(step, len(best)):
            total = best[spent - step] + option.costs
            if total <= found[spent]:
                found[spent], choice[spent] = total, (option, step)
    return found, choice


def _improved(
    chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], budget: float
) -> bool:
    """Spend on one layer what rounding to parts has left over; tell whether anything changed."""
    left = budget - sum(option.takes for option in chosen.values())
    for name, own in options.items():
        now = chosen[name]
        better = [o for o in own if o.costs < now.costs and o.takes - now.takes <= left]
        if better:
            chosen[name] = min(better, key=lambda option: option.costs)
            return True
    return False


def allocate(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], *, average: float
) -> dict[str, int]:
    """Choose a width per layer with the least total loss under a mean width.

    Args:
        losses: Per layer, what each width costs in accuracy.
        sizes: Per layer, what one bit costs: its weights, or its multiply-adds.
        average: Largest mean width, weighted with the sizes.

    Returns:
        A width per layer, in the order of `losses`. The mean never exceeds `average`.

    Raises:
        UsageError: Even the narrowest widths exceed the budget.
    """
    options = {
        name: [Option(bits, sizes[name] * bits, loss) for bits, loss in widths.items()]
        for name, widths in losses.items()
    }
    found = allot(options, average * sum(sizes[name] for name in losses))
    if found is None:
        narrowest = max(min(widths) for widths in losses.values())
        raise UsageError(
            f"a mean of {average:g} bits is below what the narrowest widths give",
            remedy=f"ask for a little more than {narrowest}, or keep fewer layers at wide widths",
        )
    return found


def mean_bits(chosen: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Mean width weighted with the sizes; 0 when nothing has a size."""
    total = sum(sizes[name] for name in chosen)
    return sum(bits * sizes[name] for name, bits in chosen.items()) / total if total else 0.0
