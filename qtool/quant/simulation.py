"""Layers that calibrate: float weights, fake quantization, gradients.

A simulated layer multiplies integer-valued floats and applies its scales in the engine's order, so
that `freeze()` changes where the arithmetic runs and not what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.quant import quantizers, tables
from qtool.quant.layers import IntegerProducts, QuantLinear
from qtool.quant.plan import LayerPlan
from qtool.quant.reparametrisation import fold_into_norm


class SimulatedLayer(nn.Module):
    """What all simulated layers share: a switch, and the inputs seen while observing.

    Attributes:
        enabled: Quantize; otherwise compute in float.
        observing: Remember the operands of the next call.
        drop: Share of activations that stay unrounded while gradients are computed (QDrop).
        generator: Source of randomness for `drop`.
    """

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        self.plan = plan
        self.enabled = False
        self.observing = False
        self.drop = 0.0
        self.generator: torch.Generator | None = None
        self.seen: dict[str, Tensor] = {}

    def observe(self, **operands: Tensor) -> None:
        """Remember operands by name, detached."""
        if self.observing:
            self.seen = {**self.seen, **{name: x.detach() for name, x in operands.items()}}

    def unrounded(self, x: Tensor) -> Tensor | None:
        """Which values of `x` to leave unrounded: none, unless gradients are computed with drop."""
        if not self.drop or not torch.is_grad_enabled():
            return None
        return quantizers.random_mask(x, self.drop, generator=self.generator)

    def calibrate(self) -> None:
        """Choose scales from what was seen, then forget it."""
        raise TypeError(f"{type(self).__name__} has nothing to calibrate")


@contextmanager
def dropping(
    layers: Sequence[SimulatedLayer], share: float, *, seed: int, device: torch.device
) -> Iterator[None]:
    """Leave a share of activations unrounded in training steps inside a `with` block (QDrop)."""
    for layer in layers:
        layer.drop = share
        layer.generator = torch.Generator(device).manual_seed(seed)
    try:
        yield
    finally:
        for layer in layers:
            layer.drop, layer.generator = 0.0, None


class SimulatedLinear(SimulatedLayer):
    """A linear layer with fake quantization.

    Args:
        source: The float layer; its weights are copied, flattened to (N, K).
        plan: Its bits.
    """

    def __init__(self, source: nn.Linear | nn.Conv2d, plan: LayerPlan) -> None:
        super().__init__(plan)
        self.weight_shape = tuple(source.weight.shape)
        weight = source.weight.detach().flatten(1).clone()
        self.weight = nn.Parameter(weight)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone())
        rows = len(weight)
        self.register_buffer("weight_scale", weight.new_ones(rows))
        self.register_buffer("weight_zero_point", weight.new_zeros(rows, dtype=torch.int32))
        self.register_buffer("input_scale", weight.new_ones(1))
        self.register_buffer("input_zero_point", weight.new_zeros(1, dtype=torch.int32))
        table = tables.identity(weight.device) if plan.quantizer == "table" else None
        self.register_buffer("input_table", table)
        self._choose_weight_range()

    integer_kind: type[QuantLinear] = QuantLinear
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_table: Tensor | None

    def weight_levels(self) -> Tensor:
        """Weight codes minus their zero points, (N, K), integer-valued."""
        return quantizers.uniform_levels(
            self.weight,
            self.weight_scale[:, None],
            self.weight_zero_point[:, None],
            bits=self.plan.weight_bits,
        )

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply (..., K) by a weight (N, K)."""
        return F.linear(x, weight)

    def over_channels(self, parameter: Tensor) -> Tensor:
        """Shape a parameter (N,) so that it meets the output channels of `product`."""
        return parameter

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., K) to (..., N)."""
        self.observe(input=x)
        if self.enabled:
            scale, zero, bits = self.input_scale, self.input_zero_point, self.plan.input_bits
            levels = quantizers.activation_levels(
                x, scale, zero, self.input_table, bits=bits, unrounded=self.unrounded(x)
            )
            y = self.product(levels, self.weight_levels())
            y = y * self.over_channels(self.input_scale * self.weight_scale)
        else:
            y = self.product(x, self.weight)
        return y if self.bias is None else y + self.over_channels(self.bias)

    def absorb(self, norm: nn.LayerNorm) -> float:
        """Even the channel ranges of the LayerNorm that feeds this layer, from what was seen.

        Returns:
            The exponent that `reparametrisation.fold_into_norm` took.
        """
        if self.bias is None:
            self.bias = nn.Parameter(self.weight.new_zeros(len(self.weight)))
        exponent = fold_into_norm(
            norm,
            self.weight,
            self.bias,
            self.seen["input"],
            weight_bits=self.plan.weight_bits,
            input_bits=self.plan.input_bits,
        )
        self._choose_weight_range()
        return exponent

    def _choose_weight_range(self) -> None:
        scale, zero = quantizers.search_weight_range(self.weight, bits=self.plan.weight_bits)
        self.weight_scale.copy_(scale)
        self.weight_zero_point.copy_(zero)

    def search_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of uniform codes, by least squared error of the output."""
        return quantizers.search_activation_range(
            x, bits=self.plan.input_bits, weight=self.weight.detach()
        )

    def search_table(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero point and table, by least squared error weighted by what it costs."""
        cost = self.weight.detach().square().sum(dim=0)
        return tables.search_table(x, bits=self.plan.input_bits, channel_weights=cost)

    def calibrate(self) -> None:
        """Choose the input's quantizer from what was seen."""
        x = self.seen["input"]
        if self.input_table is not None:
            scale, zero, table = self.search_table(x)
            self.input_table.copy_(table)
        else:
            scale, zero = self.search_range(x)
        self.input_scale.copy_(scale)
        self.input_zero_point.copy_(zero)
        self.seen = {}

    @torch.no_grad()
    def freeze(self) -> QuantLinear:
        """The integer layer with these weights and scales."""
        codes = (self.weight_levels() + self.weight_zero_point[:, None]).to(torch.uint8)
        layer = self.integer_kind.empty(
            self.weight_shape,
            weight_bits=self.plan.weight_bits,
            input_bits=self.plan.input_bits,
            bias=self.bias is not None,
            table=self.input_table is not None,
            device=self.weight.device,
        )
        layer.set_codes(codes)
        layer.weight_scale.copy_(self.weight_scale)
        layer.weight_zero_point.copy_(self.weight_zero_point)
        layer.input_scale.copy_(self.input_scale)
        layer.input_zero_point.copy_(self.input_zero_point)
        if self.input_table is not None and layer.input_table is not None:
            layer.input_table.copy_(self.input_table)
        if self.bias is not None and layer.bias is not None:
            layer.bias.copy_(self.bias)
        return layer


class SimulatedProducts(SimulatedLayer):
    """The two products of attention with fake quantization of all four operands."""

    def __init__(self, plan: LayerPlan) -> None:
        super().__init__(plan)
        self.frozen = IntegerProducts(
            bits=plan.input_bits, quantizer=plan.quantizer, probabilities=plan.probabilities
        )

    def _levels(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = self.frozen.parameters_of(name)
        bits, unrounded = self.plan.input_bits, self.unrounded(x)
        if name == "probability" and self.plan.probabilities == "log2":
            levels = quantizers.log2_levels(x, scale, bits=bits)
            return levels if unrounded is None else torch.where(unrounded, x / scale, levels), scale
        table = self.frozen.table_of(name)
        levels = quantizers.activation_levels(x, scale, zero, table, bits=bits, unrounded=unrounded)
        return levels, scale

    def _product(self, left: str, a: Tensor, right: str, b: Tensor) -> Tensor:
        (a_levels, a_scale), (b_levels, b_scale) = self._levels(left, a), self._levels(right, b)
        if right == "key":
            b_levels = b_levels.transpose(-2, -1)
        return a_levels @ b_levels * (a_scale * b_scale)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, N, D) and (B, H, M, D) to (B, H, N, M)."""
        self.observe(query=query, key=key)
        if self.enabled:
            return self._product("query", query, "key", key)
        return query @ key.transpose(-2, -1)

    def values(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, M) and (B, H, M, D) to (B, H, N, D)."""
        self.observe(probability=probabilities, value=value)
        if self.enabled:
            return self._product("probability", probabilities, "value", value)
        return probabilities @ value

    def calibrate(self) -> None:
        """Choose the ranges of all four operands by least squared error."""
        bits = self.plan.input_bits
        for name, x in self.seen.items():
            scale, zero = self.frozen.parameters_of(name)
            if name == "probability" and self.plan.probabilities == "log2":
                scale.copy_(quantizers.search_log2_scale(x, bits=bits))
                continue
            table = self.frozen.table_of(name)
            if table is not None:
                fine = tables.search_table(x, bits=bits)
                for target, value in zip((scale, zero, table), fine, strict=True):
                    target.copy_(value)
                continue
            found = quantizers.search_activation_range(x, bits=bits)
            scale.copy_(found[0])
            zero.copy_(found[1])
        self.seen = {}

    def freeze(self) -> IntegerProducts:
        """The integer products with these scales."""
        return self.frozen
