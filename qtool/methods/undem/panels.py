"""What a screen pixel looks like from near: the light of its red, green and blue subpixels.

A panel is a small periodic tile of emission cells, six to a pixel in each direction. Every channel
of a tile has the mean 1: black gaps between subpixels cost no brightness, so that a simulated photo
is as bright as the picture shown.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CELLS = 6
"""Emission cells along each side of a pixel."""

Panel = Literal["rgb", "bgr", "diamond"]


def tile(panel: Panel, *, gap_x: float = 0.0, gap_y: float = 0.0) -> Tensor:
    """Return the emission of one period of a panel.

    Args:
        panel: `rgb` and `bgr` are full-height stripes; `diamond` has a green spot in every pixel,
            and red and blue spots in turn.
        gap_x: Black gap beside each stripe, 0..1 cells; spots shrink by the same share.
        gap_y: Black gap below each pixel, 0..1 cells.

    Returns:
        (3, P * CELLS, P * CELLS) for a period of P pixels (1 for stripes, 2 for diamonds), each
        channel with the mean 1.
    """
    light = _diamonds(gap_x, gap_y) if panel == "diamond" else _stripes(gap_x, gap_y)
    if panel == "bgr":
        light = light.flip(0)
    return light / light.mean((1, 2), keepdim=True)


def _stripes(gap_x: float, gap_y: float) -> Tensor:
    light = torch.zeros(3, CELLS, CELLS)
    width = CELLS // 3
    for channel in range(3):
        light[channel, :, channel * width : (channel + 1) * width] = 1.0
        light[channel, :, (channel + 1) * width - 1] = 1.0 - gap_x
    light[:, -1] *= 1.0 - gap_y
    return light


def _diamonds(gap_x: float, gap_y: float) -> Tensor:
    side = 2 * CELLS
    axis = (torch.arange(side) + 0.5) / CELLS
    light = torch.zeros(3, side, side)
    for row in range(2):
        for column in range(2):
            other = 0 if (row + column) % 2 == 0 else 2
            spots = ((1, 0.25, 0.5, 0.30), (other, 0.75, 0.5, 0.38))
            for channel, x, y, radius in spots:
                # The picture repeats, so distances are taken the short way round.
                across = (torch.remainder(axis - column - x + 1, 2) - 1).abs()
                down = (torch.remainder(axis - row - y + 1, 2) - 1).abs()
                distance = across[None, :] * (1 + gap_x / CELLS) + down[:, None] * (
                    1 + gap_y / CELLS
                )
                light[channel] += ((radius - distance) * CELLS + 0.5).clamp(0, 1)
    return light
