"""Bits per layer for a budget: where the next bit helps the model most for what it takes.

A multiple-choice knapsack, solved greedily over the steps of each layer in the order of what they
gain per unit, which is optimal up to the last step where gains fall with the width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


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
    """Choose a width for every layer.

    Args:
        options: The widths of every layer, rising.
        budget: What all layers together may take.

    Returns:
        Bits by layer, or None where not even the narrowest widths fit.
    """
    chosen = {name: own[0] for name, own in options.items()}
    left = budget - sum(option.takes for option in chosen.values())
    if left < 0:
        return None
    while True:
        best: tuple[float, str, Option] | None = None
        for name, own in options.items():
            now = chosen[name]
            for option in own:
                more = option.takes - now.takes
                gain = now.costs - option.costs
                if option.bits <= now.bits or more > left or gain <= 0 < more:
                    continue
                rate = gain / more if more > 0 else float("inf")
                if best is None or rate > best[0]:
                    best = (rate, name, option)
        if best is None:
            return {name: option.bits for name, option in chosen.items()}
        _, name, option = best
        left -= option.takes - chosen[name].takes
        chosen[name] = option
