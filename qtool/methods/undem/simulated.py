"""Pairs out of nothing but clean pictures: a drawn screen content, a drawn photograph of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem.capture import Capture, Draw, Tone, draw_capture
from qtool.methods.undem.content import page
from qtool.methods.undem.simulator import simulate

DRAWN = -1
"""Source of a pair whose content the package drew itself."""

_SEED_STEP = 1_000_003
_SMALLEST = 48


@dataclass(frozen=True, kw_only=True)
class SimulatedPair:
    """A simulated photograph beside what it should have been.

    Attributes:
        moire: (3, H, W) in 0..1.
        clean: (3, H, W) in 0..1.
        capture: The photograph.
        source: Index of the picture on the screen, or `DRAWN`.
    """

    moire: Tensor
    clean: Tensor
    capture: Capture
    source: int


def simulated_pair(
    pictures: Sequence[Tensor],
    *,
    size: int,
    seed: int,
    index: int,
    page_share: float,
    tone: Tone = "capture",
    device: torch.device | str = "cpu",
) -> SimulatedPair:
    """Simulate pair `index` of the stream `seed`; the same whatever was simulated before.

    Args:
        pictures: Clean pictures (3, H, W) in 0..1, sRGB; may be empty when all content is drawn.
        size: Side of the pair.
        seed: Of the stream.
        index: Number of the pair.
        page_share: Share of pairs that show drawn pages and windows instead of pictures.
        tone: See `simulate`.
        device: Where to compute.
    """
    generator = torch.Generator().manual_seed((seed * _SEED_STEP + index) % 2**63)
    draw = Draw(generator)
    capture = draw_capture(generator)
    # Where bands are coarse or will be averaged anyway, fewer sub-samples tell the same.
    coarse = capture.pose.scale > 2.4 or capture.resize_x < 0.5
    capture = replace(capture, samples=2 if coarse else 3)
    # Pixels of the result per pixel of the screen.
    detail = capture.pose.scale * min(capture.resize_x, capture.resize_y)
    side = max(_SMALLEST, math.ceil(1.5 * size / detail) + 16)
    source = DRAWN
    if not pictures or draw.chance(page_share):
        # Where screens are dense, text and windows are drawn larger.
        zoom = max(1.0, draw.uniform(0.7, 1.4) / detail)
        small = max(_SMALLEST, round(side / zoom))
        content = _resized(page(small, small, generator).to(device), side)
    else:
        source = draw.index(len(pictures))
        content = _part(pictures[source].to(device), side, draw, detail=detail)
    moire, clean = simulate(content, capture, size=(size, size), generator=generator, tone=tone)
    return SimulatedPair(moire=moire, clean=clean, capture=capture, source=source)


def _part(picture: Tensor, side: int, draw: Draw, *, detail: float) -> Tensor:
    """A random square of a picture, shown so that the photograph is about as sharp as it is.

    A quarter is shown pixel by pixel, which a near camera blows up.
    """
    height, width = picture.shape[-2:]
    # Pixels of the screen per pixel of the picture.
    factor = 1.0 if draw.chance(0.25) else 1 / (detail * draw.uniform(0.8, 1.6))
    factor = max(factor, side / min(height, width))
    wide = min(math.ceil(side / factor), height, width)
    top, left = draw.index(height - wide + 1), draw.index(width - wide + 1)
    return _resized(picture[:, top : top + wide, left : left + wide], side)


def _resized(picture: Tensor, side: int) -> Tensor:
    if picture.shape[-2:] == (side, side):
        return picture
    return F.interpolate(
        picture[None], size=(side, side), mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)
