"""Nested codes: one 8-bit number per weight whose leading bits are its code at every width.

A weight row is coded once, on a grid without a level at zero: q = floor(w / (2 s)) + 128 stands for
s (2 q - 255). The leading n bits of q, q >> (8 - n), stand for a (2 q_n - (2^n - 1)): the middle of
the interval they name. So rounding to fewer bits by a shift is rounding to nearest, and no width is
derived from another's error. The four base-4 digits of q are the 2-bit branches of MultiQuant, with
values in {-3, -1, 1, 3} and scales in the ratio 4. Here q is held as int8, less 128.

Reference: Zhong et al., MultiQuant / MBQuant (arXiv 2305.08117); the nesting of integers is that of
Any-Precision DNN and MatQuant (arXiv 2502.06786).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.engine import ops

CODE_BITS = 8
DIGIT_BITS = 2
PLANES = CODE_BITS // DIGIT_BITS

_CANDIDATES = 80
_SMALLEST_SHARE = 0.15
_TINY = 1e-30
_ACTIVATION_NOISE = 3e-4
"""Squared error of 8-bit activations as a share of the output's power, about."""


def planes_for(bits: int) -> int:
    """Number of 2-bit planes that hold the leading `bits` bits of a code."""
    return -(-bits // DIGIT_BITS)


def plane_bytes(in_features: int) -> int:
    """Bytes of a row of one plane."""
    return ops.packed_width(DIGIT_BITS, in_features)


def nested_codes(weight: Tensor, step: Tensor) -> Tensor:
    """Codes of weights, less 128.

    Args:
        weight: (N, K).
        step: Half the distance of two 8-bit levels, (N,).

    Returns:
        int8 (N, K).
    """
    half = 2 ** (CODE_BITS - 1)
    codes = torch.floor(weight / (2.0 * step[:, None])).clamp_(-half, half - 1)
    return codes.to(torch.int8)


def code_levels(codes: Tensor, *, bits: int) -> Tensor:
    """The odd integers that codes stand for at a width, float32 (N, K): -(2^n - 1) .. 2^n - 1."""
    return (2 * (codes >> (CODE_BITS - bits)).int() + 1).float()


class _NestedLevels(torch.autograd.Function):
    """Snap to the levels of a width; the gradient passes inside the range of codes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, bits: int) -> Tensor:  # noqa: ANN401
        half = 2 ** (bits - 1)
        width = 2.0 * step[:, None]
        # Divided as `nested_codes` does; the power of two that follows is exact.
        codes = (weight / width).div_(2 ** (CODE_BITS - bits)).floor_()
        inside = (codes >= -half) & (codes < half)
        ctx.save_for_backward(inside, width)
        ctx.bits = bits
        levels: Tensor = codes.clamp_(-half, half - 1).mul_(2.0).add_(1.0)
        return levels

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        inside, width = ctx.saved_tensors
        distance = width * 2 ** (CODE_BITS - ctx.bits - 1)
        return (gradient * inside).div_(distance), None, None


def nested_levels(weight: Tensor, step: Tensor, *, bits: int) -> Tensor:
    """The levels of a width that weights snap to: `code_levels(nested_codes(weight, step))`.

    Args:
        weight: (N, K).
        step: (N,).
        bits: Leading bits that count.

    Returns:
        float32 (N, K); straight-through gradient inside the range.
    """
    levels: Tensor = _NestedLevels.apply(weight, step, bits)
    return levels


def fit_scale(weight: Tensor, levels: Tensor, moment: Tensor) -> Tensor:
    """Scale of each row with the least error of `scale * levels`, weighted by the input's moment.

    Args:
        weight: (N, K).
        levels: (N, K).
        moment: Second moment of the layer's inputs: (K,), its diagonal, or (K, K).

    Returns:
        (N,), not negative; 0 for a row of zeros.
    """
    weighted = levels * moment if moment.dim() == 1 else levels @ moment
    power = (weighted * levels).sum(dim=1).clamp_min(_TINY)
    scale: Tensor = (weighted * weight).sum(dim=1) / power
    return scale.clamp_min(0.0)


def search_step(
    weight: Tensor, moment: Tensor, widths: Sequence[int], emphasis: Sequence[float]
) -> Tensor:
    """Step of each row that serves all widths: the least weighted sum of logarithms of errors.

    A logarithm, because a width is judged by the share of its own error: 8 bits should not pay ten
    times for what 4 bits gain a tenth by. Errors far below those of 8-bit activations do not count.

    Args:
        weight: (N, K).
        moment: Diagonal of the second moment of the inputs, (K,).
        widths: Bits to serve.
        emphasis: Weight of each of them.

    Returns:
        (N,), positive.
    """
    noise = _ACTIVATION_NOISE * (weight.square() * moment).sum(dim=1)
    largest: Tensor = weight.abs().amax(dim=1).clamp_min(1e-12) / (2**CODE_BITS - 1)
    best = torch.full_like(largest, torch.inf)
    chosen = largest.clone()
    for share in torch.linspace(_SMALLEST_SHARE, 1.0, _CANDIDATES).tolist():
        step = largest * share
        cost = torch.zeros_like(best)
        for bits, factor in zip(widths, emphasis, strict=True):
            levels = nested_levels(weight, step, bits=bits)
            scale = fit_scale(weight, levels, moment)
            error = ((levels * scale[:, None] - weight).square() * moment).sum(dim=1)
            cost += factor * (error + noise).clamp_min(_TINY).log()
        better = cost < best
        best = torch.where(better, cost, best)
        chosen = torch.where(better, step, chosen)
    return chosen


def split_planes(codes: Tensor) -> list[Tensor]:
    """The digits of codes, most significant first: four packed planes, uint8 (N, ceil(K / 4)).

    Args:
        codes: int8 (N, K), less 128.
    """
    whole = codes.view(torch.uint8) ^ 128
    shifts = range(CODE_BITS - DIGIT_BITS, -1, -DIGIT_BITS)
    return [ops.pack_codes((whole >> shift) & 3, DIGIT_BITS) for shift in shifts]


def join_planes(planes: Sequence[Tensor], in_features: int) -> Tensor:
    """Codes from their first planes; the digits that are not there count as zero.

    Args:
        planes: One to four packed planes, most significant first.
        in_features: K.

    Returns:
        int8 (N, K), less 128.
    """
    whole = torch.zeros(len(planes[0]), in_features, dtype=torch.uint8, device=planes[0].device)
    for index, plane in enumerate(planes):
        digit = ops.unpack_codes(plane, DIGIT_BITS, in_features)
        whole |= digit << (CODE_BITS - DIGIT_BITS * (index + 1))
    return (whole ^ 128).view(torch.int8)
