"""How near a restored picture is to its target: PSNR and SSIM as datasets define them, and more.

The published numbers of each dataset were made in another way; a protocol here is one such way,
by name. On photographs of screens plain PSNR measures colour more than moire, hence PSNR after
the best colour fit, and the energy of what is left in the band of moire.

Pictures are display-encoded RGB, (3, H, W), values in 0..1; what lies outside is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS: Final = ("psnr", "ssim", "psnr_aligned", "moire_luma", "moire_chroma")
"""What `measure` can measure; the two energies are better when they are lower."""

HARMLESS: Final = 35.0
"""PSNR in decibels above which a picture counts as left alone."""

_LUMA = (0.299, 0.587, 0.114)
_NARROW, _WIDE = 1.5, 10.0
_SSIM_CONSTANTS = (0.01, 0.03)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of computing PSNR and SSIM.

    Attributes:
        name: What it is called.
        about: What it does, in words for people.
        rounded: Whether values are rounded to 8 bits first.
        ssim: The SSIM of two prepared pictures.
        geometry: What is done to both pictures before anything else.
    """

    name: str
    about: str
    rounded: bool
    ssim: Callable[[Tensor, Tensor], float]
    geometry: Callable[[Tensor], Tensor] = lambda x: x

    def prepare(self, picture: Tensor) -> Tensor:
        """Bring a picture into the protocol's geometry and values: (3, H, W), float64."""
        values = self.geometry(picture.double()).clamp(0, 1)
        return values.mul(255).round().div(255) if self.rounded else values


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio over all samples, in decibels, for a peak of 1.

    Args:
        output: A picture, (C, H, W), in 0..1.
        target: What it should be.

    Returns:
        10 log10(1 / mean squared error); infinity for equal pictures.

    Raises:
        ValueError: The shapes differ.
    """
    _check(output, target)
    error = float((output.double() - target.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim_gaussian(output: Tensor, target: Tensor, *, data_range: float = 1.0) -> float:
    """Structural similarity with a Gaussian window of 11 x 11, sigma 1.5, without borders.

    Reference: Wang et al. 2004, equation 13; windows that leave the picture are not counted.
    """
    kernel = _gaussian(1.5, 5).to(output.device)
    return _ssim(output, target, lambda x: _filtered(x, kernel), data_range, 1.0)


def ssim_uniform(output: Tensor, target: Tensor, *, data_range: float = 1.0) -> float:
    """Structural similarity with a uniform window of 7 x 7 and unbiased (co)variances.

    Scikit-image's default. Windows that leave the picture are not counted.
    """
    kernel = torch.full((7,), 1 / 7, dtype=torch.float64, device=output.device)
    return _ssim(output, target, lambda x: _filtered(x, kernel), data_range, 49 / 48)


def ssim_volume(output: Tensor, target: Tensor, *, data_range: float = 1.0) -> float:
    """Structural similarity with a Gaussian window over rows, columns and channels, 11 x 11 x 11.

    Borders are continued with their last value, in all three directions.
    """
    kernel = _gaussian(1.5, 5).to(output.device)

    def smooth(x: Tensor) -> Tensor:
        x = F.pad(x[None, None], (5,) * 6, mode="replicate")[0, 0]
        windows = x.unfold(0, len(kernel), 1)
        return _filtered(torch.einsum("chwk,k->chw", windows, kernel), kernel)

    return _ssim(output, target, smooth, data_range, 1.0)


def central_square(picture: Tensor) -> Tensor:
    """From 1/6 to 5/6 of each side, resized bilinearly to 256 x 256.

    A picture of 256 x 256 is taken as one that has been through this already.
    """
    height, width = picture.shape[-2:]
    if (height, width) == (256, 256):
        return picture
    part = picture[..., height // 6 : height * 5 // 6, width // 6 : width * 5 // 6]
    return F.interpolate(part[None], (256, 256), mode="bilinear", antialias=True)[0]


PROTOCOLS: Final[Mapping[str, Protocol]] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name="plain",
                about="whole picture, 8 bits, SSIM with a Gaussian window",
                rounded=True,
                ssim=ssim_gaussian,
            ),
            Protocol(
                name="uhdm",
                about="whole picture, not rounded, SSIM with a Gaussian window",
                rounded=False,
                ssim=ssim_gaussian,
            ),
            Protocol(
                name="fhdmi",
                about="whole picture, 8 bits, SSIM with a uniform window",
                rounded=True,
                ssim=ssim_uniform,
            ),
            Protocol(
                name="tip2018",
                about="central part at 256 x 256, 8 bits, SSIM with a window over channels too",
                rounded=True,
                ssim=ssim_volume,
                geometry=central_square,
            ),
            Protocol(
                name="lcdmoire",
                about="whole picture, 8 bits, SSIM with a uniform window and a data range of 2",
                rounded=True,
                ssim=lambda output, target: ssim_uniform(output, target, data_range=2.0),
            ),
        )
    }
)


def colour_matrix(output: Tensor, target: Tensor) -> Tensor:
    """The 3 x 4 matrix that takes an output's colours nearest to the target's, least squares.

    Args:
        output: (3, H, W).
        target: (3, H, W).

    Returns:
        (3, 4), float64: three columns of gains, one of offsets.
    """
    _check(output, target)
    colours = _with_ones(output.double())
    wanted = target.double().flatten(1)
    # A picture of one colour has no unique fit: the ridge picks one.
    gram = colours @ colours.T + 1e-9 * colours.shape[1] * torch.eye(4, device=output.device)
    matrix: Tensor = torch.linalg.solve(gram, colours @ wanted.T)
    return matrix.T


def recoloured(picture: Tensor, matrix: Tensor) -> Tensor:
    """Apply a 3 x 4 colour matrix to (3, H, W)."""
    flat: Tensor = matrix @ _with_ones(picture.to(matrix.dtype))
    return flat.view(picture.shape)


def psnr_aligned(output: Tensor, target: Tensor) -> float:
    """PSNR after the best 3 x 4 colour matrix: what is left when colour and tone are forgiven."""
    return psnr(recoloured(output, colour_matrix(output, target)), target.double())


def moire_energy(output: Tensor, target: Tensor) -> tuple[float, float]:
    """How much is left in the band of moire, after the best colour fit.

    The difference to the target is filtered by a Gaussian of sigma 1.5 minus one of sigma 10.

    Args:
        output: (3, H, W), in 0..1.
        target: (3, H, W), in 0..1.

    Returns:
        Standard deviation in the luma and in the two colour differences R - Y and B - Y together,
        in 8-bit steps.
    """
    aligned = recoloured(output, colour_matrix(output, target))
    band = band_pass((aligned - target.double()).float().mul(255))
    luma, chroma = luma_chroma(band)
    return float(luma.std()), float(chroma.flatten(1).var(dim=1).mean().sqrt())


def luma_chroma(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Split (3, H, W) into luma (H, W) and the differences R - Y and B - Y (2, H, W)."""
    weights = torch.tensor(_LUMA, dtype=picture.dtype, device=picture.device)
    luma = torch.einsum("c,chw->hw", weights, picture)
    return luma, picture[[0, 2]] - luma


