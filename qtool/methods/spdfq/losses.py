"""Loss terms of image synthesis: attention alignment, soft labels, smoothness, patch similarity.

References: SPDFQ (arXiv 2412.16553) for alignment and soft labels; PSAQ-ViT (arXiv 2203.02250)
for the patch-similarity entropy and the total-variation target.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.engine import training

_BANDWIDTH = 0.01
_REACH = 5.0
_GRID_POINTS = 10
_DENSITY_FLOOR = 1e-4


def class_attention(probabilities: Tensor, *, class_token: bool, prefix_tokens: int) -> Tensor:
    """Reduce softmax maps to one row per head: where the image-level summary looks.

    Args:
        probabilities: Attention after softmax, (B, H, N, N).
        class_token: True takes the class token's row; False averages over all queries.
        prefix_tokens: Leading key columns that are no image patches.

    Returns:
        Attention to the image patches, (B, H, N - prefix_tokens).
    """
    rows = probabilities[:, :, 0] if class_token else probabilities.mean(dim=2)
    return rows[..., prefix_tokens:].float()


def alignment(attention: Tensor, prior: Tensor) -> Tensor:
    """Mean squared distance between attention and its prior, summed over heads.

    The prior is scaled to the mass the model gives to the patches at present, so that the loss
    moves where attention goes and not how much of it the class token keeps.

    Args:
        attention: (B, H, T).
        prior: (B, H, T), every map summing to 1.

    Returns:
        Scalar. Reference: SPDFQ, attention priors alignment.
    """
    if training.has_kernels(attention.device):
        places = attention.shape[0] * attention.shape[-1]
        return training.row_distances(attention, prior).sum() / places
    mass = attention.detach().sum(dim=-1, keepdim=True)
    return (attention - prior * mass).square().mean(dim=(0, 2)).sum()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (B, C) against soft targets (B, C), averaged over B."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


def total_variation(images: Tensor) -> Tensor:
    """Sum of the L2 norms of horizontal, vertical and both diagonal neighbour differences.

    Args:
        images: (B, C, H, W).
    """
    total: Tensor = (
        (images[..., :, :-1] - images[..., :, 1:]).norm()
        + (images[..., :-1, :] - images[..., 1:, :]).norm()
        + (images[..., 1:, :-1] - images[..., :-1, 1:]).norm()
        + (images[..., :-1, :-1] - images[..., 1:, 1:]).norm()
    )
    return total


def total_variation_target(images: Tensor, *, generator: torch.Generator) -> float:
    """Draw the total variation the images shall have: U(2500, 3000) for 32 x 224 x 224 pixels.

    A norm over the batch grows with the square root of its number of pixels, and so does the
    target.
    """
    pixels = images.shape[0] * images.shape[-2] * images.shape[-1]
    drawn = 2500.0 + 500.0 * float(torch.rand((), generator=generator))
    return drawn * math.sqrt(pixels / (32 * 224 * 224))


def patch_similarity_entropy(tokens: Tensor) -> Tensor:
    """Differential entropy of the cosine similarities among patch tokens, averaged over images.

    The density is a Gaussian kernel estimate with bandwidth 0.01 at ten points between the least
    and the greatest similarity of the batch. A kernel that narrow reaches only the two points
    beside a sample, so only those are summed.

    Args:
        tokens: Attention-weighted values averaged over heads, patch tokens only, (B, T, D).

    Returns:
        Scalar, larger for more diverse patches. Reference: PSAQ-ViT, equations 5 to 8.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    similarity = (unit @ unit.transpose(1, 2)).flatten(1)
    low, high = similarity.detach().min(), similarity.detach().max()
    spacing = ((high - low) / (_GRID_POINTS - 1)).clamp_min(1e-6)
    points = low + spacing * torch.arange(_GRID_POINTS, device=tokens.device)
    if training.has_kernels(similarity.device):
        density = training.kernel_sums(similarity, points, _BANDWIDTH)
    else:
        density = _near_sums(similarity, points, low, spacing)
    density = density / (similarity.shape[1] * _BANDWIDTH * math.sqrt(2.0 * math.pi))
    density = density + _DENSITY_FLOOR
    return torch.trapezoid(-density * density.log(), points.expand_as(density), dim=1).mean()


def _near_sums(similarity: Tensor, points: Tensor, low: Tensor, spacing: Tensor) -> Tensor:
    """Sums of the kernels of all similarities (B, M) at the points within reach of each, (B, P)."""
    below = ((similarity.detach() - low) / spacing).floor().long().clamp(0, _GRID_POINTS - 2)
    density = similarity.new_zeros(similarity.shape[0], _GRID_POINTS)
    reach = min(_GRID_POINTS - 1, math.ceil(_REACH * _BANDWIDTH / float(spacing)))
    for offset in range(1 - reach, reach + 1):
        index = below + offset
        there = (index >= 0) & (index < _GRID_POINTS)
        index = index.clamp(0, _GRID_POINTS - 1)
        kernel = torch.exp(-((similarity - points[index]) ** 2) / (2.0 * _BANDWIDTH**2))
        density = density.scatter_add(1, index, kernel * there)
    return density
