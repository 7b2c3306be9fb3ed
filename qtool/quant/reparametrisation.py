"""LayerNorm scale reparametrisation: give all channels one range before one scale must fit them.

After a LayerNorm the channels of a vision transformer differ in range by factors of ten and more,
and a per-tensor quantizer spends its few codes on the widest. Shifting and scaling each channel
inside the LayerNorm's affine part, and undoing it in the weight and bias of the layer that reads
it, leaves the function as it is and evens the ranges.

Reference: RepQ-ViT (arXiv 2212.08254), section 3.2; the partial exponent is SmoothQuant's
(arXiv 2211.10438).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.quant import quantizers

EXPONENTS = (0.0, 0.5, 0.75, 1.0)
"""Tried for every layer: 0 leaves the scales of channels alone, 1 makes their ranges equal."""

_PERCENTILE = 0.999
_ROWS = 4096


def channel_ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and half width of each channel's range, by the 99.9th percentile on either side.

    Args:
        x: Activations (..., K).

    Returns:
        Two tensors (K,). A channel that hardly varies gets the mean half width, so that it is
        shifted and not scaled.
    """
    rows = x.detach().float().reshape(-1, x.shape[-1])
    rows = rows[:: len(rows) // _ROWS + 1]
    low = torch.quantile(rows, 1.0 - _PERCENTILE, dim=0)
    high = torch.quantile(rows, _PERCENTILE, dim=0)
    half = (high - low) / 2
    mean = half.mean().clamp_min(1e-12)
    return (high + low) / 2, torch.where(half > 1e-4 * mean, half, mean)


@torch.no_grad()
def fold_into_norm(
    norm: nn.LayerNorm,
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    *,
    weight_bits: int,
    input_bits: int,
) -> float:
    """Even the channel ranges of a LayerNorm's output, in place, with the function unchanged.

    Of several exponents the one with the least error of the quantized layer's output is taken.

    Args:
        norm: The LayerNorm, with affine parameters.
        weight: Weight (N, K) of the layer that reads it; changed in place.
        bias: Bias (N,) of that layer; changed in place.
        x: Outputs of the LayerNorm on calibration images, (..., K).
        weight_bits: Width of weight codes.
        input_bits: Width of activation codes.

    Returns:
        The exponent taken.
    """
    middle, half = channel_ranges(x)
    rows = x.detach().float().reshape(-1, x.shape[-1])
    rows = rows[:: len(rows) // 1024 + 1]
    expected = F.linear(rows, weight)
    best: tuple[float, float, Tensor] | None = None
    for exponent in EXPONENTS:
        ratio = (half / half.mean()) ** exponent
        moved, scaled = (rows - middle) / ratio, weight * ratio
        scale, zero = quantizers.search_activation_range(moved, bits=input_bits)
        levels = quantizers.uniform_levels(moved, scale, zero, bits=input_bits) * scale
        steps, zeros = quantizers.search_weight_range(scaled, bits=weight_bits)
        codes = quantizers.uniform_levels(scaled, steps[:, None], zeros[:, None], bits=weight_bits)
        found = F.linear(levels, codes * steps[:, None]) + F.linear(middle, weight)
        error = float((found - expected).square().mean())
        if best is None or error < best[0]:
            best = (error, exponent, ratio)
    if best is None:
        raise AssertionError("there is always an exponent")
    _, exponent, ratio = best
    bias.add_(F.linear(middle, weight))
    weight.mul_(ratio)
    norm.weight.div_(ratio)
    norm.bias.sub_(middle).div_(ratio)
    return exponent
