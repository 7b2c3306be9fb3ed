"""Large pictures in equal tiles whose overlaps are blended so that weights add up to one."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST, SMALLEST = 1024, 512
"""Sides of tiles that are chosen by themselves, from the first tried to the last."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Tiles along one side of a picture.

    Attributes:
        length: The picture's side, in pixels.
        size: Side of every tile; more than `length` where a small picture is padded.
        starts: First pixel of each tile, rising.
        ramp: Pixels over which one tile hands over to the next.
    """

    length: int
    size: int
    starts: tuple[int, ...]
    ramp: int

    def weights(self, index: int) -> Tensor:
        """Weight of each pixel of a tile, (size,); over all tiles they add up to one."""
        position = torch.arange(self.size, dtype=torch.float32) + self.starts[index]
        weights = torch.ones(self.size)
        if index > 0:
            weights *= self._rise(position, self._seam(index - 1))
        if index < len(self.starts) - 1:
            weights *= 1 - self._rise(position, self._seam(index))
        return weights

    def _seam(self, index: int) -> float:
        """The middle between two tiles' overlap."""
        return (self.starts[index] + self.size + self.starts[index + 1] - 1) / 2

    def _rise(self, position: Tensor, middle: float) -> Tensor:
        share = ((position - middle) / self.ramp + 0.5).clamp(0, 1)
        return 0.5 - 0.5 * torch.cos(math.pi * share)


def plan_axis(length: int, *, tile: int, overlap: int, multiple: int, shrink: bool = False) -> Axis:
    """Lay tiles along one side, as few as will do, evenly spread.

    Args:
        length: The picture's side.
        tile: Side of a tile; rounded up to a multiple. 0 makes one tile.
        overlap: Least number of pixels two neighbours share.
        multiple: What a tile's side must be a multiple of; tiles start at multiples too.
        shrink: Whether tiles may be smaller where as many of them still share `overlap` pixels.
    """
    padded = _up(length, multiple)
    size = min(_up(tile, multiple), padded) if tile else padded
    overlap = min(_up(overlap, multiple), size - multiple)
    if size == padded:
        return Axis(length=length, size=padded, starts=(0,), ramp=1)
    count = 1 + math.ceil((padded - size) / (size - overlap))
    if shrink:
        sizes = range(_up((padded + (count - 1) * overlap) // count, multiple), size, multiple)
        shared = (s for s in sizes if s - _widest(_spread(padded - s, count, multiple)) >= overlap)
        size = next(shared, size)
    starts = _spread(padded - size, count, multiple)
    # Two hand-overs must not meet, or three tiles would share a pixel.
    nearest = min(right - left for left, right in itertools.pairwise(starts))
    ramp = max(1, min(overlap, nearest))
    return Axis(length=length, size=size, starts=tuple(starts), ramp=ramp)


def _spread(last: int, count: int, multiple: int) -> list[int]:
    """First pixels of `count` tiles, the last of which begins at `last`."""
    return [index * last // (count - 1) // multiple * multiple for index in range(count)]


def _widest(starts: list[int]) -> int:
    return max(right - left for left, right in itertools.pairwise(starts))


def mirrored(start: int, size: int, length: int) -> Tensor:
    """Indices of `size` pixels from `start` on, mirrored at the far end as often as needed."""
    period = max(2 * (length - 1), 1)
    index = torch.arange(start, start + size) % period
    return torch.minimum(index, period - index).clamp(0, length - 1)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
