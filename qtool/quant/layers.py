"""Layers that run on the integer engine: packed weights, integer codes, nothing simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from qtool.engine import ops
from qtool.quant import tables

OPERANDS = ("query", "key", "probability", "value")
"""The quantized operands of attention."""


class Geometry(NamedTuple):
    """Where a convolution looks, beside the kernel: pairs of height and width, and groups."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, source: nn.Conv2d) -> Geometry:
        """The geometry of a float convolution with zeros around its input."""
        padding = (0, 0) if source.padding == "valid" else source.padding
        return cls(_pair(source.stride), _pair(padding), _pair(source.dilation), source.groups)


def _pair(size: object) -> tuple[int, int]:
    height, width = cast(tuple[int, int], size)
    return height, width


def quantized(
    x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor | None, *, bits: int
) -> Tensor:
    """Integers that stand for `x`: uniform codes, or the levels of a table."""
    if table is None:
        return ops.quantize_uniform(x, scale, zero_point, bits=bits)
    return ops.quantize_table(x, scale, zero_point, table)


class CodeQuantizer(NamedTuple):
    """Per-tensor quantizers as `ops.linear_quantize` and its like end in them."""

    scale: Tensor
    zero_point: Tensor
    table: Tensor | None
    bits: int


class Feeds(NamedTuple):
    """What alone reads the result of a layer.

    Attributes:
        quantizer: Tells how the reader quantizes its input; asked anew at every call.
        activation: What lies between, "none" or "gelu", after a convolution "relu" or "relu6".
    """

    quantizer: Callable[[], CodeQuantizer]
    activation: str = "none"


class QuantLinear(nn.Module):
    """A linear layer with packed low-bit weights and integer activations: (..., K) to (..., N).

    Buffers (also the names in a checkpoint): `weight_packed` uint8 (N, bytes), `weight_scale`
    (N,), `weight_zero_point` int32 (N,), `weight_shape`, `input_scale` (1,), `input_zero_point`
    int32 (1,), `bias` (N,) or absent, `input_table` uint8 (256,) or absent.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_shape: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    bias: Tensor | None
    input_table: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        weight_bits: int,
        input_bits: int,
        bias: bool,
        table: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.weight_bits = weight_bits
        self.input_bits = input_bits
        self.shape = shape
        self.in_features = int(torch.Size(shape[1:]).numel())
        rows = shape[0]
        width = ops.packed_width(weight_bits, self.in_features)

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.register_buffer("weight_packed", empty(rows, width, dtype=torch.uint8))
        self.register_buffer("weight_scale", empty(rows))
        self.register_buffer("weight_zero_point", empty(rows, dtype=torch.int32))
        self.register_buffer("weight_shape", torch.tensor(shape, device=device))
        self.register_buffer("input_scale", empty(1))
        self.register_buffer("input_zero_point", empty(1, dtype=torch.int32))
        self.register_buffer("bias", empty(rows) if bias else None)
        levels = empty(2**tables.GRID_BITS, dtype=torch.uint8)
        self.register_buffer("input_table", levels if table else None)
        self.feeds: Feeds | None = None

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        *,
        weight_bits: int,
        input_bits: int,
        bias: bool,
        table: bool = False,
        device: torch.device | str = "cpu",
    ) -> QuantLinear:
        """A layer whose buffers wait to be filled."""
        return cls(
            shape,
            weight_bits=weight_bits,
            input_bits=input_bits,
            bias=bias,
            table=table,
            device=device,
        )

    def set_codes(self, codes: Tensor) -> None:
        """Store weight codes (N, K), uint8."""
        self.weight_packed.copy_(ops.pack_codes(codes, self.weight_bits))

    def weight_codes(self) -> Tensor:
        """Weight codes (N, K), uint8."""
        return ops.unpack_codes(self.weight_packed, self.weight_bits, self.in_features)

    def dequantized_weight(self) -> Tensor:
        """Weights (N, K) as the codes and scales stand for."""
        levels = self.weight_codes().int() - self.weight_zero_point[:, None]
        return levels.float() * self.weight_scale[:, None]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Quantize `x` unless it is codes already, multiply integers, apply scales and bias.

        With `feeds` set the result is codes of what reads it; else `residual` is added, if given.
        """
        shared: dict[str, Any] = {
            "x": self.input_codes(x),
            "x_scale": self.input_scale,
            "x_zero": self.input_zero_point,
            "weight": self.weight_packed,
            "weight_scale": self.weight_scale,
            "weight_zero": self.weight_zero_point,
            "bias": self.bias,
            "weight_bits": self.weight_bits,
            "in_features": self.in_features,
        }
        if self.feeds is None:
            return ops.linear(**shared, residual=residual)
        reader = self.feeds.quantizer()
        return ops.linear_quantize(
            **shared,
            activation=self.feeds.activation,
            out_scale=reader.scale,
            out_zero=reader.zero_point,
            out_table=reader.table,
            out_bits=reader.bits,
        )

    def input_codes(self, x: Tensor) -> Tensor:
        """Codes of `x`; what is uint8 is codes already."""
        if x.dtype == torch.uint8:
            return x
        return quantized(
            x, self.input_scale, self.input_zero_point, self.input_table, bits=self.input_bits
        )

    def input_quantizer(self) -> CodeQuantizer:
        """How what comes in is quantized, for whoever hands over codes."""
        return CodeQuantizer(
            self.input_scale, self.input_zero_point, self.input_table, self.input_bits
        )

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{tuple(self.shape)}, w{self.weight_bits}a{self.input_bits}"


