"""Nested layers that calibrate: float weights that snap to the levels of the width at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.quant import nested, nested_rounding, quantizers, tables
from qtool.quant.bits import BitSpec
from qtool.quant.layers import Geometry
from qtool.quant.nested_layers import (
    NestedConv2d,
    NestedLinear,
    NestedProducts,
    table_rows,
    windows,
)
from qtool.quant.plan import LayerPlan, Quantizer, products_quantizers
from qtool.quant.simulation import SimulatedLayer, SimulatedProducts
from qtool.quant.widths import DEDICATED_BITS, Offer, SwitchableLayer

_WINDOW_VALUES = 2**25
"""Most values of windows that are laid out at once: 128 MiB."""

_MOST_ROWS = 32_768
"""Most places of pictures that codes and ranges are chosen by."""


class SimulatedNested(SwitchableLayer, SimulatedLayer):
    """A linear layer, or a convolution without groups, with one weight for all widths.

    Parameters are the weight and, per width, the bias and `gain`, the logarithm of a correction to
    the scales `alpha`. The step of the codes is chosen once, from the weight and the second moment
    of the layer's inputs. Where 2 bits have codes of their own, `low_weight` snaps to them.

    Args:
        source: The float layer; its weights are copied.
        plan: Its kind, and the width it runs at.
        name: Its path in the model.
        offer: The widths it is to have.
        table: Whether activations below 8 bits are quantized by table.
        pinned: Whether only a glob that names it changes its width.
    """

    step: Tensor
    low_weight: nn.Parameter | None
    low_step: Tensor | None
    alpha: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_table: Tensor | None

    def __init__(
        self,
        source: nn.Linear | nn.Conv2d,
        plan: LayerPlan,
        *,
        name: str,
        offer: Offer,
        table: bool,
        pinned: bool = False,
    ) -> None:
        super().__init__(plan)
        self.name, self.offer, self.pinned = name, offer, pinned
        self.active = BitSpec(plan.weight_bits, plan.input_bits)
        self.weight_shape = tuple(source.weight.shape)
        self.geometry = Geometry.of(source) if isinstance(source, nn.Conv2d) else None
        weight = source.weight.detach().flatten(1).clone()
        rows = len(weight)
        bias = weight.new_zeros(rows) if source.bias is None else source.bias.detach()
        self.weight = nn.Parameter(weight)
        self.float_bias = bias.clone()
        self.bias = nn.Parameter(bias.repeat(len(offer.weight), 1))
        self.gain = nn.Parameter(weight.new_zeros(len(offer.weight), rows))
        self.register_buffer("alpha", weight.new_ones(len(offer.weight), rows))
        self.register_buffer("step", weight.new_ones(rows))
        low = offer.dedicated
        self.register_parameter("low_weight", nn.Parameter(weight.clone()) if low else None)
        self.register_buffer("low_step", weight.new_ones(rows) if low else None)
        self.register_buffer("input_scale", weight.new_ones(len(offer.activation)))
        zeros = weight.new_zeros(len(offer.activation), dtype=torch.int32)
        self.register_buffer("input_zero_point", zeros)
        levels = tables.identity(weight.device).repeat(table_rows(offer.activation), 1)
        self.register_buffer("input_table", levels if table else None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., K) to (..., N), or (B, C, H, W) to (B, N, H', W')."""
        self.observe(input=x)
        if self.enabled:
            return self._quantized(x)
        return self._product(x, self.weight) + self._over_channels(self.float_bias)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.geometry is None:
            return F.linear(x, weight)
        return F.conv2d(x, weight.view(self.weight_shape), None, **self.geometry._asdict())

    def _over_channels(self, parameter: Tensor) -> Tensor:
        return parameter if self.geometry is None else parameter.view(-1, 1, 1)

    def _quantized(self, x: Tensor) -> Tensor:
        spec = self.width()
        row = self.offer.weight.index(spec.weight)
        column = self.offer.activation.index(spec.activation)
        scale = self.input_scale[column : column + 1]
        zero = self.input_zero_point[column : column + 1]
        narrow = self.input_table is not None and spec.activation < tables.GRID_BITS
        table = cast(Tensor, self.input_table)[column] if narrow else None
        levels = quantizers.activation_levels(
            x, scale, zero, table, bits=spec.activation, unrounded=self.unrounded(x)
        )
        weights = self._levels(spec.weight)
        scales = self._over_channels(scale * self.scales()[row])
        return self._product(levels, weights) * scales + self._over_channels(self.bias[row])

    def scales(self) -> Tensor:
        """Scales of all widths, (widths, N)."""
        return self.alpha * self.gain.exp()

    @torch.no_grad()
    def code_weights(self, emphasis: Mapping[int, float], *, first: int | None) -> None:
        """Choose step, codes, and the scales and biases of all widths, for the inputs seen.

        The bias of a width makes up for what its rounding takes from the mean output.

        Args:
            emphasis: Weight of each width in the choice of the step; of 2 bits too where they have
                codes of their own, for the narrow range they ask for serves 3 and 4 bits as well.
            first: The width whose codes are chosen freely, see `nested_rounding`; None rounds to
                nearest.
        """
        x = self._rows()
        moment = x.T @ x / len(x)
        floor = 1e-6 * float(moment.diagonal().mean())
        moment.diagonal().clamp_min_(floor)
        target = self.weight.detach().clone()
        self._code(self.weight, self.step, moment, emphasis, first, nested.CODE_BITS)
        if self.low_weight is not None and self.low_step is not None:
            self.low_weight.copy_(target)
            own = None if first is None else DEDICATED_BITS
            self._code(
                self.low_weight, self.low_step, moment, {DEDICATED_BITS: 1.0}, own, DEDICATED_BITS
            )
        mean = x.mean(dim=0)
        for row, bits in enumerate(self.offer.weight):
            levels = self._levels(bits)
            self.alpha[row] = nested.fit_scale(target, levels, moment)
            lost = target - levels * self.alpha[row][:, None]
            self.bias[row] = self.float_bias + F.linear(mean, lost)
        self.gain.zero_()

    @staticmethod
    def _code(
        weight: Tensor,
        step: Tensor,
        moment: Tensor,
        served: Mapping[int, float],
        first: int | None,
        last: int,
    ) -> None:
        """Choose the step of some codes and move their weight, both in place.

        Args:
            weight: (N, K).
            step: (N,).
            moment: Second moment of the layer's inputs, (K, K).
            served: The widths that the codes are for, with their weights.
            first: The width whose codes are chosen freely, or None.
            last: The widest one.
        """
        diagonal = moment.diagonal().clone()
        step.copy_(nested.search_step(weight, diagonal, list(served), list(served.values())))
        if first is None:
            return
        scales = {
            bits: nested.fit_scale(weight, nested.nested_levels(weight, step, bits=bits), diagonal)
            for bits in range(first, last + 1)
        }
        codes = nested_rounding.round_nested(weight, scales, moment, first=first)
        # The middle of the code's interval, so that it is what the weight snaps to.
        middle = 2.0 ** (nested.CODE_BITS - last) / 2.0
        weight.copy_((codes.float() + middle) * 2.0 * step[:, None])

    def _rows(self) -> Tensor:
        """Inputs seen, as rows (M, K); of many places that a kernel sees, some."""
        x = self.seen["input"]
        if self.geometry is None:
            return x.flatten(0, -2)
        height, width = self.weight_shape[2:]
        places = x.shape[2] * x.shape[3] // math.prod(self.geometry.stride)
        most = max(1, _WINDOW_VALUES // (places * self.weight.shape[1]))
        chosen = x[:: -(-len(x) // most)]
        rows = windows(chosen, (height, width), self.geometry, x.new_zeros(1)).flatten(0, 2)
        return rows[:: -(-len(rows) // _MOST_ROWS)]

    def _levels(self, bits: int) -> Tensor:
        weight, step = self.weight, self.step
        own = self.offer.has_own_codes(bits)
        if own and self.low_weight is not None and self.low_step is not None:
            weight, step = self.low_weight, self.low_step
        return nested.nested_levels(weight, step, bits=bits)

    @torch.no_grad()
    def choose_input(self, bits: int) -> None:
        """Choose the quantizer of activations of one width from the inputs seen."""
        column = self.offer.activation.index(bits)
        if self.input_table is not None and bits < tables.GRID_BITS:
            x, cost = self.seen["input"], self.weight.square().sum(dim=0)
            if self.geometry is not None:  # channels last, so that a row is a place
                x = x.movedim(1, -1)
                cost = cost.view(self.weight_shape[1:]).sum(dim=(1, 2))
            scale, zero, table = tables.search_table(x, bits=bits, channel_weights=cost)
            self.input_table[column] = table
        else:
            x = self._rows()
            scale, zero = quantizers.search_activation_range(x, bits=bits, weight=self.weight)
        self.input_scale[column], self.input_zero_point[column] = scale[0], zero[0]

    @torch.no_grad()
    def freeze(self) -> NestedLinear:
        """The integer layer with these codes and scales."""
        kind = NestedLinear if self.geometry is None else NestedConv2d
        layer = kind(
            self.weight_shape,
            name=self.name,
            offer=self.offer,
            active=self.active,
            table=self.input_table is not None,
            pinned=self.pinned,
            device=self.weight.device,
        )
        if isinstance(layer, NestedConv2d) and self.geometry is not None:
            layer.geometry = self.geometry
        layer.codes.copy_(nested.nested_codes(self.weight, self.step))
        if self.low_weight is not None and self.low_step is not None:
            whole = nested.nested_codes(self.low_weight, self.low_step)
            layer.low_codes = whole & -(2 ** (nested.CODE_BITS - DEDICATED_BITS))
        layer.alpha.copy_(self.scales())
        for name in ("bias", "input_scale", "input_zero_point"):
            getattr(layer, name).copy_(getattr(self, name))
        if self.input_table is not None and layer.input_table is not None:
            layer.input_table.copy_(self.input_table)
        return layer


class SimulatedNestedProducts(SwitchableLayer, SimulatedLayer):
    """The two products of attention, simulated at each width of activations.

    Args:
        plan: The width they run at.
        name: The path of the attention in its model.
        offer: The widths they are to have.
        quantizer: Quantizer of activations below 8 bits.
    """

    def __init__(self, plan: LayerPlan, *, name: str, offer: Offer, quantizer: Quantizer) -> None:
        super().__init__(plan)
        self.name, self.offer, self.pinned, self.quantizer = name, offer, False, quantizer
        self.active = BitSpec(max(offer.activation), plan.input_bits)
        for bits in offer.activation:
            operands, probabilities = products_quantizers(bits, quantizer)
            single = LayerPlan("attention", 0, bits, operands, probabilities)
            self.add_module(f"a{bits}", SimulatedProducts(single))

    def at(self, bits: int) -> SimulatedProducts:
        """The products at one width."""
        return cast(SimulatedProducts, self.get_submodule(f"a{bits}"))

    def _current(self) -> SimulatedProducts:
        products = self.at(self.width().activation)
        products.enabled, products.drop = self.enabled, self.drop
        products.generator = self.generator
        return products

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, N, D) and (B, H, M, D) to (B, H, N, M)."""
        self.observe(query=query, key=key)
        return self._current().scores(query, key)

    def values(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, M) and (B, H, M, D) to (B, H, N, D)."""
        self.observe(probability=probabilities, value=value)
        return self._current().values(probabilities, value)

    def choose_input(self, bits: int) -> None:
        """Choose the ranges of one width from the operands seen."""
        products = self.at(bits)
        products.seen = self.seen
        products.calibrate()
        frozen = products.frozen
        if frozen.probabilities == "uniform":
            # A large probability that is cut off costs more than least squares over all of them
            # lets on: its whole row of the output follows one value.
            largest = self.seen["probability"].max().view(1)
            found = quantizers.uniform_parameters(largest * 0.0, largest, bits=bits)
            for target, value in zip(frozen.parameters_of("probability"), found, strict=True):
                target.copy_(value)

    def freeze(self) -> NestedProducts:
        """The integer products with these scales."""
        layer = NestedProducts(
            name=self.name,
            offer=self.offer,
            active=self.active,
            quantizer=self.quantizer,
            device=next(self.buffers()).device,
        )
        for bits in self.offer.activation:
            layer.add_module(f"a{bits}", self.at(bits).freeze())
        return layer
