"""Layers that run on the integer engine at any of several widths, chosen anew at every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from qtool.engine import ops
from qtool.quant import nested, tables
from qtool.quant.bits import BitSpec
from qtool.quant.layers import CodeQuantizer, Geometry, IntegerProducts, quantized
from qtool.quant.plan import Quantizer, products_quantizers
from qtool.quant.widths import Offer, SwitchableLayer


def windows(
    pictures: Tensor, kernel: tuple[int, ...], geometry: Geometry, around: Tensor
) -> Tensor:
    """What the kernel of a convolution sees, as rows: (B, C, H, W) to (B, H', W', K).

    Args:
        pictures: (B, C, H, W), of any type.
        kernel: Height and width.
        geometry: Where the kernel looks; without groups.
        around: What lies around the pictures, one element.
    """
    (above, beside), (down, across) = geometry.padding, geometry.dilation
    if above or beside:
        batch, channels, height, width = pictures.shape
        wide = (batch, channels, height + 2 * above, width + 2 * beside)
        padded = around.to(pictures.dtype).expand(wide).clone()
        padded[:, :, above : above + height, beside : beside + width] = pictures
        pictures = padded
    rows = pictures.unfold(2, (kernel[0] - 1) * down + 1, geometry.stride[0])
    seen = rows.unfold(3, (kernel[1] - 1) * across + 1, geometry.stride[1])
    return seen[..., ::down, ::across].permute(0, 2, 3, 1, 4, 5).flatten(3)


class NestedLinear(SwitchableLayer, nn.Module):
    """A linear layer with nested weight codes and integer activations: (..., K) to (..., N).

    Buffers: `codes` int8 (N, K), resident at all widths; `low_codes`, the same for 2 bits alone
    where they have codes of their own, or absent; per weight width `alpha` and `bias`,
    (widths, N); per activation width `input_scale` (widths,) and `input_zero_point` int32
    (widths,), and `input_table` uint8 (widths below 8 bits, 256) or absent.

    Args:
        shape: Shape of the float weight.
        name: The layer's path in its model.
        offer: The widths it has.
        active: The width it runs at.
        table: Whether activations below 8 bits are quantized by table.
        pinned: Whether only a glob that names it changes its width.
        device: Where the buffers live.
    """

    codes: Tensor
    low_codes: Tensor | None
    alpha: Tensor
    bias: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_table: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        name: str,
        offer: Offer,
        active: BitSpec,
        table: bool = False,
        pinned: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.shape = shape
        self.name, self.offer, self.active, self.pinned = name, offer, active, pinned
        self.in_features = int(torch.Size(shape[1:]).numel())
        rows, widths, inputs = shape[0], len(offer.weight), len(offer.activation)

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.register_buffer("codes", empty(rows, self.in_features, dtype=torch.int8))
        low = empty(rows, self.in_features, dtype=torch.int8) if offer.dedicated else None
        self.register_buffer("low_codes", low)
        self.register_buffer("alpha", empty(widths, rows))
        self.register_buffer("bias", empty(widths, rows))
        self.register_buffer("input_scale", empty(inputs))
        self.register_buffer("input_zero_point", empty(inputs, dtype=torch.int32))
        narrow = table_rows(offer.activation) if table else 0
        levels = empty(narrow, 2**tables.GRID_BITS, dtype=torch.uint8)
        self.register_buffer("input_table", levels if table else None)

    def codes_of(self, bits: int) -> Tensor:
        """The codes, less 128, whose leading bits are those of a width, int8 (N, K)."""
        own = self.offer.has_own_codes(bits)
        return self.low_codes if own and self.low_codes is not None else self.codes

    def dequantized_weight(self, bits: int | None = None) -> Tensor:
        """Weights (N, K) as the codes stand for at a width, by default the current one."""
        bits = self.width().weight if bits is None else bits
        scale = self.alpha[self.offer.weight.index(bits)]
        return nested.code_levels(self.codes_of(bits), bits=bits) * scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x`, multiply with the leading bits of the codes, apply scales and bias."""
        spec = self.width()
        row = self.offer.weight.index(spec.weight)
        scale, zero, table, bits = self.input_quantizer(spec.activation)
        levels = self.rows(quantized(x, scale, zero, table, bits=bits), zero)
        codes, alpha, bias = self.codes_of(spec.weight), self.alpha[row], self.bias[row]
        return ops.linear_nested(levels, scale, zero, codes, alpha, bias, bits=spec.weight)

    def input_quantizer(self, bits: int) -> CodeQuantizer:
        """How what comes in is quantized at a width of activations."""
        column = self.offer.activation.index(bits)
        narrow = self.input_table is not None and bits < tables.GRID_BITS
        return CodeQuantizer(
            self.input_scale[column : column + 1],
            self.input_zero_point[column : column + 1],
            cast(Tensor, self.input_table)[column] if narrow else None,
            bits,
        )

    def rows(self, levels: Tensor, zero_point: Tensor) -> Tensor:
        """The quantized input as rows that the codes are multiplied with."""
        return levels

    def extra_repr(self) -> str:
        """Shape and widths."""
        widths = f"w{self.offer.weight}a{self.offer.activation}, active {self.active}"
        return f"{tuple(self.shape)}, {widths}"


class NestedConv2d(NestedLinear):
    """A convolution without groups, as a linear layer over what its kernel sees.

    Shape: (B, C, H, W) to (B, N, H', W').
    """

    geometry = Geometry()

    def rows(self, levels: Tensor, zero_point: Tensor) -> Tensor:
        """What the kernel sees at every place; zeros around the picture are quantized too."""
        return windows(levels, self.shape[2:], self.geometry, zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x`, convolve integers, apply scales and bias."""
        return super().forward(x).movedim(-1, 1)


class NestedProducts(SwitchableLayer, nn.Module):
    """The two products of attention at any of several widths of activations.

    Args:
        name: The path of the attention in its model.
        offer: The widths it has.
        active: The width it runs at.
        quantizer: Quantizer of activations, "uniform" or "table".
        device: Where the scales live.
    """

    def __init__(
        self,
        *,
        name: str,
        offer: Offer,
        active: BitSpec,
        quantizer: Quantizer = "uniform",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.name, self.offer, self.active, self.pinned = name, offer, active, False
        self.quantizer = quantizer
        for bits in offer.activation:
            operands, probabilities = products_quantizers(bits, quantizer)
            products = IntegerProducts(
                bits=bits, quantizer=operands, probabilities=probabilities, device=device
            )
            self.add_module(f"a{bits}", products)

    def at(self, bits: int) -> IntegerProducts:
        """The products at one width."""
        return cast(IntegerProducts, self.get_submodule(f"a{bits}"))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, N, D) and (B, H, M, D) to (B, H, N, M)."""
        return self.at(self.width().activation).scores(query, key)

    def values(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, M) and (B, H, M, D) to (B, H, N, D)."""
        return self.at(self.width().activation).values(probabilities, value)


def table_rows(activation: Sequence[int]) -> int:
    """How many of these widths are narrow enough to need a table."""
    return sum(bits < tables.GRID_BITS for bits in activation)
