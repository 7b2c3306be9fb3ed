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
    shown = size / min(capture.resize_x, capture.resize_y) / capture.pose.scale
    side = max(_SMALLEST, math.ceil(1.5 * shown) + 16)
    source = DRAWN
    if not pictures or draw.chance(page_share):
        content = page(side, side, generator)
    else:
        source = draw.index(len(pictures))
        content = _part(pictures[source], side, draw)
    moire, clean = simulate(
        content.to(device), capture, size=(size, size), generator=generator, tone=tone
    )
    return SimulatedPair(moire=moire, clean=clean, capture=capture, source=source)


def _part(picture: Tensor, side: int, draw: Draw) -> Tensor:
    """A random square of a picture, of which two in five are reduced to make it finer."""
    height, width = picture.shape[-2:]
    factor = draw.uniform(0.4, 1.0) if draw.chance(0.4) else 1.0
    factor = max(factor, min(1.0, _SMALLEST / min(height, width)))
    wide = min(round(side / factor), height), min(round(side / factor), width)
    top, left = draw.index(height - wide[0] + 1), draw.index(width - wide[1] + 1)
    part = picture[:, top : top + wide[0], left : left + wide[1]]
    if factor == 1.0:
        return part
    return F.interpolate(
        part[None], scale_factor=factor, mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)
