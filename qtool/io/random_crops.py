"""Random parts of pictures, to train on."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIALS = 10


def random_crop(image: Image.Image, *, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random part of a picture, of random area and shape, resized and mirrored by chance.

    Args:
        image: A picture in mode RGB.
        size: Height and width of the result.
        generator: Source of randomness.

    Returns:
        uint8 (3, H, W).

    Reference: Szegedy et al. 2015 (arXiv 1409.4842), section 6.
    """
    draws = torch.rand(2 * _TRIALS + 3, generator=generator).tolist()
    box = _box(image.width, image.height, draws)
    height, width = size
    part = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(part, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    return pixels.flip(2) if draws[-1] < 0.5 else pixels


def shifted(pictures: Tensor, *, reach: int, generator: torch.Generator) -> Tensor:
    """Small pictures moved by up to `reach` pixels each way, black beyond, mirrored by chance.

    Args:
        pictures: uint8 (B, 3, H, W), on any device.
        reach: Largest move.
        generator: Source of randomness, on the CPU.
    """
    count, channels, height, width = pictures.shape
    device = pictures.device
    moves = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator).bool()
    moves, mirrored = (t.to(device, non_blocking=True) for t in (moves, mirrored))
    rows = moves[0] + torch.arange(height, device=device)  # (B, H)
    columns = moves[1] + torch.arange(width, device=device)  # (B, W)
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(pictures, (reach, reach, reach, reach))
    return padded[
        torch.arange(count, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.view(count, 1, height, 1),
        columns.view(count, 1, 1, width),
    ]


def _box(width: int, height: int, draws: list[float]) -> tuple[float, float, float, float]:
    """A box inside a picture: left, top, right, bottom."""
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for trial in range(_TRIALS):
        area = width * height * (_AREA[0] + draws[2 * trial] * (_AREA[1] - _AREA[0]))
        ratio = math.exp(low + draws[2 * trial + 1] * (high - low))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = int(draws[-3] * (width - across + 1))
            top = int(draws[-2] * (height - down + 1))
            return left, top, left + across, top + down
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
