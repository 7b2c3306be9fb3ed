"""How complex a moire patch is, and groups of like patches.

Frequency is the mean strength of edges, colourfulness the measure of Hasler and Suesstrunk. Both
are computed in floating point; the published code lets 8-bit colour differences wrap around, which
leaves the groups almost unrelated to colour.

References: UnDeM (arXiv 2401.02719), section "moire pattern grouping"; Hasler and Suesstrunk 2003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem.filters import luma

LEAST_PER_GROUP = 400
"""Patches below which a group is too small to train a generator on."""

_LAPLACIAN = ((2.0, 0.0, 2.0), (0.0, -8.0, 0.0), (2.0, 0.0, 2.0))
_COLOUR_SIDE = 256


def edges(patches: Tensor) -> Tensor:
    """Strength of the edges of each pixel, 0..255: (B, 3, H, W) in 0..1 to (B, 1, H, W)."""
    grey = luma(patches.clamp(0, 1).mul(255).round()).round()
    kernel = torch.tensor(_LAPLACIAN, device=patches.device)[None, None]
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel).abs().clamp_max(255)


def frequency(patches: Tensor) -> Tensor:
    """Mean edge strength of patches (B, 3, H, W) in 0..1: (B,)."""
    return edges(patches).mean((1, 2, 3))


def colourfulness(patches: Tensor) -> Tensor:
    """Hasler and Suesstrunk's measure of patches (B, 3, H, W) in 0..1, in 8-bit units: (B,)."""
    small = F.interpolate(
        patches, size=(_COLOUR_SIDE, _COLOUR_SIDE), mode="bilinear", align_corners=False
    )
    red, green, blue = small.clamp(0, 1).mul(255).round().flatten(2).unbind(1)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = (red_green.var(1) + yellow_blue.var(1)).sqrt()
    return spread + 0.3 * torch.hypot(red_green.mean(1), yellow_blue.mean(1))


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Where one group ends and the next begins.

    Attributes:
        product: Largest frequency times colourfulness of the first group.
        ratios: Largest frequency over colourfulness of each following group but the last.
    """

    product: float
    ratios: tuple[float, ...]

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(self.ratios) + 2

    def group_of(self, frequencies: Tensor, colours: Tensor) -> Tensor:
        """Assign patches: frequencies (N,) and colourfulness (N,) to groups 0..count-1, (N,)."""
        ratio = frequencies / colours.clamp_min(1e-6)
        bounds = torch.tensor(self.ratios, dtype=ratio.dtype, device=ratio.device)
        later = 1 + torch.bucketize(ratio, bounds)
        return torch.where(frequencies * colours <= self.product, 0, later)


def group_patches(
    frequencies: Tensor, colours: Tensor, *, groups: int = 4
) -> tuple[Grouping | None, Tensor]:
    """Sort patches into groups of equal size.

    The least complex ones (small product) are the first group; the rest is sorted by the ratio of
    frequency to colourfulness: coloured and coarse first, fine and grey last.

    Args:
        frequencies: (N,).
        colours: (N,).
        groups: Number of groups; 1 makes no cuts.

    Returns:
        The cuts, None for a single group, and the group of every patch, (N,), from 0.

    Raises:
        ValueError: There are fewer patches than groups.
    """
    total = len(frequencies)
    if total < groups:
        raise ValueError(f"{total} patches cannot make {groups} groups")
    if groups == 1:
        return None, torch.zeros(total, dtype=torch.int64)
    sizes = [total // groups + (index < total % groups) for index in range(groups)]
    product, ratio = frequencies * colours, frequencies / colours.clamp_min(1e-6)
    order = product.argsort(stable=True)
    first, rest = order[: sizes[0]], order[sizes[0] :]
    rest = rest[ratio[rest].argsort(stable=True)]
    members = [first, *rest.split(sizes[1:])]
    numbers = torch.empty(total, dtype=torch.int64)
    for index, member in enumerate(members):
        numbers[member] = index
    cuts = tuple(float(ratio[member].max()) for member in members[1:-1])
    return Grouping(product=float(product[first].max()), ratios=cuts), numbers


def affordable_groups(patches: int, wanted: int, *, least: int = LEAST_PER_GROUP) -> int:
    """Halve the number of groups until each has `least` patches: 4, 2, 1."""
    groups = wanted
    while groups > 1 and patches < least * groups:
        groups = max(1, groups // 2)
    return groups


def patch_boxes(
    height: int, width: int, *, patch: tuple[int, int], remainder: int = 96
) -> Sequence[tuple[int, int]]:
    """Corners (top, left) of patches side by side, one more at a border that leaves enough over.

    Args:
        height: Of the picture.
        width: Of the picture.
        patch: Height and width of a patch.
        remainder: Pixels left over above which one more patch is laid flush with the border.
    """

    def starts(length: int, side: int) -> list[int]:
        if length < side:
            return []
        places = list(range(0, length - side + 1, side))
        if length - (places[-1] + side) > remainder:
            places.append(length - side)
        return places

    return [(top, left) for top in starts(height, patch[0]) for left in starts(width, patch[1])]
