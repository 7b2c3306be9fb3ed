"""Does a photograph show moire at all?

Moire is nearly periodic over some distance: in the spectrum of a small square it stands out as a
peak, where the texture of things falls off smoothly. Five numbers say how far the strongest peaks
of a picture rise above what lies around them, in luma and in the colour differences, and a
logistic regression weighs them.

It was fitted on 70 photographs of screens against 80 clean pictures of other scenes and 42 further
photographs. The method is qtool's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 0.5
"""Score from which on a picture counts as showing moire."""

VIEW = 850
"""Longer side, in pixels, of the reduced pictures that the weights were fitted on."""

_BLOCK = 64
_LUMA = (0.299, 0.587, 0.114)
# Power of 8-bit rounding and faint noise; below it a peak means nothing.
_FLOOR = 20.0
_LOW, _MIDDLE, _HIGH = (0.05, 0.15), (0.15, 0.3), (0.3, 0.7)
_WEIGHTS = (1.441, -0.169, 0.801, 0.947, 0.531)
# Set so that nine in ten photographs with moire are found.
_OFFSET = -8.267


def reduction(height: int, width: int) -> int:
    """The whole factor by which a picture is reduced before it is looked at."""
    return max(1, round(max(height, width) / VIEW))


def score(picture: Tensor) -> float:
    """How sure it is that a picture shows moire.

    Args:
        picture: (3, H, W) sRGB in 0..1, reduced as `reduction` says.

    Returns:
        0..1; 0 for a picture too small to tell.
    """
    if min(picture.shape[1:]) < _BLOCK:
        return 0.0
    values = picture.clamp(0, 1) * 255
    luma = torch.einsum("c,chw->hw", torch.tensor(_LUMA), values)
    planes = torch.stack((luma, values[0] - luma, values[2] - luma))
    peaks = _peaks(planes)
    colour_low = [math.log(peaks[plane][_LOW][q]) for q in (0.9, 0.98) for plane in (1, 2)]
    colour_middle = [math.log(peaks[plane][_MIDDLE][0.98]) for plane in (1, 2)]
    found = (
        math.log(peaks[0][_HIGH][0.98]),
        math.log(peaks[0][_MIDDLE][0.98]),
        sum(colour_low[:2]) / 2,
        sum(colour_low[2:]) / 2,
        sum(colour_middle) / 2,
    )
    sure = sum(weight * value for weight, value in zip(_WEIGHTS, found, strict=True)) + _OFFSET
    return 1 / (1 + math.exp(-sure))


def _peaks(planes: Tensor) -> list[dict[tuple[float, float], dict[float, float]]]:
    """For each plane and band, high quantiles over blocks of the strongest peak."""
    blocks = planes.unfold(1, _BLOCK, _BLOCK).unfold(2, _BLOCK, _BLOCK).flatten(1, 2)
    blocks = blocks - blocks.mean(dim=(2, 3), keepdim=True)
    window = torch.hann_window(_BLOCK, periodic=False)
    power = torch.fft.rfft2(blocks * window * window[:, None]).abs().square()
    centre = 9 * _around(power, 1)
    ring = (49 * _around(power, 3) - centre) / 40
    height = centre / 9 / (ring + _FLOOR)
    rows = torch.fft.fftfreq(_BLOCK)[:, None]
    radius = (rows.square() + torch.fft.rfftfreq(_BLOCK).square()).sqrt()
    found = []
    for plane in height:
        bands = {}
        for band in (_LOW, _MIDDLE, _HIGH):
            strongest = plane[:, (radius >= band[0]) & (radius < band[1])].amax(dim=1)
            bands[band] = {q: float(strongest.quantile(q)) + 1e-3 for q in (0.9, 0.98)}
        found.append(bands)
    return found


def _around(power: Tensor, radius: int) -> Tensor:
    """Mean over a square of the spectrum, which wraps round: (P, N, h, w) to the same."""
    padded = F.pad(power, (radius,) * 4, mode="circular")
    return F.avg_pool2d(padded, 2 * radius + 1, 1)
