"""In-place distillation: the widest setting teaches the others within the same step.

Reference: MBQuant, arXiv 2305.08117; section 2.10 of this project's notes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_SHARE = 0.5
_USUAL_WIDTHS = 4


def width_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
    """Loss of one width.

    Args:
        logits: (B, classes).
        labels: (B,).
        teacher: Probabilities of the widest setting, (B, classes), without a gradient; None for
            that setting itself, or to learn from labels alone.

    Returns:
        Cross-entropy with the labels, or the mean of it and of that with the teacher.
    """
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    return _SHARE * hard + (1 - _SHARE) * F.cross_entropy(logits, teacher)


def teacher_of(logits: Tensor) -> Tensor:
    """What the widest setting teaches: its probabilities, cut off from its gradient."""
    return logits.detach().softmax(dim=1)


def loss_weight(widths: int) -> float:
    """Factor on the loss of every width, so that many widths do not lengthen the step."""
    return min(1.0, _USUAL_WIDTHS / widths)
