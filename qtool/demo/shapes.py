"""Shapes as signed distances and patterns as weights, for a batch that mixes kinds.

A shape fits roughly into the unit disc; distances are negative inside and in units of its radius.
A pattern lives in its own coordinates, one period long per unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_Field = Callable[[Tensor, Tensor], Tensor]


def signed_distance(kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the signed distance of each point to its picture's shape.

    Args:
        kind: Index into `SHAPES`, shape (B,).
        u: Horizontal coordinate in radii, shape (B, P).
        v: Vertical coordinate in radii, downwards, shape (B, P).

    Returns:
        Distances in radii, shape (B, P), negative inside.
    """
    distance = torch.empty_like(u)
    for number, field in enumerate(SHAPES.values()):
        rows = (kind == number).nonzero()[:, 0]
        if rows.numel():
            distance[rows] = field(u[rows], v[rows])
    return distance


def pattern_weight(kind: Tensor, p: Tensor, q: Tensor, sharpness: Tensor) -> Tensor:
    """Return the share of the second colour at each point.

    Args:
        kind: Index into `PATTERNS`, shape (B,).
        p: First coordinate in periods, shape (B, P).
        q: Second coordinate in periods, shape (B, P).
        sharpness: Pixels a period, shape (B, 1): edges are one pixel wide.

    Returns:
        Weights in 0..1, shape (B, P).
    """
    weight = torch.zeros_like(p)
    for number, field in enumerate(PATTERNS.values()):
        rows = (kind == number).nonzero()[:, 0]
        if rows.numel() and field is not _plain:
            edge = field(p[rows], q[rows]) * sharpness[rows]
            weight[rows] = (0.5 - edge).clamp_(0, 1)
    return weight


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 0.82


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs() * (math.sqrt(3) / 2) - v * 0.5, v) - 0.5


def _star(u: Tensor, v: Tensor) -> Tensor:
    sector = math.pi / 5
    radius, angle = torch.hypot(u, v), torch.atan2(u, v).abs_()
    angle = (torch.remainder(angle + sector, 2 * sector) - sector).abs_()
    # One half of a spike: the edge runs from the tip (1, 0) to the notch at angle `sector`.
    notch_x, notch_y = 0.42 * math.cos(sector), 0.42 * math.sin(sector)
    length = math.hypot(1 - notch_x, notch_y)
    normal_x, normal_y = notch_y / length, (1 - notch_x) / length
    return (radius * angle.cos() - 1) * normal_x + radius * angle.sin() * normal_y


def _cross(u: Tensor, v: Tensor) -> Tensor:
    u, v = u.abs(), v.abs()
    long, short = torch.maximum(u, v), torch.minimum(u, v)
    return torch.maximum(long - 0.92, short - 0.3)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.66).abs_() - 0.23


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(u, v) - 0.92, 0.74 - torch.hypot(u - 0.48, v))


def _plain(p: Tensor, q: Tensor) -> Tensor:
    return torch.ones_like(p)


def _striped(p: Tensor, q: Tensor) -> Tensor:
    return (torch.remainder(p, 1) - 0.5).abs_() - 0.25


def _dotted(p: Tensor, q: Tensor) -> Tensor:
    return torch.hypot(torch.remainder(p, 1) - 0.5, torch.remainder(q, 1) - 0.5) - 0.32


def _checkered(p: Tensor, q: Tensor) -> Tensor:
    across = 0.25 - (torch.remainder(p, 1) - 0.5).abs_()
    down = 0.25 - (torch.remainder(q, 1) - 0.5).abs_()
    # Two triangle waves: the product of their signs is the board, the nearer edge its distance.
    return torch.minimum(across.abs(), down.abs()) * torch.sign(across * down)


SHAPES: dict[str, _Field] = {
    "disc": _disc,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
}
PATTERNS: dict[str, _Field] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
}
