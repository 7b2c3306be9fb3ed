"""Layers that trace to ONNX: QuantizeLinear, then DequantizeLinear, then a product of floats.

They compute what the integer layers compute, in the words that runtimes know and replace by integer
kernels of their own. A code table becomes a Gather between the two, a width of fewer than 8 bits a
Clip before them. Their forward passes only trace; no kernel stands behind them.

Weights are stored so that no runtime overflows: products of uint8 and int8 numbers are added in
pairs of 16 bits on CPUs without VNNI, so int8 serves levels of up to 6 bits and a sign, and what is
wider stays uint8 with a zero point.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.quant.layers import OPERANDS, Geometry, IntegerProducts, QuantConv2d, QuantLinear
from qtool.quant.nested import code_levels
from qtool.quant.nested_layers import NestedConv2d, NestedLinear, NestedProducts
from qtool.quant.plan import replace_module
from qtool.quant.tables import GRID_BITS

_LARGEST_PAIRED = 64
"""255 * 64 * 2 is the largest pair of products below 2^15."""

_INT32 = 6  # onnx.TensorProto.INT32


def _onnx(
    name: str,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    **attributes: int,
) -> Tensor:
    """One ONNX node in the traced graph."""
    return torch.onnx.ops.symbolic(name, inputs, {**attributes}, dtype=dtype, shape=shape)


class OnnxActivation(nn.Module):
    """Quantizes and dequantizes activations of any shape, with one scale and one zero point.

    Args:
        scale: One element.
        zero_point: One element.
        table: Level of every fine code, uint8 (256,), or None where codes are uniform.
        bits: Width of a uniform code.
    """

    scale: Tensor
    zero_point: Tensor
    table: Tensor | None

    def __init__(
        self, scale: Tensor, zero_point: Tensor, table: Tensor | None, *, bits: int
    ) -> None:
        super().__init__()
        self.register_buffer("scale", scale.reshape(()).clone())
        self.register_buffer("zero_point", zero_point.reshape(()).to(torch.uint8))
        self.register_buffer("table", table)
        self.clipped = table is None and bits < GRID_BITS
        lowest = -float(zero_point)
        self.range = (lowest * float(scale), (lowest + 2**bits - 1) * float(scale))

    def forward(self, x: Tensor) -> Tensor:
        """The values that the codes of `x` stand for."""
        if self.clipped:
            # Half a step inside or outside the outermost level, rounding gives the same codes.
            x = x.clamp(*self.range)
        parameters = (self.scale, self.zero_point)
        codes = _onnx("QuantizeLinear", (x, *parameters), dtype=torch.uint8, shape=x.shape)
        if self.table is not None:
            index = _onnx("Cast", (codes,), dtype=torch.int32, shape=x.shape, to=_INT32)
            codes = _onnx("Gather", (self.table, index), dtype=torch.uint8, shape=x.shape, axis=0)
        return _onnx("DequantizeLinear", (codes, *parameters), dtype=torch.float32, shape=x.shape)


class OnnxLog2(nn.Module):
    """Powers of two that stand for probabilities, without a bit operation.

    Args:
        scale: One element.
        bits: Width of a code; the top one stands for zero.
    """

    scale: Tensor
    values: Tensor

    def __init__(self, scale: Tensor, *, bits: int) -> None:
        super().__init__()
        self.top = 2**bits - 1
        values = torch.exp2(-torch.arange(self.top + 1.0)) * scale.reshape(())
        values[-1] = 0.0
        self.register_buffer("scale", scale.reshape(()).clone())
        self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        """The powers of two next to `x`, by ratio."""
        codes = (-torch.log2(x / self.scale)).round().clamp(0, self.top)
        index = _onnx("Cast", (codes,), dtype=torch.int32, shape=x.shape, to=_INT32)
        return _onnx("Gather", (self.values, index), dtype=torch.float32, shape=x.shape, axis=0)


class OnnxWeight(nn.Module):
    """A constant weight, dequantized per channel.

    Args:
        levels: Integers, (N, ...), each -255 to 255.
        scale: Value of a level in each channel, (N,).
        zero_point: Level that the code 0 stands for, negated, (N,): what makes uint8 codes of
            levels too wide for int8.
        axis: Where the channels go: 0, or 1 to transpose the weight for a matrix product.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, levels: Tensor, scale: Tensor, zero_point: Tensor, *, axis: int) -> None:
        super().__init__()
        self.axis = axis
        zero_point, dtype = zero_point.int(), torch.uint8
        if int(levels.abs().max()) <= _LARGEST_PAIRED:
            zero_point, dtype = torch.zeros_like(zero_point), torch.int8
        codes = levels.int() + zero_point.view(-1, *[1] * (levels.dim() - 1))
        self.register_buffer("codes", (codes.T if axis else codes).to(dtype).contiguous())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.to(dtype))

    def forward(self) -> Tensor:
        """The weight, float32."""
        return _onnx(
            "DequantizeLinear",
            (self.codes, self.scale, self.zero_point),
            dtype=torch.float32,
            shape=self.codes.shape,
            axis=self.axis,
        )