def band_pass(picture: Tensor) -> Tensor:
    """A Gaussian of sigma 1.5 minus one of sigma 10, borders mirrored: (C, H, W) to the same."""
    return blurred(picture, _NARROW) - blurred(picture, _WIDE)


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur, borders mirrored: (C, H, W) to the same."""
    for dim in (1, 2):
        size = picture.shape[dim]
        radius = min(math.ceil(4 * sigma), size - 1)
        weights = _gaussian(sigma, radius).to(picture.device, picture.dtype)
        ends = (0, 0, radius, radius) if dim == 1 else (radius, radius, 0, 0)
        shape = (1, 1, -1, 1) if dim == 1 else (1, 1, 1, -1)
        padded = F.pad(picture[:, None], ends, mode="reflect")
        picture = F.conv2d(padded, weights.view(shape))[:, 0]
    return picture


def measure(
    output: Tensor,
    target: Tensor,
    *,
    protocol: str = "plain",
    metrics: Collection[str] = METRICS,
) -> dict[str, float]:
    """Measure a restored picture against its target.

    Args:
        output: (3, H, W), in 0..1.
        target: (3, H, W), in 0..1.
        protocol: A name in `PROTOCOLS`; it decides on geometry and rounding for every metric.
        metrics: Names in `METRICS`.

    Returns:
        The value of each metric, in the order of `METRICS`.

    Raises:
        ValueError: The shapes differ, or there is no such protocol or metric.
    """
    if protocol not in PROTOCOLS or not set(metrics) <= set(METRICS):
        raise ValueError(f"no protocol {protocol!r} or no metric among {sorted(metrics)}")
    way = PROTOCOLS[protocol]
    _check(output, target)
    output, target = way.prepare(output), way.prepare(target)
    values: dict[str, float] = {}
    if "psnr" in metrics:
        values["psnr"] = psnr(output, target)
    if "ssim" in metrics:
        values["ssim"] = way.ssim(output, target)
    if "psnr_aligned" in metrics:
        values["psnr_aligned"] = psnr_aligned(output, target)
    if {"moire_luma", "moire_chroma"} & set(metrics):
        luma, chroma = moire_energy(output, target)
        energies = {"moire_luma": luma, "moire_chroma": chroma}
        values |= {name: value for name, value in energies.items() if name in metrics}
    return values


def _check(output: Tensor, target: Tensor) -> None:
    if output.shape != target.shape or output.ndim != 3:
        raise ValueError(
            f"pictures (C, H, W) disagree: {tuple(output.shape)}, {tuple(target.shape)}"
        )


def _with_ones(picture: Tensor) -> Tensor:
    flat = picture.flatten(1)
    return torch.cat((flat, torch.ones_like(flat[:1])))


def _gaussian(sigma: float, radius: int) -> Tensor:
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-distance.square() / (2 * sigma**2))
    return weights / weights.sum()


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter the last two axes with the same kernel, without borders."""
    taps = len(kernel)
    for dim in (-2, -1):
        length = x.shape[dim] - taps + 1
        if length < 1:
            raise ValueError(f"a picture of {tuple(x.shape[-2:])} is smaller than the window")
        total = x.narrow(dim, 0, length) * kernel[0]
        for k in range(1, taps):
            total = total.add_(x.narrow(dim, k, length), alpha=float(kernel[k]))
        x = total
    return x


def _ssim(
    output: Tensor,
    target: Tensor,
    smooth: Callable[[Tensor], Tensor],
    data_range: float,
    unbiased: float,
) -> float:
    """Mean of the similarity map; `unbiased` scales variances from n to n - 1."""
    _check(output, target)
    x, y = output.double(), target.double()
    first, second = ((constant * data_range) ** 2 for constant in _SSIM_CONSTANTS)
    mean_x, mean_y = smooth(x), smooth(y)
    var_x = unbiased * (smooth(x * x) - mean_x * mean_x)
    var_y = unbiased * (smooth(y * y) - mean_y * mean_y)
    covariance = unbiased * (smooth(x * y) - mean_x * mean_y)
    above = (2 * mean_x * mean_y + first) * (2 * covariance + second)
    below = (mean_x**2 + mean_y**2 + first) * (var_x + var_y + second)
    return float((above / below).mean())
