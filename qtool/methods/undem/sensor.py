"""The camera behind its lens: colour filter array, noise, and four ways to undo the mosaic.

References: Hamilton and Adams 1997 (edge-aware); Malvar, He and Cutler 2004.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem.filters import constant, padded

Mosaic = Literal["rggb", "bggr", "grbg", "gbrg"]
Demosaic = Literal["edge", "bilinear", "malvar"]

_CHANNELS = {"r": 0, "g": 1, "b": 2}


def masks(
    mosaic: Mosaic,
    height: int,
    width: int,
    *,
    quad: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return which sample sees which colour, shape (3, height, width), ones and zeros.

    Args:
        mosaic: Colours of a 2x2 block, row by row.
        height: Samples downwards.
        width: Samples across.
        quad: Whether each filter covers 2x2 samples.
        device: Where they are to be.
    """
    block = torch.zeros(3, 2, 2)
    for place, letter in enumerate(mosaic):
        block[_CHANNELS[letter], place // 2, place % 2] = 1.0
    if quad:
        block = block.repeat_interleave(2, 1).repeat_interleave(2, 2)
    block = block.to(device, non_blocking=True)
    side = block.shape[-1]
    return block.repeat(1, -(-height // side), -(-width // side))[:, :height, :width]


def noisy(raw: Tensor, *, gain: float, floor: float, generator: torch.Generator) -> Tensor:
    """Add noise of variance gain * value + floor.

    The generator is one of the CPU. Noise elsewhere comes from a generator of that device, which
    it seeds: numbers are the same on equal devices, not on all.
    """
    if raw.device.type == "cpu":
        normal = torch.randn(raw.shape, generator=generator)
    else:
        seed = int(torch.randint(2**62, (), generator=generator))
        there = torch.Generator(raw.device).manual_seed(seed)
        normal = torch.randn(raw.shape, generator=there, device=raw.device)
    return raw + normal * (gain * raw.clamp_min(0) + floor).sqrt()


def demosaic(raw: Tensor, seen: Tensor, *, method: Demosaic, quad: bool = False) -> Tensor:
    """Fill in the two colours that each sample did not see.

    Args:
        raw: One value per sample, shape (H, W).
        seen: Its `masks`, shape (3, H, W).
        method: How; a quad array always takes a wide bilinear one.
        quad: Whether each filter covers 2x2 samples.

    Returns:
        (3, H, W).
    """
    if quad:
        return _spread(raw * seen, seen, (1.0, 4.0, 6.0, 4.0, 1.0))
    if method == "bilinear":
        return _spread(raw * seen, seen, (1.0, 2.0, 1.0))
    if method == "malvar":
        return _malvar(raw, seen)
    green = _edge_green(raw, seen[1])
    difference = _spread((raw - green) * seen, seen, (1.0, 2.0, 1.0))
    return torch.stack([green + difference[0], green, green + difference[2]])


def _spread(values: Tensor, seen: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Mean of the samples seen nearby, by a separable window."""
    window = constant(weights, values.device)
    kernel = torch.outer(window, window)[None, None]
    edge = len(weights) // 2
    stack = torch.stack([values, seen]).flatten(0, 1).unsqueeze(1)
    total = F.conv2d(padded(stack, edge, edge), kernel).squeeze(1)
    return total[:3] / total[3:].clamp_min(1e-6)


def _conv(raw: Tensor, kernels: list[list[list[float]]]) -> Tensor:
    weight = constant(kernels, raw.device).unsqueeze(1)
    edge = weight.shape[-1] // 2
    return F.conv2d(padded(raw[None, None], edge, edge), weight)[0]


def _edge_green(raw: Tensor, seen: Tensor) -> Tensor:
    """Green along the direction in which the raw values change less."""
    zero = [0.0] * 5
    flat = [[zero, zero, row, zero, zero] for row in _LINES]
    turned = [[list(column) for column in zip(*kernel, strict=True)] for kernel in flat]
    mean_x, bend_x, step_x, mean_y, bend_y, step_y = _conv(raw, flat + turned)
    rough_x, rough_y = step_x.abs() + bend_x.abs(), step_y.abs() + bend_y.abs()
    along_x, along_y = mean_x + bend_x / 4, mean_y + bend_y / 4
    between = (along_x + along_y) / 2
    chosen = torch.where(rough_x < rough_y, along_x, along_y)
    chosen = torch.where(rough_x == rough_y, between, chosen)
    return torch.where(seen > 0, raw, chosen)


_LINES = (
    [0.0, 0.5, 0.0, 0.5, 0.0],
    [-1.0, 0.0, 2.0, 0.0, -1.0],
    [0.0, -1.0, 0.0, 1.0, 0.0],
)

_CROSS = [
    [0.0, 0.0, -1.0, 0.0, 0.0],
    [0.0, 0.0, 2.0, 0.0, 0.0],
    [-1.0, 2.0, 4.0, 2.0, -1.0],
    [0.0, 0.0, 2.0, 0.0, 0.0],
    [0.0, 0.0, -1.0, 0.0, 0.0],
]
_ROW = [
    [0.0, 0.0, 0.5, 0.0, 0.0],
    [0.0, -1.0, 0.0, -1.0, 0.0],
    [-1.0, 4.0, 5.0, 4.0, -1.0],
    [0.0, -1.0, 0.0, -1.0, 0.0],
    [0.0, 0.0, 0.5, 0.0, 0.0],
]
_COLUMN = [list(column) for column in zip(*_ROW, strict=True)]
_CORNER = [
    [0.0, 0.0, -1.5, 0.0, 0.0],
    [0.0, 2.0, 0.0, 2.0, 0.0],
    [-1.5, 0.0, 6.0, 0.0, -1.5],
    [0.0, 2.0, 0.0, 2.0, 0.0],
    [0.0, 0.0, -1.5, 0.0, 0.0],
]


def _malvar(raw: Tensor, seen: Tensor) -> Tensor:
    cross, row, column, corner = _conv(raw, [_CROSS, _ROW, _COLUMN, _CORNER]) / 8
    wide = padded(seen[None], 1, 1)[0]
    beside = wide[:, 1:-1, :-2] + wide[:, 1:-1, 2:]
    colours = []
    for channel in (0, 2):
        # A green sample has its red neighbours either in its row or in its column.
        at_green = torch.where(beside[channel] > 0, row, column)
        missing = torch.where(seen[1] > 0, at_green, corner)
        colours.append(torch.where(seen[channel] > 0, raw, missing))
    green = torch.where(seen[1] > 0, raw, cross)
    return torch.stack([colours[0], green, colours[1]])
