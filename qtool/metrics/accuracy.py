"""Top-k accuracy and how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def topk_hits(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, int]:
    """Count the pictures whose label is among the k highest scores.

    Of equal scores the one with the lower class index ranks first, on every device. A row with a
    score that is not a number is a miss. With fewer than k classes every other row is a hit.

    Args:
        logits: Scores, (B, C).
        labels: Right classes, (B,) integers in 0..C-1.
        ks: The values of k.

    Returns:
        For each k the number of hits, 0..B.

    Raises:
        ValueError: The shapes disagree, a label is out of range or a k is below one.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits (B, C) and labels (B,) disagree: {tuple(logits.shape)}, {tuple(labels.shape)}"
        )
    if any(k < 1 for k in ks):
        raise ValueError(f"k starts at 1, got {min(ks)}")
    classes = logits.shape[1]
    labels = labels.to(device=logits.device, dtype=torch.int64)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels span {int(labels.min())}..{int(labels.max())}, classes 0..{classes - 1}"
        )
    column = labels.unsqueeze(1)
    score = logits.gather(1, column)
    index = torch.arange(classes, device=logits.device)
    ahead = (logits > score) | ((logits == score) & (index < column))
    rank = ahead.sum(1)
    valid = ~logits.isnan().any(1)
    return {k: int(((rank < k) & valid).sum()) for k in ks}


def standard_error(p: float, n: int) -> float:
    """The standard error of a share measured on independent pictures, sqrt(p (1 - p) / n).

    Args:
        p: Share of hits, 0..1.
        n: Number of pictures.

    Raises:
        ValueError: `p` is outside 0..1 or `n` is below one.
    """
    if not 0.0 <= p <= 1.0 or n < 1:
        raise ValueError(f"needs 0 <= p <= 1 and n >= 1, got p={p}, n={n}")
    return math.sqrt(p * (1.0 - p) / n)