class OnnxLinear(nn.Module):
    """A linear layer: (..., K) to (..., N).

    Args:
        activation: Quantizes the input.
        weight: (K, N).
        bias: (N,), or None.
        offset: Added to every weight of a channel, (N,), or None: half a level, where the levels of
            8 bits lie between integers.
    """

    bias: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        activation: OnnxActivation,
        weight: OnnxWeight,
        bias: Tensor | None,
        *,
        offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight = weight
        self.register_buffer("bias", bias)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """Product and bias."""
        x = self.activation(x)
        y: Tensor = x @ self.weight()
        if self.offset is not None:
            y = y + x.sum(dim=-1, keepdim=True) * self.offset
        return y if self.bias is None else y + self.bias


class OnnxConv2d(nn.Module):
    """A convolution: (B, C, H, W) to (B, N, H', W').

    Args:
        activation: Quantizes the input.
        weight: (N, C / groups, kernel height, kernel width).
        bias: (N,), or None.
        geometry: Where it looks.
        offset: As for `OnnxLinear`; without groups.
    """

    bias: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        activation: OnnxActivation,
        weight: OnnxWeight,
        bias: Tensor | None,
        *,
        geometry: Geometry,
        offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight = weight
        self.geometry = geometry
        self.register_buffer("bias", bias)
        self.register_buffer("offset", None if offset is None else offset.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        x, geometry = self.activation(x), self.geometry._asdict()
        y = F.conv2d(x, self.weight(), self.bias, **geometry)
        if self.offset is not None:
            ones = x.new_ones(1, 1, *self.weight.codes.shape[2:])
            y = y + F.conv2d(x.sum(dim=1, keepdim=True), ones, None, **geometry) * self.offset
        return y


class OnnxProduct(nn.Module):
    """One matrix product of attention: (..., N, K) and (..., K, M) to (..., N, M).

    Args:
        left: Quantizes the first factor.
        right: Quantizes the second one.
        transposed: Whether the second factor comes as (..., M, K).
    """

    def __init__(self, left: nn.Module, right: nn.Module, *, transposed: bool = False) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.transposed = transposed

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply."""
        product: Tensor = self.left(left) @ self.right(right.mT if self.transposed else right)
        return product


class OnnxProducts(nn.Module):
    """The two matrix products of attention, `scores` and `values`.

    Args:
        source: The integer products.
    """

    def __init__(self, source: IntegerProducts) -> None:
        super().__init__()
        query, key, probability, value = (_operand(source, name) for name in OPERANDS)
        self.scores = OnnxProduct(query, key, transposed=True)
        self.values = OnnxProduct(probability, value)


def _operand(source: IntegerProducts, name: str) -> nn.Module:
    scale, zero = source.parameters_of(name)
    if name == "probability" and source.probabilities == "log2":
        return OnnxLog2(scale, bits=source.bits)
    return OnnxActivation(scale, zero, source.table_of(name), bits=source.bits)


class Taps:
    """What integer products receive and return in one pass.

    Attributes:
        names: The products, in forward order.
        values: For each of them its inputs and its output: two tensors for layers with weights,
            three for the products of attention.
    """

    # Not a list: tracing takes back what a pass does to the lists and dictionaries of a module.
    def __init__(self) -> None:
        self.names: list[str] = []
        self.values: list[Tensor] = []

    def record(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Take down one product; a forward hook."""
        self.names.append(name)
        # Copies, because an activation that works in place may overwrite what it was given.
        self.values += [value.clone() for value in (*inputs, output)]


class Traced(nn.Module):
    """A model to trace: its outputs are the logits and the values of `taps`.

    Args:
        model: A model of integer layers; switchable ones trace at the width they run at. It is
            copied to the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _traceable(model)
        self.taps = Taps()
        for name, module in self.model.named_modules():
            if isinstance(module, OnnxLinear | OnnxConv2d | OnnxProduct):
                module.register_forward_hook(functools.partial(self.taps.record, name))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) to logits (B, classes) and the taps."""
        self.taps.names.clear()
        self.taps.values.clear()
        logits = self.model(x)
        return (logits, *self.taps.values)


def _traceable(model: nn.Module) -> nn.Module:
    traced = copy.deepcopy(model).cpu().requires_grad_(False).eval()
    for name, module in list(traced.named_modules()):
        if isinstance(module, NestedLinear):
            replace_module(traced, name, _nested(module))
        elif isinstance(module, QuantLinear):
            replace_module(traced, name, _fixed(module))
        elif isinstance(module, NestedProducts):
            replace_module(traced, name, OnnxProducts(module.at(module.width().activation)))
        elif isinstance(module, IntegerProducts):
            replace_module(traced, name, OnnxProducts(module))
    return traced


def _fixed(layer: QuantLinear) -> nn.Module:
    activation = OnnxActivation(
        layer.input_scale, layer.input_zero_point, layer.input_table, bits=layer.input_bits
    )
    zero, scale = layer.weight_zero_point, layer.weight_scale
    levels = layer.weight_codes().int() - zero[:, None]
    if isinstance(layer, QuantConv2d):
        weight = OnnxWeight(levels.view(layer.shape), scale, zero, axis=0)
        return OnnxConv2d(activation, weight, layer.bias, geometry=layer.geometry)
    return OnnxLinear(activation, OnnxWeight(levels, scale, zero, axis=1), layer.bias)


def _nested(layer: NestedLinear) -> nn.Module:
    spec = layer.width()
    row = layer.offer.weight.index(spec.weight)
    column = layer.offer.activation.index(spec.activation)
    narrow = layer.input_table is not None and spec.activation < GRID_BITS
    activation = OnnxActivation(
        layer.input_scale[column],
        layer.input_zero_point[column],
        cast(Tensor, layer.input_table)[column] if narrow else None,
        bits=spec.activation,
    )
    levels = code_levels(layer.codes_of(spec.weight), bits=spec.weight)
    scale, offset = layer.alpha[row], None
    if spec.weight == GRID_BITS:
        # Odd levels -255..255 are 2 q + 1 of whole q -128..127: the 1 is added beside the product.
        levels, scale, offset = (levels - 1) / 2, 2 * scale, scale
    middle = torch.full_like(layer.alpha[row], 2 ** (GRID_BITS - 1))
    bias = layer.bias[row]
    if not isinstance(layer, NestedConv2d):
        weight = OnnxWeight(levels, scale, middle, axis=1)
        return OnnxLinear(activation, weight, bias, offset=offset)
    weight = OnnxWeight(levels.view(layer.shape), scale, middle, axis=0)
    return OnnxConv2d(activation, weight, bias, geometry=layer.geometry, offset=offset)
