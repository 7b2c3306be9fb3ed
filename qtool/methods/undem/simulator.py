"""A photograph of a screen, simulated from the light of its subpixels to the JPEG file.

Every sensor sample looks at a point of the screen (`geometry`), integrates the light of the
subpixels there (`panels`), sees one colour of it and guesses the others (`sensor`). The two grids
beat, and moire comes out by itself. The target goes the same way without subpixels and sensor, so
that the two are aligned by construction.

References: Liu, Shu and Wu 2018 (arXiv 1804.03809); Yuan et al. 2019 (LCDMoire).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem import filters, jpeg, panels, sensor
from qtool.methods.undem.capture import Capture, Tone
from qtool.methods.undem.geometry import screen_points

_MARGIN = 8
"""Sensor samples around the part that is kept, so that filters see real neighbours."""


def simulate(
    picture: Tensor,
    capture: Capture,
    *,
    size: tuple[int, int],
    generator: torch.Generator,
    tone: Tone = "capture",
) -> tuple[Tensor, Tensor]:
    """Photograph a picture that fills a screen pixel by pixel.

    Args:
        picture: What the screen shows, (3, H, W) in 0..1, sRGB. Its centre is in view; where the
            view goes past its edges it is mirrored.
        capture: The photograph.
        size: Height and width of the result.
        generator: Of the noise, on the CPU; on another device it seeds the noise there.
        tone: `capture`: the target has the photograph's exposure, white balance and tone curve,
            so that moire alone separates the two. `screen`: the target is the picture itself.

    Returns:
        The photograph and the target, both (3, height, width) in 0..1.
    """
    height = round(size[0] / capture.resize_y) + 2 * _MARGIN
    width = round(size[1] / capture.resize_x) + 2 * _MARGIN
    screen = _screen_light(picture, capture.screen_gamma)
    down, across = _positions(capture, height, width, picture.device)
    shown = _read(screen, across, down, mode="nearest")
    light = shown * _emission(capture, across, down)
    light = filters.gaussian_blur(light, capture.blur * capture.samples)
    light = F.avg_pool2d(light, capture.samples)
    clean = F.avg_pool2d(_read(screen, across, down, mode="bilinear"), capture.samples)
    shade = _shade(capture, height, width, picture.device)
    raw = (light * shade + capture.glare * _ramp(width, picture.device)) * capture.exposure
    photo = _develop(_sensed(raw, capture, generator), capture)
    photo = filters.bilateral(photo, tone=capture.denoise, reach=2.0) if capture.denoise else photo
    photo = filters.blur_chroma(photo, capture.chroma_blur)
    photo = filters.sharpen(photo, capture.sharpen) if capture.sharpen else photo
    if tone == "capture":
        lit = (clean * shade + capture.glare * _ramp(width, picture.device)) * capture.exposure
        target = _develop(lit, capture)
    else:
        target = filters.to_srgb(clean)
    photo, target = (_reduced(each, capture, size).clamp(0, 1) for each in (photo, target))
    if capture.quality:
        photo = jpeg.compressed(photo, quality=capture.quality, subsampled=capture.subsampled)
    return photo, target


def _screen_light(picture: Tensor, gamma: float) -> Tensor:
    """Linear light of the picture on a screen whose gamma is not exactly that of sRGB."""
    return filters.to_linear(picture).clamp_min(0) ** (gamma / 2.2)


def _positions(
    capture: Capture, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    across, down = screen_points(
        capture.pose, height, width, samples=capture.samples, device=device
    )
    return down, across


def _read(screen: Tensor, across: Tensor, down: Tensor, *, mode: str) -> Tensor:
    """Look up screen pixels (3, H, W) at positions counted from its centre."""
    height, width = screen.shape[-2:]
    # Whole pixels: the middle of the picture lies on a corner of pixels, as the tile's does.
    grid = torch.stack(
        [
            2 * (across + width // 2) / width - 1,
            2 * (down + height // 2) / height - 1,
        ],
        -1,
    )
    return F.grid_sample(
        screen[None], grid[None], mode=mode, padding_mode="reflection", align_corners=False
    )[0]


def _emission(capture: Capture, across: Tensor, down: Tensor) -> Tensor:
    """Light of the subpixels at each position, bilinear between cells."""
    tile = panels.tile(capture.panel, gap_x=capture.gap_x, gap_y=capture.gap_y).to(across.device)
    cells = tile.shape[-1]
    period = cells / panels.CELLS
    ring = F.pad(tile[None], (1, 1, 1, 1), mode="circular")
    places = [
        2 * (torch.remainder(position, period) * panels.CELLS + 1) / (cells + 2) - 1
        for position in (across, down)
    ]
    grid = torch.stack(places, -1)
    return F.grid_sample(ring, grid[None], mode="bilinear", align_corners=False)[0]


def _ramp(width: int, device: torch.device) -> Tensor:
    return torch.linspace(0, 1, width, device=device)


def _shade(capture: Capture, height: int, width: int, device: torch.device) -> Tensor:
    """Tint and vignette (3, H, W)."""
    pose = capture.pose
    across = (torch.arange(width, device=device) - width / 2) / pose.width + pose.centre_x
    down = (torch.arange(height, device=device) - height / 2) / pose.width + pose.centre_y
    radius = across.square()[None, :] + down.square()[:, None]
    # The corner of a 4:3 sensor lies 0.625 widths from its middle.
    fall = 1 - capture.vignette * radius / 0.625**2
    return filters.constant(capture.tint, device).view(3, 1, 1) * fall


def _sensed(light: Tensor, capture: Capture, generator: torch.Generator) -> Tensor:
    """Through the colour filters and back: light (3, H, W) to colours (3, H, W)."""
    height, width = light.shape[-2:]
    seen = sensor.masks(capture.mosaic, height, width, quad=capture.quad, device=light.device)
    raw = (light * seen).sum(0)
    raw = sensor.noisy(
        raw, gain=capture.noise_gain, floor=capture.noise_floor, generator=generator
    ).clamp_min(0)
    return sensor.demosaic(raw, seen, method=capture.demosaic, quad=capture.quad)


def _develop(light: Tensor, capture: Capture) -> Tensor:
    """White balance, colour matrix, sRGB curve and tone curve."""
    balanced = light * filters.constant(capture.balance, light.device).view(3, 1, 1)
    mean = balanced.mean(0, keepdim=True)
    mixed = balanced + 3 * capture.mixing * (mean - balanced)
    encoded = filters.to_srgb(mixed.clamp(0, 1))
    curve = encoded * encoded * (3 - 2 * encoded)
    return encoded + capture.contrast * (curve - encoded)


def _reduced(picture: Tensor, capture: Capture, size: tuple[int, int]) -> Tensor:
    inner = picture[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    if inner.shape[-2:] == size:
        return inner
    return F.interpolate(
        inner[None], size=size, mode="bilinear", antialias=capture.antialias, align_corners=False
    )[0]
