"""Small filters on pictures (C, H, W) that the simulator is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)


def constant(values: Sequence[Any], device: torch.device) -> Tensor:
    """A small tensor of fixed numbers, brought to a device without making it wait."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)


def to_linear(encoded: Tensor) -> Tensor:
    """Undo the sRGB curve: 0..1 to 0..1."""
    curved = ((encoded + 0.055) / 1.055).pow(2.4)
    return torch.where(encoded <= 0.04045, encoded / 12.92, curved)


def to_srgb(linear: Tensor) -> Tensor:
    """Apply the sRGB curve: 0..1 to 0..1."""
    curved = 1.055 * linear.clamp_min(1e-8) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved)


def luma(picture: Tensor) -> Tensor:
    """Brightness (..., 1, H, W) of encoded colours (..., 3, H, W)."""
    red, green, blue = picture.split(1, dim=-3)
    total: Tensor = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return total


def gaussian_blur(picture: Tensor, sigma: float) -> Tensor:
    """Blur every channel of (C, H, W) with a Gaussian of `sigma` pixels; edges are mirrored."""
    if sigma <= 0:
        return picture
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=picture.device, dtype=picture.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    stack = picture.unsqueeze(1)
    rows = F.conv2d(padded(stack, 0, radius), weights.view(1, 1, 1, -1))
    return F.conv2d(padded(rows, radius, 0), weights.view(1, 1, -1, 1)).squeeze(1)


def padded(stack: Tensor, down: int, across: int) -> Tensor:
    """Mirror (B, C, H, W) at its edges; repeat the edge where it is too small for that."""
    fits = down < stack.shape[-2] and across < stack.shape[-1]
    return F.pad(stack, (across, across, down, down), mode="reflect" if fits else "replicate")


def bilateral(picture: Tensor, *, radius: int = 2, tone: float, reach: float) -> Tensor:
    """Smooth what differs little in brightness from its neighbours.

    Args:
        picture: (3, H, W), encoded.
        radius: Of the window, in pixels.
        tone: Standard deviation of the weight in brightness.
        reach: Standard deviation of the weight in space, in pixels.

    Returns:
        (3, H, W).
    """
    height, width = picture.shape[-2:]
    guide = luma(picture)
    wide = padded(torch.cat([picture, guide]).unsqueeze(0), radius, radius)[0]
    total = picture.clone()
    weight_sum = torch.ones_like(guide)
    for row in range(2 * radius + 1):
        for column in range(2 * radius + 1):
            if row == radius and column == radius:
                continue
            part = wide[:, row : row + height, column : column + width]
            away = (row - radius) ** 2 + (column - radius) ** 2
            weight = torch.exp(
                (part[3:] - guide).square() * (-0.5 / tone**2) - 0.5 * away / reach**2
            )
            total += weight * part[:3]
            weight_sum += weight
    return total / weight_sum


def blur_chroma(picture: Tensor, sigma: float) -> Tensor:
    """Blur the colours of (3, H, W) and leave its brightness."""
    brightness = luma(picture)
    return brightness + gaussian_blur(picture - brightness, sigma)


def sharpen(picture: Tensor, amount: float) -> Tensor:
    """Unsharp masking of (3, H, W) with a radius of one pixel."""
    return picture + amount * (picture - gaussian_blur(picture, 1.0))
