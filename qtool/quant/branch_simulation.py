"""A convolution of a branch in training: float weights, learnt scales, a BatchNorm per width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.quant.branch_grid import (
    UnitPlan,
    activation_levels,
    initial_weight_scale,
    search_activation_scale,
    weight_codes,
    weight_levels,
)
from qtool.quant.branch_layers import IntegerUnit
from qtool.quant.layers import Geometry

_MOMENTUM = 0.1


class Held(NamedTuple):
    """What the widths of one training step share, by bits of weights and by member.

    Attributes:
        weight_levels: Levels (N, C, kernel H, kernel W).
        weight_scales: What a level is worth, (N,).
        input_scales: What a level of activations is worth, ().
    """

    weight_levels: dict[int, Tensor]
    weight_scales: dict[int, Tensor]
    input_scales: Sequence[Tensor]


class SimulatedUnit(nn.Module):
    """Convolution and BatchNorm of one branch: (B, C, H, W) and a width to (B, N, H', W').

    Weight scales belong to the branch and not to the width, so that its codes are the same at every
    width that selects it. Scales are learnt as logarithms, which keeps them positive.

    In evaluation mode scales and BatchNorm are applied in the engine's order, so that
    `freeze()` changes where the arithmetic runs and not what comes out.

    Args:
        plan: Shape, geometry and widths.
        weight: Float weights to start from.
        norm: The BatchNorm behind them, copied for every width.

    Attributes:
        observing: Choose the scale of activations anew from the next input, at its width.
        held: What `branch_sharing` computed for all units at once, None outside of a training step.
    """

    def __init__(self, plan: UnitPlan, weight: Tensor, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.plan = plan
        self.observing = False
        self.held: Held | None = None
        self.weight = nn.Parameter(weight.detach().clone())
        scales = [initial_weight_scale(weight, bits=bits) for bits in plan.weight_bits]
        self.log_weight_scale = nn.Parameter(torch.stack(scales).log())
        self.log_input_scale = nn.Parameter(weight.new_zeros(len(plan.members)))
        self.norms = nn.ModuleDict(
            {str(member.width): _leading(norm, plan.channels(member)[1]) for member in plan.members}
        )

    def weight_scale(self, bits: int) -> Tensor:
        """What a level is worth at a width of weights, (N,)."""
        if self.held is not None:
            return self.held.weight_scales[bits]
        return self.log_weight_scale[self.plan.weight_bits.index(bits)].exp()

    def weight_levels(self, bits: int) -> Tensor:
        """Levels at a width of weights, in the shape of the weight."""
        if self.held is not None:
            return self.held.weight_levels[bits]
        return weight_levels(self.weight, self.weight_scale(bits), bits=bits)

    def input_scale(self, width: int) -> Tensor:
        """What a level of activations is worth at a width, ()."""
        if self.held is not None:
            return self.held.input_scales[self.plan.index(width)]
        return self.log_input_scale[self.plan.index(width)].exp()

    def folded(self, width: int) -> tuple[Tensor, Tensor]:
        """Scale of rows and bias at a width, weight scale and BatchNorm in one, (N,) each."""
        member = self.plan.members[self.plan.index(width)]
        norm = self.norm(width)
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("the BatchNorm keeps no statistics to fold")
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        rows = self.plan.channels(member)[1]
        scale = self.weight_scale(member.weight_bits)[:rows]
        return scale * gain, norm.bias - norm.running_mean * gain

    def norm(self, width: int) -> nn.BatchNorm2d:
        """The BatchNorm of a width."""
        found = self.norms[str(width)]
        if not isinstance(found, nn.BatchNorm2d):
            raise TypeError(f"{type(found).__name__} is no BatchNorm")
        return found

    def forward(self, x: Tensor, width: int) -> Tensor:
        """Quantize, convolve levels, scale and normalise."""
        index = self.plan.index(width)
        member = self.plan.members[index]
        inputs, outputs = self.plan.channels(member)
        if self.observing:
            scale = search_activation_scale(x, bits=width)
            with torch.no_grad():
                self.log_input_scale[index] = scale.log()
        step = self.input_scale(width)
        sums = _convolved(
            activation_levels(x, step, bits=width),
            self.weight_levels(member.weight_bits)[:outputs, :inputs],
            self.plan.geometry,
        )
        if self.training:
            # The BatchNorm takes a factor of a row out again, so none learns from here.
            scale = self.weight_scale(member.weight_bits)[:outputs]
            return _normalised(sums * (step * scale).detach().view(-1, 1, 1), self.norm(width))
        gain, bias = self.folded(width)
        return sums * (step * gain).view(-1, 1, 1) + bias.view(-1, 1, 1)

    @torch.no_grad()
    def freeze(self, weight_bits: int) -> IntegerUnit:
        """The integer unit of all widths that have weights of so many bits."""
        members = tuple(m for m in self.plan.members if m.weight_bits == weight_bits)
        plan = UnitPlan(self.plan.shape, self.plan.geometry, self.plan.narrow, members)
        unit = IntegerUnit(plan, device=self.weight.device)
        unit.set_codes(weight_codes(self.weight, self.weight_scale(weight_bits), bits=weight_bits))
        for member in members:
            gain, bias = self.folded(member.width)
            unit.set_scales(member.width, gain, bias, self.input_scale(member.width))
        return unit


def _convolved(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """A convolution. Where a kernel of one pixel skips pixels, they are left out beforehand.

    The gradient of such a kernel with fewer than eight input channels writes beside its memory in
    oneDNN on CPUs with AVX2 alone (seen with PyTorch 2.14).
    """
    if weight.shape[2:] == (1, 1) and geometry.padding == (0, 0):
        down, across = geometry.stride
        x, geometry = x[:, :, ::down, ::across], geometry._replace(stride=(1, 1))
    return F.conv2d(x, weight, None, **geometry._asdict())


def _normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """A BatchNorm in training, without the count of batches that it keeps and nobody reads."""
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=True,
        momentum=norm.momentum or _MOMENTUM,
        eps=norm.eps,
    )


def _leading(norm: nn.BatchNorm2d, channels: int) -> nn.BatchNorm2d:
    """A copy of a BatchNorm for its first channels."""
    copy = nn.BatchNorm2d(channels, eps=norm.eps, momentum=norm.momentum).to(norm.weight.device)
    state = {
        name: tensor[:channels] if tensor.ndim else tensor
        for name, tensor in norm.state_dict().items()
    }
    copy.load_state_dict(state)
    return copy.train(norm.training)
