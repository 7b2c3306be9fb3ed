"""What operations can apply to their values before they quantize them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

AFTER_LINEAR = ("none", "gelu")
AFTER_CONVOLUTION = ("none", "relu", "relu6")


def activated(x: Tensor, name: str) -> Tensor:
    """`x` after one of the activations above."""
    if name == "gelu":
        return F.gelu(x)
    if name == "relu":
        return F.relu(x)
    return F.relu6(x) if name == "relu6" else x
