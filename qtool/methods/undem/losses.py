"""Losses of the demoire network, per sample so that bad samples can be left out.

Reference: UnDeM (arXiv 2401.02719); the edge term is the "advanced Sobel loss" of MBCNN (Zheng et
al. 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem.filters import constant

EDGE_WEIGHT = 0.25

_DIAGONALS = (
    ((2.0, 1.0, 0.0), (1.0, 0.0, -1.0), (0.0, -1.0, -2.0)),
    ((0.0, 1.0, 2.0), (-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0)),
)


def edge_strength(pictures: Tensor) -> Tensor:
    """Sum of absolute diagonal slopes of R + G + B: (B, 3, H, W) to (B, 1, H - 2, W - 2)."""
    kernels = constant(_DIAGONALS, pictures.device).to(pictures.dtype).unsqueeze(1)
    return F.conv2d(pictures.sum(1, keepdim=True), kernels).abs().sum(1, keepdim=True)


def edge_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Difference of edge strengths per sample, over three times the number of pixels: (B,)."""
    height, width = targets.shape[-2:]
    difference = edge_strength(outputs) - edge_strength(targets)
    return difference.abs().sum((1, 2, 3)) / (3 * height * width)


def restoration_loss(
    outputs: Sequence[Tensor], targets: Tensor, *, edge_weight: float = EDGE_WEIGHT
) -> Tensor:
    """Absolute error plus weighted edge error, summed over the scales a network returns.

    Args:
        outputs: Pictures (B, 3, H / k, W / k), one per scale, in any order.
        targets: (B, 3, H, W).
        edge_weight: Weight of the edge term.

    Returns:
        One loss per sample, (B,).
    """
    total = torch.zeros(len(targets), device=targets.device)
    for output in outputs:
        target = targets
        if output.shape != targets.shape:
            # Means, as a residual network shrinks its input: to leave all alone costs nothing.
            height, width = output.shape[-2:]
            target = F.adaptive_avg_pool2d(targets, (height, width))
        total = total + (output - target).abs().mean((1, 2, 3))
        if edge_weight:
            total = total + edge_weight * edge_loss(output, target)
    return total


def mean_of_kept(losses: Tensor, kept: Tensor) -> Tensor:
    """Mean of the losses (B,) that are kept (B,), not of all; at least one must be."""
    return (losses * kept).sum() / kept.sum()
