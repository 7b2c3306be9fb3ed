"""Rounding weights to nested codes with the error of each one made up for by those still to come.

The codes of one width are chosen first, column after column, each error spread over the columns not
yet rounded in the way that changes the layer's outputs least. Every further bit then chooses
between the two halves of the interval already chosen, with the same compensation: wider codes are
as free as their prefix leaves them, and together they still have many ways to restore the output.

Reference: the compensation is that of GPTQ (arXiv 2210.17323); choosing for several widths at once
is the idea of MatGPTQ (arXiv 2602.03537), done here from the coarse width to the fine ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.quant.nested import CODE_BITS

_DAMPING = 0.2
"""Share of the mean moment added to its diagonal: much more than GPTQ's 0.01, since a weight moved
far from its own 4-bit interval to serve 4 bits cannot be had back at 8."""

_BLOCK = 64


def round_nested(
    weight: Tensor, scales: Mapping[int, Tensor], moment: Tensor, *, first: int
) -> Tensor:
    """Choose codes whose leading bits are good at every width.

    Args:
        weight: (N, K).
        scales: For the first width and every width above it, to 8 or as far as codes matter, the
            scale of each row (N,).
        moment: Second moment of the layer's inputs, (K, K).
        first: The width that chooses freely.

    Returns:
        int8 (N, K), less 128.
    """
    spread = _spread(moment)
    codes: Tensor = torch.zeros_like(weight)
    for bits in range(first, max(scales) + 1):
        low, high = (2.0 * codes, 2.0 * codes + 1.0)
        if bits == first:
            low, high = torch.zeros_like(codes), torch.full_like(codes, 2**bits - 1)
        codes = _compensated(weight, scales[bits], spread, low, high, bits=bits)
    centred: Tensor = codes * 2 ** (CODE_BITS - max(scales)) - 128
    return centred.to(torch.int8)


def _spread(moment: Tensor) -> Tensor:
    """How an error in one column is best spread over later ones: Cholesky factor of the inverse."""
    damped = moment.double().clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(moment.dtype)


def _compensated(
    weight: Tensor, scale: Tensor, spread: Tensor, low: Tensor, high: Tensor, *, bits: int
) -> Tensor:
    """Codes (N, K) of one width, each between its bounds."""
    left = weight.clone()
    codes = torch.empty_like(weight)
    step, offset = 2.0 * scale.clamp_min(1e-20), 2 ** (bits - 1)
    columns = weight.shape[1]
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty_like(left[:, start:stop])
        for k in range(start, stop):
            code = (left[:, k] / step).floor_().add_(offset)
            code = code.clamp(min=low[:, k], max=high[:, k])
            value = (2.0 * code - (2**bits - 1)) * scale
            error = (left[:, k] - value) / spread[k, k]
            left[:, k:stop] -= error[:, None] * spread[k, k:stop]
            codes[:, k], errors[:, k - start] = code, error
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return codes
