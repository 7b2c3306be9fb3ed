"""Real bands on other pictures: cut from near-grey, flat parts of moire photographs, laid on.

Where a photograph shows something flat and grey, whatever varies quickly is moire. Divided by the
local mean it becomes a gain per pixel and channel, which is what moire is to light, and can be
multiplied onto any clean picture.

Reference: section "MoireSpace" of UniDemoire (Yang et al. 2025) multiplies patterns the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem.capture import Draw
from qtool.methods.undem.filters import gaussian_blur, luma

_BASE_SIGMA = 10.0
_STRIDE_SHARE = 4
_DARKEST, _BRIGHTEST = 0.25, 0.95
_GREYEST = 0.14
_FLATTEST = 0.05
_STRONGEST = 0.09
_FAINTEST = 0.008
_MOST_UNEVEN = 1.7


def flat_patterns(photo: Tensor, *, size: int, most: int = 8) -> list[Tensor]:
    """Cut the bands out of the flat, near-grey parts of a moire photograph.

    Args:
        photo: (3, H, W) in 0..1.
        size: Side of a pattern.
        most: Patterns taken from one photograph, those with the most colour in their bands first.

    Returns:
        Gains (3, size, size) with a mean of about 1; empty when nothing in the photo is flat.
    """
    height, width = photo.shape[-2:]
    if min(height, width) < size:
        return []
    base = gaussian_blur(photo, _BASE_SIGMA)
    bands = photo - base
    brightness = luma(bands)
    stride = max(1, size // _STRIDE_SHARE)

    def windows(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[None], size, stride)[0]

    light = windows(base.mean(0, keepdim=True))[0]
    grey = windows(base.amax(0, keepdim=True) - base.amin(0, keepdim=True))[0]
    mean = windows(luma(base))
    uneven = (windows(luma(base).square()) - mean.square()).clamp_min(0).sqrt()[0]
    strength = windows(brightness.square()).sqrt()[0]
    colour = windows((bands - brightness).square().mean(0, keepdim=True)).sqrt()[0]
    # Bands are spread evenly; an edge or an object puts all its energy in one place.
    energy = bands.square().mean(0, keepdim=True)
    local = F.avg_pool2d(energy, max(1, size // 8))
    peak = F.interpolate(local[None], size=(height, width), mode="nearest")[0]
    peak = F.max_pool2d(peak[None], size, stride)[0].sqrt()[0]
    usable = (
        (light > _DARKEST)
        & (light < _BRIGHTEST)
        & (grey < _GREYEST)
        & (uneven < _FLATTEST)
        & (strength < _STRONGEST)
        & (strength + colour > _FAINTEST)
        & (peak < _MOST_UNEVEN * windows(energy).sqrt()[0])
    )
    found: list[Tensor] = []
    taken: list[tuple[int, int]] = []
    for place in (colour * usable).flatten().argsort(descending=True).tolist():
        row, column = divmod(place, colour.shape[1])
        apart = all(max(abs(row - r), abs(column - c)) * 2 >= _STRIDE_SHARE for r, c in taken)
        if len(found) >= most or not bool(usable[row, column]):
            break
        if not apart:
            continue
        taken.append((row, column))
        top, left = row * stride, column * stride
        part = slice(top, top + size), slice(left, left + size)
        found.append(photo[:, part[0], part[1]] / base[:, part[0], part[1]].clamp_min(0.05))
    return found


def spread(pattern: Tensor, side: int, *, zoom: float) -> Tensor:
    """Bands over a larger square: resized, then mirrored at their edges until they fill it.

    Args:
        pattern: Gains (3, S, S).
        side: What is to be covered at least.
        zoom: Factor of the resizing; bands become as much coarser.

    Returns:
        Gains (3, T, T), T at least `side`.
    """
    if zoom != 1.0:
        size = max(2, round(zoom * pattern.shape[-1]))
        pattern = F.interpolate(
            pattern[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )[0]
    size = pattern.shape[-1]
    if size >= side:
        return pattern
    there_and_back = torch.arange(side, device=pattern.device) % (2 * size)
    place = torch.minimum(there_and_back, 2 * size - 1 - there_and_back)
    return pattern[:, place][:, :, place]


def mixed(clean: Tensor, pattern: Tensor, *, strength: float) -> Tensor:
    """Lay bands on a picture.

    Args:
        clean: (3, H, W) in 0..1.
        pattern: Gains (3, H, W).
        strength: 1 for bands as they were photographed, 0 for none.

    Returns:
        (3, H, W) in 0..1.
    """
    return (clean * (1 + strength * (pattern - 1))).clamp(0, 1)


def turned(picture: Tensor, draw: Draw) -> Tensor:
    """One of the eight turns and reflections of a square (..., S, S)."""
    turn = draw.index(8)
    picture = torch.rot90(picture, turn % 4, (-2, -1))
    return picture.flip(-1) if turn >= 4 else picture
