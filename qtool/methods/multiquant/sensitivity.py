"""What running one layer with fewer bits costs the model's answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.errors import Progress
from qtool.quant import widths

_FLOOR = 1e-12


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    bits: Sequence[int],
    *,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Divergence of the answers when one layer runs at a width and all others at the highest.

    Every second width is measured, the ones between take the geometric mean of their neighbours.

    Args:
        model: A switchable model.
        images: (B, 3, H, W), normalised.
        names: Layers with weights.
        bits: The widths of weights, rising.
        progress: Told about every layer.

    Returns:
        Per layer, the mean Kullback-Leibler divergence in nats at every width; 0 at the highest.
        It never rises with the width.
    """
    top = bits[-1]
    measured = sorted({*bits[:-1:2], *bits[-2:-1]})
    with widths.bits(top):
        expected = F.log_softmax(model(images), dim=-1)
        costs: dict[str, list[float]] = {}
        for index, name in enumerate(names):
            found: dict[int, float] = {top: 0.0}
            for width in measured:
                with widths.bits({name: width}):
                    logs = F.log_softmax(model(images), dim=-1)
                divergence = F.kl_div(logs, expected, log_target=True, reduction="batchmean")
                found[width] = max(float(divergence), _FLOOR)
            costs[name] = _filled(found, bits)
            if progress is not None:
                progress("sensitivity", index + 1, len(names), name)
    return costs


def _filled(found: dict[int, float], bits: Sequence[int]) -> list[float]:
    """All widths from some, and none worse than a narrower one."""
    filled: list[float] = []
    for width in bits:
        if width not in found:
            found[width] = math.sqrt(found[width - 1] * found[width + 1])
        value = found[width]
        filled.append(min(value, filled[-1]) if filled else value)
    return filled
