"""The grids of a branch: levels of weights and activations, learnt scales, codes for the engine.

Weights of 2 bits have the odd levels -3, -1, 1, 3 times a scale, so that no level is lost to zero.
Wider ones, which only a single set of weights rounded anew for every width has, take the whole
numbers from -2^(b-1). Activations come out of a ReLU and count from zero.

Reference: Esser et al. 2020 (arXiv 1902.08153) for learnt scales; MBQuant (arXiv 2305.08117) for
the grid without a zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.engine import training
from qtool.quant.layers import Geometry

ODD_BITS = 2
"""Weights of so many bits have odd levels."""

# Distance of levels, in standard deviations, with the least squared error on normally distributed
# numbers (Max 1960).
_NORMAL_STEPS = {2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
_SMALLEST_SCALE = 1e-8
_CANDIDATES = 40
_SAMPLE = 32_768


class Member(NamedTuple):
    """A branch at one of the widths that it serves.

    Attributes:
        width: Bits of activations.
        weight_bits: Bits of its weights.
        narrow: Whether it runs as a slice of its first channels.
    """

    width: int
    weight_bits: int
    narrow: bool = False


@dataclass(frozen=True)
class UnitPlan:
    """A convolution of a branch, in all forms that it runs in.

    Attributes:
        shape: Shape of the whole weight (N, C, kernel H, kernel W).
        geometry: Stride, padding and dilation.
        narrow: Channels that the slice reads and writes.
        members: The widths at which the branch runs, rising.
    """

    shape: tuple[int, int, int, int]
    geometry: Geometry
    narrow: tuple[int, int]
    members: tuple[Member, ...]

    def channels(self, member: Member) -> tuple[int, int]:
        """Channels read and written."""
        return self.narrow if member.narrow else (self.shape[1], self.shape[0])

    def index(self, width: int) -> int:
        """Where a width stands among the members.

        Raises:
            KeyError: The branch does not serve it.
        """
        for index, member in enumerate(self.members):
            if member.width == width:
                return index
        raise KeyError(width)

    @property
    def weight_bits(self) -> list[int]:
        """The different bits of weights, rising."""
        return sorted({member.weight_bits for member in self.members})


class _Snap(torch.autograd.Function):
    """Snap to whole or to odd numbers; the gradient passes between the outermost levels."""

    @staticmethod
    def forward(ctx: Any, ratio: Tensor, low: int, high: int, odd: bool) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward((ratio >= low) & (ratio <= high))
        inside = ratio.clamp(low, high)
        if odd:
            return inside.sub_(1).div_(2).round_().mul_(2).add_(1)
        return inside.round_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (passing,) = ctx.saved_tensors
        return gradient * passing, None, None, None


def weight_levels(weight: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Levels of weights, as whole numbers in float32.

    Args:
        weight: (N, ...).
        scale: What a level is worth, (N,).
        bits: Bits of a weight.

    Returns:
        `weight` over its scale, snapped; the gradient passes straight through to both.
    """
    ratio = weight / scale.view(-1, *[1] * (weight.ndim - 1))
    odd = bits == ODD_BITS
    low, high = (-3, 3) if odd else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    levels: Tensor = _Snap.apply(ratio, low, high, odd)
    return levels


def activation_levels(x: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Levels of activations from 0 to 2^bits - 1, as whole numbers in float32.

    What is below zero becomes zero, as in a ReLU, and gets no gradient.

    Args:
        x: Of any shape.
        scale: What a level is worth, ().
        bits: Bits of an activation.
    """
    return training.count_levels(x, scale, 2**bits - 1)


def weight_codes(weight: Tensor, scale: Tensor, *, bits: int) -> Tensor:
    """Codes 0 to 2^bits - 1 of weights, uint8 (N, K)."""
    levels = weight_levels(weight.detach(), scale.detach(), bits=bits).flatten(1)
    codes = (levels + 3) / 2 if bits == ODD_BITS else levels + 2 ** (bits - 1)
    return codes.to(torch.uint8)


class EngineWeight(NamedTuple):
    """Weights in the words of `qtool.engine.ops`.

    Attributes:
        codes: int8 (N, K), less half their range.
        bits: Width of a code there; odd levels need one bit more than they have values.
        zero: The code that stands for zero.
    """

    codes: Tensor
    bits: int
    zero: int


def engine_weight(codes: Tensor, *, bits: int) -> EngineWeight:
    """What the engine multiplies for codes of `weight_codes`."""
    if bits == ODD_BITS:
        # Level 2 c - 3 is code 2 c less zero point 3, of 3 bits: 4 less is what lies in memory.
        return EngineWeight((2 * codes.to(torch.int16) - 4).to(torch.int8), bits + 1, 3)
    half = 2 ** (bits - 1)
    return EngineWeight((codes.to(torch.int16) - half).to(torch.int8), bits, half)


def initial_weight_scale(weight: Tensor, *, bits: int) -> Tensor:
    """Scales (N,) to start from: the best ones if each row were normally distributed."""
    step = _NORMAL_STEPS[bits] * weight.detach().flatten(1).std(dim=1)
    return (step / 2 if bits == ODD_BITS else step).clamp_min(_SMALLEST_SCALE)


@torch.no_grad()
def search_activation_scale(x: Tensor, *, bits: int) -> Tensor:
    """The scale with the least squared error on a sample of activations, ().

    What is below zero becomes zero at every scale, so it does not count.
    """
    values = x.detach().flatten()
    values = values[:: max(1, values.numel() // _SAMPLE)]
    top = values.max().clamp_min(_SMALLEST_SCALE)
    shares = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES, device=x.device)
    scales = top * shares / (2**bits - 1)
    errors = torch.stack([_error(values, scale, bits) for scale in scales])
    best: Tensor = scales[errors.argmin()]
    return best


def _error(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (activation_levels(values, scale, bits=bits) * scale - values).square().sum()


def dithered(weight: Tensor, scale: Tensor, *, generator: torch.Generator) -> Tensor:
    """Weights moved up or down by an eighth of the distance of two levels, by chance.

    Branches that start from the same weights, and always serve the same widths, would get the same
    gradients and stay equal for ever.

    Args:
        weight: (N, ...).
        scale: (N,), of odd levels.
        generator: Source of the signs, on the CPU.
    """
    signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
    step = 2 * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight + signs * step / 8
