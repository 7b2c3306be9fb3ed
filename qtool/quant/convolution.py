"""Convolutions that calibrate, and BatchNorm folded into them.

In evaluation mode a BatchNorm after a convolution is a scale and shift of each channel. Folded into
weights and bias it costs nothing, and the integer layer has one rounding less.

Reference: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.quant import quantizers, tables
from qtool.quant.layers import Geometry, QuantConv2d, QuantLinear
from qtool.quant.plan import LayerPlan, replace_module
from qtool.quant.simulation import SimulatedLinear

_WINDOW_IMAGES = 8
_WINDOW_VALUES = 2**26
"""Most values of windows that ranges are chosen by: 256 MiB."""


class SimulatedConv2d(SimulatedLinear):
    """A convolution with fake quantization: (B, C, H, W) to (B, N, H', W').

    Args:
        source: The float layer; its weights are copied.
        plan: Its bits.
    """

    integer_kind = QuantConv2d

    def __init__(self, source: nn.Conv2d, plan: LayerPlan) -> None:
        super().__init__(source, plan)
        self.geometry = Geometry.of(source)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve (B, C, H, W) with a weight (N, K)."""
        return F.conv2d(x, weight.view(self.weight_shape), None, **self.geometry._asdict())

    def over_channels(self, parameter: Tensor) -> Tensor:
        """Shape a parameter (N,) as (N, 1, 1)."""
        return parameter.view(-1, 1, 1)

    def channel_costs(self) -> Tensor:
        """What a squared error in each input channel costs, (C,)."""
        groups = self.geometry.groups
        weight = self.weight.detach().view(self.weight_shape).square()
        costs: Tensor = weight.unflatten(0, (groups, -1)).sum(dim=(1, 3, 4)).flatten()
        return costs

    def search_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point by the error of the output; that of the input where groups part."""
        bits = self.plan.input_bits
        if self.geometry.groups == 1:
            windows = self._windows(x[:: len(x) // _WINDOW_IMAGES + 1])
            weight = self.weight.detach()
            return quantizers.search_activation_range(windows.mT, bits=bits, weight=weight)
        costs = self.channel_costs().sqrt().diag()
        return quantizers.search_activation_range(_pixels(x), bits=bits, weight=costs)

    def _windows(self, x: Tensor) -> Tensor:
        """What the kernel sees, (B, K, places); of large pictures, fewer of them and their top."""
        (height, width), geometry = self.weight_shape[2:], self.geometry
        channels = x.shape[1] * height * width
        row = channels * x.shape[3] // math.prod(geometry.stride)  # values of windows per row
        images = max(1, min(len(x), _WINDOW_VALUES // (row * x.shape[2])))
        rows = max(geometry.dilation[0] * height, _WINDOW_VALUES // row)
        return F.unfold(
            x[:: -(-len(x) // images), :, :rows],
            self.weight_shape[2:],
            dilation=self.geometry.dilation,
            padding=self.geometry.padding,
            stride=self.geometry.stride,
        )

    def search_table(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and table, by least squared error weighted by what it costs."""
        costs = self.channel_costs()
        return tables.search_table(_pixels(x), bits=self.plan.input_bits, channel_weights=costs)

    @torch.no_grad()
    def freeze(self) -> QuantLinear:
        """The integer layer with these weights, scales and geometry."""
        layer = super().freeze()
        if isinstance(layer, QuantConv2d):
            layer.geometry = self.geometry
        return layer


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) with the channels last, so that a row is a place."""
    return x.movedim(1, -1)


def without_norm(norm: nn.Module) -> nn.Module:
    """What remains of a BatchNorm whose scale and shift went elsewhere: its activation, if any.

    Raises:
        ValueError: The module is no BatchNorm over pictures.
    """
    if not isinstance(norm, nn.BatchNorm2d):
        raise ValueError(f"{type(norm).__name__} is no BatchNorm that could have been folded")
    rest = getattr(norm, "act", None)
    return rest if isinstance(rest, nn.Module) else nn.Identity()


@torch.no_grad()
def fold_norms(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> nn.Module:
    """Fold BatchNorms into the convolutions before them, in place; the function stays the same.

    Args:
        model: A model in evaluation mode.
        pairs: Names of a convolution and of the BatchNorm that alone reads its output.

    Returns:
        The same model, each BatchNorm replaced by the activation it carried.
    """
    for convolution_name, norm_name in pairs:
        convolution, norm = model.get_submodule(convolution_name), model.get_submodule(norm_name)
        if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"{convolution_name} and {norm_name} are no convolution and BatchNorm")
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"{norm_name} keeps no statistics to fold")
        gain = (norm.running_var + norm.eps).rsqrt()
        if norm.affine:
            gain = gain * norm.weight
        shift = -norm.running_mean * gain
        if norm.affine:
            shift = shift + norm.bias
        if convolution.bias is not None:
            shift = shift + convolution.bias * gain
        convolution.weight = nn.Parameter(
            convolution.weight * gain.view(-1, 1, 1, 1), requires_grad=False
        )
        convolution.bias = nn.Parameter(shift, requires_grad=False)
        replace_module(model, norm_name, without_norm(norm))
    return model
