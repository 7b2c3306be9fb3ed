"""Every number of one simulated photograph of a screen, and how they are drawn.

Ranges follow measurements on real photographs: sensor and screen grids beat between 1.5 and 3.2
samples per screen pixel, and photographs that were reduced afterwards carry finer bands.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch

from qtool.methods.undem.geometry import Pose
from qtool.methods.undem.panels import Panel
from qtool.methods.undem.sensor import Demosaic, Mosaic

Tone = Literal["capture", "screen"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One photograph of one screen.

    Attributes:
        pose: Camera and screen.
        panel: Layout of the subpixels.
        gap_x: Black gap beside subpixels, in emission cells.
        gap_y: Black gap below pixels, in emission cells.
        screen_gamma: Of the screen; the picture on it is encoded with the sRGB curve.
        tint: Gains of the backlight per channel.
        vignette: Share of light lost in the corners of the sensor.
        glare: Light added at one side, as a share of white.
        exposure: Gain of the photograph.
        blur: Standard deviation of the lens, in sensor samples.
        mosaic: Colour filter array.
        quad: Whether each filter covers 2x2 samples.
        noise_gain: Variance of the noise per unit of light.
        noise_floor: Variance of the noise in the dark.
        demosaic: How colours are filled in.
        balance: Gains of the white balance per channel.
        mixing: Share of each colour that leaks into the two others.
        contrast: Strength of the S-shaped tone curve.
        denoise: Standard deviation in brightness of the bilateral filter; 0 for none.
        chroma_blur: In sensor samples.
        sharpen: Amount of unsharp masking.
        resize_x: Factor by which the photograph is reduced, across.
        resize_y: The same, downwards.
        antialias: Whether reducing averages all samples.
        quality: Of JPEG, 1..100; 0 for none.
        subsampled: Whether JPEG halves the resolution of colour.
        samples: Sub-samples along each side of a sensor sample.
    """

    pose: Pose = field(default_factory=Pose)
    panel: Panel = "rgb"
    gap_x: float = 0.0
    gap_y: float = 0.0
    screen_gamma: float = 2.2
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    vignette: float = 0.0
    glare: float = 0.0
    exposure: float = 1.0
    blur: float = 0.35
    mosaic: Mosaic = "rggb"
    quad: bool = False
    noise_gain: float = 0.0
    noise_floor: float = 0.0
    demosaic: Demosaic = "edge"
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)
    mixing: float = 0.0
    contrast: float = 0.0
    denoise: float = 0.0
    chroma_blur: float = 0.0
    sharpen: float = 0.0
    resize_x: float = 1.0
    resize_y: float = 1.0
    antialias: bool = True
    quality: int = 0
    subsampled: bool = True
    samples: int = 4

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON types."""
        return asdict(self)


class Draw:
    """Named ways to draw a number from one generator.

    Args:
        generator: A generator on the CPU.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        """A number between two others."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.uniform(0, 1) < probability

    def index(self, count: int) -> int:
        """A whole number below `count`."""
        return int(torch.randint(count, (), generator=self.generator))

    def pick(self, choices: tuple[T, ...], shares: tuple[float, ...]) -> T:
        """One of several, by their shares."""
        position = self.uniform(0, sum(shares))
        for choice, share in zip(choices, shares, strict=True):
            position -= share
            if position < 0:
                return choice
        return choices[-1]

    def gains(self, low: float, high: float) -> tuple[float, float, float]:
        """One gain per channel."""
        return self.uniform(low, high), self.uniform(low, high), self.uniform(low, high)


def draw_capture(generator: torch.Generator, *, samples: int = 4) -> Capture:
    """Draw a photograph.

    Args:
        generator: Source of all randomness; equal states give equal photographs.
        samples: Sub-samples along each side of a sensor sample.
    """
    draw = Draw(generator)
    speed = draw.uniform(0, 1)
    shrink_x, shrink_y = _resize(draw)
    return Capture(
        pose=_pose(draw),
        panel=draw.pick(("rgb", "bgr", "diamond"), (0.75, 0.08, 0.17)),
        gap_x=draw.uniform(0, 1),
        gap_y=draw.uniform(0, 1),
        screen_gamma=draw.uniform(2.0, 2.4),
        tint=draw.gains(0.92, 1.08),
        vignette=draw.uniform(0, 0.15),
        glare=draw.uniform(0, 0.04),
        exposure=draw.uniform(0.55, 0.95),
        blur=draw.uniform(0.3, 0.8) if draw.chance(0.85) else draw.uniform(0.8, 1.2),
        mosaic=draw.pick(("rggb", "bggr", "grbg", "gbrg"), (1, 1, 1, 1)),
        quad=draw.chance(0.1),
        noise_gain=2e-4 + 2e-3 * speed,
        noise_floor=(1e-3 + 4e-3 * speed) ** 2,
        demosaic=draw.pick(("edge", "bilinear", "malvar"), (0.6, 0.25, 0.15)),
        balance=draw.gains(0.92, 1.08),
        mixing=draw.uniform(-0.12, 0.04),
        contrast=draw.uniform(-0.1, 0.9),
        denoise=draw.uniform(0, 12 / 255),
        chroma_blur=draw.uniform(0.5, 4.0) if draw.chance(0.85) else 0.0,
        sharpen=draw.uniform(0, 1.0) if draw.chance(0.7) else 0.0,
        resize_x=shrink_x,
        resize_y=shrink_y,
        antialias=draw.chance(0.6),
        quality=75 + draw.index(23),
        subsampled=draw.chance(0.7),
        samples=samples,
    )


def _pose(draw: Draw) -> Pose:
    if draw.chance(0.8):
        scale = draw.uniform(1.5, 3.2)
    else:
        scale = draw.uniform(0.8, 1.5) if draw.chance(0.5) else draw.uniform(3.2, 5.0)
    roll = 6.0 if draw.chance(0.9) else 25.0
    return Pose(
        scale=scale,
        yaw=draw.uniform(-12, 12),
        pitch=draw.uniform(-12, 12),
        roll=draw.uniform(-roll, roll),
        focal=draw.uniform(1.0, 1.6),
        distortion=draw.uniform(-0.08, 0.08),
        centre_x=draw.uniform(-0.45, 0.45),
        centre_y=draw.uniform(-0.33, 0.33),
        phase_x=draw.uniform(0, 2),
        phase_y=draw.uniform(0, 2),
    )


def _resize(draw: Draw) -> tuple[float, float]:
    """Some photographs stay as they are; the rest shrink, half of them out of shape."""
    if draw.chance(0.2):
        return 1.0, 1.0
    factor = draw.uniform(0.25, 0.9)
    if draw.chance(0.5):
        return factor, factor
    return factor * draw.uniform(0.55, 1.0), factor
