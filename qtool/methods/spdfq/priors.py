"""What SPDFQ makes up before it optimises a pixel: attention priors, patch boxes, soft labels.

Reference: Semantics Prompting Data-Free Quantization (arXiv 2412.16553), attention priors
alignment, multi-semantic reinforcement and soft-label learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SPREAD_RANGE = (0.07, 0.25)
"""Smallest and largest standard deviation of a mixture component, in parts of the grid's side."""

SIDE_RANGE = (0.2, 0.45)
"""Smallest and largest side of a patch box, in parts of the image's side."""

_BOX_ATTEMPTS = 100
_SHARED = 0.85


@dataclass(frozen=True)
class Box:
    """A square crop of an image, in pixels, with the class it shall show."""

    image: int
    top: int
    left: int
    side: int
    label: int

    def overlaps(self, other: Box) -> bool:
        """Tell whether two boxes of the same image share a pixel."""
        return (
            self.top < other.top + other.side
            and other.top < self.top + self.side
            and self.left < other.left + other.side
            and other.left < self.left + self.side
        )


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def natural_noise(
    count: int, *, size: tuple[int, int], generator: torch.Generator, slope: float = 1.4
) -> Tensor:
    """Draw noise with the spectrum of photographs: amplitude falls as 1 / frequency.

    White noise has no large light and dark areas, and optimising it never brings them: the
    smoothness term first crushes its contrast. Photographs of the same total variation have seven
    times the contrast at the scale of a patch.

    Args:
        count: Number of pictures.
        size: Height and width in pixels.
        generator: Source of randomness (CPU).
        slope: Exponent of the fall in amplitude.

    Returns:
        (count, 3, H, W) with standard deviation 1 around a brightness of its own that is 0 on
        average; the channels share most of their variance, as the colours of photographs do.

    Reference: Field 1987, relations between the statistics of natural images.
    """
    height, width = size
    white = torch.randn((count, 4, height, width), generator=generator)
    down = torch.fft.fftfreq(height)[:, None]
    across = torch.fft.rfftfreq(width)[None]
    frequency = (down**2 + across**2).sqrt().clamp_min(1.0 / max(size))
    layers = torch.fft.irfft2(torch.fft.rfft2(white) * frequency**-slope, s=size)
    layers = layers / layers.std(dim=(2, 3), keepdim=True)
    mixed: Tensor = math.sqrt(_SHARED) * layers[:, :1] + math.sqrt(1.0 - _SHARED) * layers[:, 1:]
    return mixed


def attention_priors(
    count: int,
    *,
    grid: tuple[int, int],
    generator: torch.Generator,
    max_components: int = 5,
) -> Tensor:
    """Draw plausible attention maps: random Gaussian mixtures on a token grid.

    Each map is the sum of one to `max_components` equally weighted Gaussians with random centre,
    spread and correlation, taken at the token centres.

    Args:
        count: Number of maps.
        grid: Rows and columns of tokens.
        generator: Source of randomness (CPU).
        max_components: Largest number of Gaussians in one map (K_APA).

    Returns:
        Non-negative maps (count, rows * columns), each summing to 1.
    """
    rows, columns = grid
    shape = (count, max_components, 1, 1)
    used = torch.randint(1, max_components + 1, (count, 1, 1, 1), generator=generator)
    active = torch.arange(max_components).view(1, -1, 1, 1) < used
    centre_y = _uniform(0.0, rows, shape, generator)
    centre_x = _uniform(0.0, columns, shape, generator)
    spread_y = _uniform(SPREAD_RANGE[0] * rows, SPREAD_RANGE[1] * rows, shape, generator)
    spread_x = _uniform(SPREAD_RANGE[0] * columns, SPREAD_RANGE[1] * columns, shape, generator)
    correlation = _uniform(-0.8, 0.8, shape, generator)
    y = ((torch.arange(rows) + 0.5).view(1, 1, rows, 1) - centre_y) / spread_y
    x = ((torch.arange(columns) + 0.5).view(1, 1, 1, columns) - centre_x) / spread_x
    rest = 1.0 - correlation**2
    density = torch.exp(-(x * x - 2.0 * correlation * x * y + y * y) / (2.0 * rest))
    density = density / (2.0 * math.pi * spread_x * spread_y * rest.sqrt())
    maps = (density * active).sum(dim=1).flatten(1)
    return maps / maps.sum(dim=1, keepdim=True)


def patch_boxes(
    count: int,
    *,
    size: tuple[int, int],
    classes: Tensor,
    generator: torch.Generator,
    max_patches: int = 4,
) -> list[Box]:
    """Draw the disjoint squares that become images of their own (MSR).

    Every image gets one to `max_patches` boxes with sides of 0.2 to 0.45 of the image's shorter
    side and classes that differ within the image. Where the drawn number does not fit after a
    hundred attempts, the image keeps the boxes it has.

    Args:
        count: Number of images.
        size: Height and width of an image in pixels.
        classes: Class indices to draw from, (K,).
        generator: Source of randomness (CPU).
        max_patches: Largest number of boxes in one image (K_MSR).

    Returns:
        All boxes, ordered by image.
    """
    height, width = size
    shorter = min(height, width)
    boxes: list[Box] = []
    for image in range(count):
        wanted = int(torch.randint(1, min(max_patches, len(classes)) + 1, (), generator=generator))
        labels = classes[torch.randperm(len(classes), generator=generator)[:wanted]].tolist()
        placed: list[Box] = []
        for _ in range(_BOX_ATTEMPTS):
            if len(placed) == wanted:
                break
            part = float(_uniform(*SIDE_RANGE, (), generator))
            side = max(2, round(part * shorter))
            box = Box(
                image=image,
                top=int(torch.randint(0, height - side + 1, (), generator=generator)),
                left=int(torch.randint(0, width - side + 1, (), generator=generator)),
                side=side,
                label=int(labels[len(placed)]),
            )
            if not any(box.overlaps(other) for other in placed):
                placed.append(box)
        boxes.extend(placed)
    return boxes


def magnified(images: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Boxes blown up to images of their own, (B, C, H, W) to (len(boxes), C, H, W).

    The gradient of each reaches only its own rectangle.
    """
    # Unbinding first keeps the gradient of each crop as small as its own image.
    single = images.unbind(0)
    crops = []
    for box in boxes:
        rows, columns = slice(box.top, box.top + box.side), slice(box.left, box.left + box.side)
        crop = single[box.image][None, :, rows, columns]
        crops.append(F.interpolate(crop, size=images.shape[-2:], mode="bilinear"))
    return torch.cat(crops) if crops else images[:0]


def soft_labels(
    targets: list[list[int]],
    *,
    num_classes: int,
    generator: torch.Generator,
    low: float = 5.0,
    high: float = 10.0,
) -> Tensor:
    """Turn sets of classes into soft targets (SL).

    The logits of the named classes are drawn from U(low, high), all others from U(0, 1), and pass
    through a softmax.

    Args:
        targets: One list of class indices per image.
        num_classes: Number of classes C.
        generator: Source of randomness (CPU).
        low: Smallest logit of a named class (epsilon 1).
        high: Largest logit of a named class (epsilon 2).

    Returns:
        Soft labels (len(targets), C), each row summing to 1.
    """
    logits = torch.rand((len(targets), num_classes), generator=generator)
    for row, names in enumerate(targets):
        logits[row, names] = _uniform(low, high, (len(names),), generator)
    return logits.softmax(dim=1)
