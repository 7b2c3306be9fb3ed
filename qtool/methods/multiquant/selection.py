"""Which branches compute at which width, and how wide the narrow one is.

At b bits as many 2-bit branches run on b-bit activations as cost what a plain b-bit network does:
b / 2 of them, the last one a slice of half the multiplications where b is odd. With the prefix rule
branch 1 would serve every width and carry the error of all; the amortized rule spreads them.

Reference: MBQuant, arXiv 2305.08117; table and widths as in sections 2.2, 2.5 and 2.6 of this
project's notes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtool.models.residual import Convolution, ResidualLayout

BRANCH_BITS = 2
"""Bits of a weight in every branch."""

_AMORTIZED: Mapping[int, tuple[int, ...]] = {
    2: (0,),
    3: (0, 1),
    4: (1, 2),
    5: (1, 2, 3),
    6: (1, 2, 3),
    7: (0, 1, 2, 3),
    8: (0, 1, 2, 3),
}
_TOP = 8
_MULTIPLES = (8, 4, 2, 1)
_TOLERANCE = 0.005
_HALF = 0.5
_STEPS = 40


@dataclass(frozen=True)
class Selection:
    """The branches of one width.

    Attributes:
        branches: Their numbers from 0, in the order in which they are averaged.
        narrow: The one of them that runs as a slice, None at even widths.
    """

    branches: tuple[int, ...]
    narrow: int | None = None


@dataclass(frozen=True)
class NarrowWidths:
    """Channels of the slice of a branch.

    Attributes:
        channels: By convolution, how many of the first channels it reads and writes.
        share: Its multiplications over those of the whole branch.
    """

    channels: Mapping[str, tuple[int, int]]
    share: float


def branch_count(widths: Sequence[int]) -> int:
    """Branches that the widest of some widths needs."""
    return (max(widths) + 1) // BRANCH_BITS


def select(widths: Sequence[int], *, amortized: bool = True) -> dict[int, Selection]:
    """Assign branches to widths.

    The amortized table is that of four branches; where 8 bits are not asked for, branches are
    counted from the first as the authors do.

    Args:
        widths: Bits of activations, 2 to 8.
        amortized: Spread the branches; otherwise every width takes the first ones.
    """
    spread = amortized and max(widths) == _TOP
    chosen = {}
    for bits in sorted(widths):
        branches = _AMORTIZED[bits] if spread else tuple(range((bits + 1) // BRANCH_BITS))
        chosen[bits] = Selection(branches, branches[-1] if bits % BRANCH_BITS else None)
    return chosen


def narrow_widths(layout: ResidualLayout) -> NarrowWidths:
    """Choose the channels of a slice with half the multiplications of its branch.

    All channels shrink by one ratio but those that the body reads from the stem and gives to the
    head. They are rounded to multiples of 8, 4, 2 or 1: the first that lands within one percent.

    Args:
        layout: The network, with counted places.
    """
    best: NarrowWidths | None = None
    for multiple in _MULTIPLES:
        found = _nearest(layout, _ratio(layout), multiple)
        if best is None or abs(found.share - _HALF) < abs(best.share - _HALF):
            best = found
        if abs(best.share - _HALF) <= _TOLERANCE:
            break
    if best is None:
        raise ValueError("there is no multiple to round to")
    return best


def _ratio(layout: ResidualLayout) -> float:
    """The ratio at which channels that need not be whole give half the multiplications."""
    low, high = 0.25, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        share = _share(layout, {count: middle * count for count in _counts(layout)})
        low, high = (middle, high) if share < _HALF else (low, middle)
    return low


def _nearest(layout: ResidualLayout, ratio: float, multiple: int) -> NarrowWidths:
    """The rounding of all channels, up or down, that comes nearest to half."""
    options = []
    for count in _counts(layout):
        lower = min(max(int(ratio * count) // multiple * multiple, multiple), count)
        options.append(sorted({lower, min(lower + multiple, count)}))
    rounded = (
        dict(zip(_counts(layout), values, strict=True)) for values in itertools.product(*options)
    )
    chosen = min(rounded, key=lambda sizes: abs(_share(layout, sizes) - _HALF))
    channels = {
        name: (round(inputs), round(outputs))
        for name, (inputs, outputs) in _channels(layout, chosen).items()
    }
    return NarrowWidths(channels, _share(layout, chosen))


def _counts(layout: ResidualLayout) -> list[int]:
    """The different numbers of channels of a body, rising."""
    return sorted({n for conv in layout.convolutions for n in (conv.inputs, conv.outputs)})


def _channels(layout: ResidualLayout, sizes: Mapping[int, float]) -> dict[str, tuple[float, float]]:
    """Channels of every convolution with other numbers, the ends as they are."""
    first, last = layout.blocks[0], layout.blocks[-1]
    reads = {first.convolutions[0].name, *_shortcut(first.shortcut)}
    writes = {last.convolutions[-1].name, *_shortcut(last.shortcut)}
    return {
        conv.name: (
            conv.inputs if conv.name in reads else sizes[conv.inputs],
            conv.outputs if conv.name in writes else sizes[conv.outputs],
        )
        for conv in layout.convolutions
    }


def _shortcut(convolution: Convolution | None) -> tuple[str, ...]:
    return () if convolution is None else (convolution.name,)


def _share(layout: ResidualLayout, sizes: Mapping[int, float]) -> float:
    """Multiplications with other numbers of channels over those of the whole body."""
    channels = _channels(layout, sizes)
    part = whole = 0.0
    for conv in layout.convolutions:
        area = conv.multiplications(1, 1)
        part += area * channels[conv.name][0] * channels[conv.name][1]
        whole += area * conv.inputs * conv.outputs
    return part / whole
