"""Does a photograph show moire at all?

Moire is nearly periodic over some distance: in the spectrum of a small square it stands out as a
peak, where the texture of things falls off smoothly. Fences, blinds, cloth and bricks are periodic
too. Three things tell them apart. Their colour follows their light, so what luma explains is taken
out of the colour differences, and a peak in colour counts little where luma is strong. A band of
moire goes on in the next square at nearly the same frequency. And it rises above what is usual in
the picture, so that general roughness counts against it.

Seven such numbers are weighed by a logistic regression. It was fitted on 140 photographs of
screens against 80 clean pictures of other scenes, 100 small photographs of things, 13 sharp
scanned photographs, and 36 drawn fabrics, fences, blinds, bricks and pages. The method is
qtool's own.
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
# Share of luma's power that a peak in colour has to rise above.
_LUMA_SHARE = 0.1
_COARSE, _MIDDLE, _FINE, _FINEST = (0.045, 0.1), (0.1, 0.2), (0.2, 0.35), (0.35, 0.71)
# Octaves in each of which one real factor says how far colour follows luma.
_OCTAVES = ((0.02, 0.1), (0.1, 0.2), (0.2, 0.35), (0.35, 0.8))
_WEIGHTS = (0.695, -3.117, 2.741, 3.240, 1.780, -2.769, -0.914)
# Set so that 95 % of the photographs of screens that it was fitted on are found.
_OFFSET = -7.399


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
    return judged(features(picture))


def judged(numbers: tuple[float, ...]) -> float:
    """The score, 0..1, of a picture with these features."""
    sure = sum(w * x for w, x in zip(_WEIGHTS, numbers, strict=True)) + _OFFSET
    return 1 / (1 + math.exp(-sure))


def features(picture: Tensor) -> tuple[float, ...]:
    """The seven numbers that the score weighs.

    Args:
        picture: (3, H, W) sRGB in 0..1, both sides at least 64.

    Returns:
        Logarithms of how far peaks rise: of colour without luma over neighbouring squares; three
        of colour against luma and roughness; two of luma's finest grid and one of raw colour.
    """
    values = picture.clamp(0, 1) * 255
    luma = torch.einsum("c,chw->hw", torch.tensor(_LUMA), values)
    light = _spectra(luma)
    colour = [_spectra(values[channel] - luma) for channel in (0, 2)]
    own = _power([_without_luma(spectrum, light) for spectrum in colour])
    bright = _power([light])
    plain = _heights(own, least=0.5)
    against = _heights(own, least=0.3, extra=_LUMA_SHARE * _around(bright, 1))
    grid = _heights(bright, least=0.5)
    raw = _heights(_power(colour), least=0.5)
    lasting, lasting_against = _lasting(plain), _lasting(against)
    return (
        _strongest(lasting, _MIDDLE, 0.98),
        _strongest(against, _FINE, 0.75),
        _strongest(lasting_against, _MIDDLE, 0.98),
        _strongest(lasting, _COARSE, 0.75),
        _strongest(grid, _FINEST, 0.98),
        _strongest(raw, _COARSE, 0.25),
        _strongest(_lasting(grid), _FINEST, 0.98),
    )


def _spectra(plane: Tensor) -> Tensor:
    """Spectra of the squares of a plane: (H, W) to (rows, columns, 64, 33)."""
    blocks = plane.unfold(0, _BLOCK, _BLOCK).unfold(1, _BLOCK, _BLOCK)
    blocks = blocks - blocks.mean(dim=(2, 3), keepdim=True)
    window = torch.hann_window(_BLOCK, periodic=False)
    spectra: Tensor = torch.fft.rfft2(blocks * window * window[:, None])
    return spectra


def _power(spectra: list[Tensor]) -> Tensor:
    return torch.stack([spectrum.abs().square() for spectrum in spectra]).sum(0)


def _band(band: tuple[float, float]) -> Tensor:
    """Which frequencies of a spectrum lie in a band of cycles per pixel: (64, 33)."""
    rows = torch.fft.fftfreq(_BLOCK)[:, None]
    radius = (rows.square() + torch.fft.rfftfreq(_BLOCK).square()).sqrt()
    inside: Tensor = (radius >= band[0]) & (radius < band[1])
    return inside


def _without_luma(colour: Tensor, light: Tensor) -> Tensor:
    """What of a colour difference is no multiple of luma, in each square and octave."""
    left = colour.clone()
    for octave in _OCTAVES:
        inside = light * _band(octave)
        shared = (colour * inside.conj()).real.sum(dim=(2, 3), keepdim=True)
        left -= shared / (inside.abs().square().sum(dim=(2, 3), keepdim=True) + 1e-3) * inside
    return left


def _heights(power: Tensor, *, least: float, extra: Tensor | None = None) -> Tensor:
    """Logarithm of how far each frequency's surroundings rise above theirs in turn."""
    centre = _around(power, 1)
    ring = (49 * _around(power, 3) - 9 * centre) / 40
    ground = ring + _FLOOR if extra is None else ring + extra + _FLOOR
    return (centre / ground).clamp_min(least).log()


def _lasting(heights: Tensor) -> Tensor:
    """Mean over two by two squares, a peak being free to drift by one frequency."""
    rows, columns = heights.shape[:2]
    wide = F.pad(heights.flatten(0, 1), (1,) * 4, mode="circular")
    wide = F.max_pool2d(wide[:, None], 3, 1)[:, 0].view_as(heights)
    down, across = min(2, rows), min(2, columns)
    parts = [
        wide[top : rows - down + 1 + top, left : columns - across + 1 + left]
        for top in range(down)
        for left in range(across)
    ]
    return torch.stack(parts).mean(0)


def _strongest(heights: Tensor, band: tuple[float, float], quantile: float) -> float:
    """A quantile over squares of the highest peak in a band."""
    return float(heights[..., _band(band)].amax(dim=-1).flatten().quantile(quantile))


def _around(power: Tensor, radius: int) -> Tensor:
    """Mean over a square of the spectrum, which wraps round; the shape stays."""
    padded = F.pad(power.flatten(0, 1), (radius,) * 4, mode="circular")
    return F.avg_pool2d(padded[:, None], 2 * radius + 1, 1)[:, 0].view_as(power)