class QuantConv2d(QuantLinear):
    """A convolution with packed low-bit weights: (B, C, H, W) to (B, N, H', W').

    Its buffers are those of `QuantLinear`, with K = C / groups * kernel area.
    """

    geometry = Geometry()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Quantize `x` unless it is codes already, convolve integers, apply scales and bias.

        With `feeds` set the result is codes of what reads it.
        """
        if x.device.type == "cpu":  # the layout in which CPUs convolve
            x = x.contiguous(memory_format=torch.channels_last)
        codes = self.input_codes(x)
        if self.geometry.stride == self.shape[2:]:  # patches become rows, and their results stay so
            codes = codes.contiguous(memory_format=torch.channels_last)
        shared: dict[str, Any] = {
            "x": codes,
            "x_scale": self.input_scale,
            "x_zero": self.input_zero_point,
            "weight": self.weight_packed,
            "weight_scale": self.weight_scale,
            "weight_zero": self.weight_zero_point,
            "bias": self.bias,
            "weight_bits": self.weight_bits,
            "kernel": self.shape[2:],
            **self.geometry._asdict(),
        }
        if self.feeds is None:
            return ops.conv2d(**shared)
        reader = self.feeds.quantizer()
        return ops.conv2d_quantize(
            **shared,
            activation=self.feeds.activation,
            out_scale=reader.scale,
            out_zero=reader.zero_point,
            out_table=reader.table,
            out_bits=reader.bits,
        )


class IntegerProducts(nn.Module):
    """The two matrix products of attention on integer codes.

    Args:
        bits: Width of all four operands.
        quantizer: Quantizer of queries, keys and values, "uniform" or "table".
        probabilities: Quantizer after softmax, "log2", "uniform" or "table".
        device: Where the scales live.
    """

    def __init__(
        self,
        *,
        bits: int,
        probabilities: str,
        quantizer: str = "uniform",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.probabilities = probabilities
        for name in OPERANDS:
            self.register_buffer(f"{name}_scale", torch.ones(1, device=device))
            kind = probabilities if name == "probability" else quantizer
            if kind == "table":
                self.register_buffer(f"{name}_table", tables.identity(device))
            if kind != "log2":
                zero = torch.zeros(1, dtype=torch.int32, device=device)
                self.register_buffer(f"{name}_zero_point", zero)

    def parameters_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point of an operand; the scale twice where there is no zero point."""
        scale = cast(Tensor, getattr(self, f"{name}_scale"))
        return scale, cast(Tensor, getattr(self, f"{name}_zero_point", scale))

    def table_of(self, name: str) -> Tensor | None:
        """Table of an operand, uint8 (256,), or None where codes are uniform."""
        return cast("Tensor | None", getattr(self, f"{name}_table", None))

    def operands(self) -> CodeQuantizer:
        """The quantizers of queries, keys and values, in this order."""
        names = OPERANDS[0], OPERANDS[1], OPERANDS[3]
        scales, zeros = zip(*map(self.parameters_of, names), strict=True)
        found = [table for name in names if (table := self.table_of(name)) is not None]
        table = torch.stack(found) if found else None
        return CodeQuantizer(torch.cat(scales), torch.cat(zeros), table, self.bits)

    def _codes(self, name: str, x: Tensor) -> Tensor:
        scale, zero = self.parameters_of(name)
        return quantized(x, scale, zero, self.table_of(name), bits=self.bits)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, N, D) and (B, H, M, D) to (B, H, N, M)."""
        return ops.matmul(
            self._codes("query", query),
            *self.parameters_of("query"),
            self._codes("key", key).transpose(-2, -1),
            *self.parameters_of("key"),
        )

    def values(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, M) and (B, H, M, D) to (B, H, N, D)."""
        scale, zero = self.parameters_of("probability")
        value_codes = self._codes("value", value)
        if self.probabilities != "log2":
            codes = self._codes("probability", probabilities)
            return ops.matmul(codes, scale, zero, value_codes, *self.parameters_of("value"))
        codes = ops.quantize_log2(probabilities, scale, bits=self.bits)
        return ops.matmul_log2(
            codes, scale, value_codes, *self.parameters_of("value"), bits=self.bits
        )

    def extra_repr(self) -> str:
        """Bits and the quantizer after softmax."""
        return f"a{self.bits}, probabilities={self.probabilities}"
