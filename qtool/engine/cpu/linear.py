"""Fast CPU versions of linear layers.

A layer whose parameters are per tensor runs as one product, in panels (AMX, AVX2) or by oneDNN on
int8 units, that applies scales and bias while its sums are in registers; its weights are laid out
for that once. Other layers take `torch._int_mm` in blocks of rows, or float32 whose sums stay exact
where `torch._int_mm` is a plain loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._nn import gelu as _gelu

from qtool.engine.activations import activated
from qtool.engine.cpu import codes as quantizers
from qtool.engine.cpu import exact, native, panels
from qtool.engine.cpu.packing import unpack_codes
from qtool.engine.resident import derived

BLOCK_ROWS = 256
NEAR = 5 << 18  # bytes of values for each thread that stay in its cache until they are codes
INT8 = torch.iinfo(torch.int8)


def linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Integer linear layer; see `qtool.engine.ops.linear`."""
    codes = x.reshape(math.prod(x.shape[:-1]), in_features).contiguous()
    bias = None if bias is None else bias.contiguous()
    shared = (weight, weight_scale, weight_zero, bias, weight_bits, in_features)
    if (packed := packed_layer(x_scale, x_zero, *shared)) is not None:
        y = packed.product(codes, added=None if residual is None else residual.contiguous())
        return y.view(*x.shape[:-1], len(weight))
    y = _scaled(codes, x_scale, x_zero, *shared).view(*x.shape[:-1], len(weight))
    return y if residual is None else y.add_(residual)


def linear_quantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
    activation: str,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Tensor:
    """Integer linear layer that ends in codes; see `qtool.engine.ops.linear_quantize`."""
    groups = len(out_scale)
    shared = (weight, weight_scale, weight_zero, bias, weight_bits, in_features)
    layer = packed_layer(x_scale, x_zero, *shared) if panels.takes(in_features) else None
    if isinstance(layer, panels.PanelLinear) and x.numel():
        told = (out_scale, out_zero) if out_table is None else (out_scale, out_zero, out_table)
        found = _in_panels(layer, x, activation, derived(_quantizers(out_bits), *told))
        return found[0] if groups == 1 else found
    y = activated(linear(x, x_scale, x_zero, *shared), activation)
    if groups == 1:
        return quantizers.quantize(y, out_scale, out_zero, out_table, out_bits)
    rows, width = math.prod(x.shape[:-1]), len(weight) // groups
    parts = y.view(rows, groups, width)
    out = torch.empty(groups, 1, 1, rows, width, dtype=torch.uint8)
    tables = [None] * groups if out_table is None else out_table.unbind()
    quantizers_of = zip(out_scale, out_zero, tables, strict=True)
    for group, (scale, zero, table) in enumerate(quantizers_of):
        part = parts[None, None, :, group]
        quantizers.quantize_into(out[group], part, scale, zero, table, out_bits)
    return out.view(groups, *x.shape[:-1], width)


@functools.cache
def _quantizers(bits: int) -> Callable[..., native.Quantizers]:
    def made(scale: Tensor, zero: Tensor, table: Tensor | None = None) -> native.Quantizers:
        return native.quantizers(scale, zero, table, bits)

    return made


def _in_panels(
    layer: panels.PanelLinear, x: Tensor, activation: str, endings: native.Quantizers
) -> Tensor:
    """From codes (..., K) to codes (G, ..., N / G), with no more values than stay near."""
    codes = x.reshape(-1, layer.depth).contiguous()
    rows, groups = len(codes), len(endings.each)
    width = layer.width // groups
    out = codes.new_empty(groups, *x.shape[:-1], width)
    if activation == "none" and layer.ends_in_codes(groups):
        go = native.walk((1, 1, rows, width), (0, 0, 0), (0, 0, width))
        layer.codes(codes, out.data_ptr(), go, endings.array, out.stride(0))
        return out
    size = max(1, torch.get_num_threads() * NEAR // (4 * layer.width))
    room = torch.empty(min(size, rows), layer.width)
    flat = out.view(groups, 1, 1, rows, width)
    for some in exact.blocks(rows, size):
        values = layer.product(codes[some], out=room[: some.stop - some.start])
        if activation == "gelu":
            gelu_(values)
        parts = values.view(1, 1, -1, groups, width)
        for group, ending in enumerate(endings.each):
            native.codes(parts[:, :, :, group], flat[group, :, :, some], ending)
    return out


def gelu_(x: Tensor) -> None:
    """GELU in place."""
    _gelu(x, out=x)  # type: ignore[call-arg]


class Packed(NamedTuple):
    """A layer as oneDNN takes it.

    Attributes:
        weight: Levels in oneDNN's own layout.
        scale: Scale of the input times that of each channel, (N,). Given apart, oneDNN multiplies
            by one after the other for some shapes, which rounds otherwise.
        weight_zero: Zeros, (N,): levels have none.
        bias: (N,) or None.
        zero: Zero point of the input codes.
    """

    weight: Tensor
    scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    zero: int

    def product(
        self, codes: Tensor, *, added: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The layer on codes (M, K), plus `added` if given, float32 (M, N), or in `out`."""
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes,
            1.0,
            self.zero,
            self.weight,
            self.scale,
            self.weight_zero,
            self.bias,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        if out is None:
            return y if added is None else y.add_(added.view_as(y))
        if added is None:
            return out.copy_(y.view_as(out))
        return torch.add(added.view_as(out), y.view_as(out), out=out)


def packed_layer(
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
) -> Packed | panels.PanelLinear | None:
    """A layer in panels or laid out for oneDNN, or None where it takes another way."""
    packed = _packed(x_scale, x_zero, weight, weight_zero, weight_bits, in_features)
    if packed is None:
        return None
    return layer_of(packed, derived(both_scales, weight_scale, x_scale), bias, int(x_zero))


PackedWeight = panels.Panels | Tensor
"""Weights in panels, or in oneDNN's own layout."""


def multiplies(in_features: int) -> bool:
    """Whether layers with so many inputs can be laid out to multiply integers here."""
    return exact.has_int8_units() or panels.takes(in_features)


def pack_levels(levels: Tensor) -> PackedWeight:
    """Levels int8 (N, K) as this CPU multiplies them best."""
    if panels.takes(levels.shape[1]):
        return panels.laid_out(levels)
    packed: Tensor = torch.ops.onednn.qlinear_prepack(levels, None)
    return packed


def layer_of(
    packed: PackedWeight, scale: Tensor, bias: Tensor | None, zero: int
) -> Packed | panels.PanelLinear:
    """A layer of packed weights; see `panels.PanelLinear` for the arguments."""
    if isinstance(packed, panels.Panels):
        return panels.PanelLinear(packed, scale, bias, zero)
    return Packed(packed, scale, no_zeros(len(scale)), bias, zero)


def both_scales(weight_scale: Tensor, x_scale: Tensor) -> Tensor:
    """What sums are multiplied by, (N,)."""
    return x_scale.reshape(1) * weight_scale


@functools.cache
def no_zeros(channels: int) -> Tensor:
    """Zero points of levels, int32 (N,)."""
    return torch.zeros(channels, dtype=torch.int32)


def _packed(
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_zero: Tensor,
    weight_bits: int,
    in_features: int,
) -> PackedWeight | None:
    """The weight in panels or as oneDNN wants it, or None where the layer takes another way."""
    if not multiplies(in_features) or x_scale.numel() != 1 or x_zero.numel() != 1:
        return None
    return derived(_packing(weight_bits, in_features), weight, weight_zero)


@functools.cache
def _packing(bits: int, in_features: int) -> Callable[[Tensor, Tensor], PackedWeight | None]:
    def pack(weight: Tensor, weight_zero: Tensor) -> PackedWeight | None:
        levels = int8_levels(weight, weight_zero, bits, in_features)
        return None if levels is None else pack_levels(levels)

    return pack


def int8_levels(weight: Tensor, weight_zero: Tensor, bits: int, in_features: int) -> Tensor | None:
    """Weight codes less their zero points as int8 (N, K), or None where they reach beyond."""
    levels = weight_levels(weight, weight_zero, bits, in_features)
    if not levels.numel() or levels.min() < INT8.min or levels.max() > INT8.max:
        return None
    return levels.to(torch.int8)


def weight_levels(weight: Tensor, weight_zero: Tensor, bits: int, in_features: int) -> Tensor:
    """Weight codes less their zero points, int16 (N, K)."""
    codes = unpack_codes(weight, bits, in_features).to(torch.int16)
    return codes.sub_(weight_zero.to(torch.int16).unsqueeze(1))


@functools.cache
def float_levels(bits: int, in_features: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Weight levels (K, N) in float32, from packed rows and zero points."""

    def levels(weight: Tensor, weight_zero: Tensor) -> Tensor:
        return weight_levels(weight, weight_zero, bits, in_features).float().t()

    return levels


@functools.cache
def _centred(bits: int, in_features: int) -> Callable[[Tensor], Tensor]:
    def centred(weight: Tensor) -> Tensor:
        return unpack_codes(weight, bits, in_features).sub_(2 ** (bits - 1)).view(torch.int8)

    return centred


def _scaled(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    in_features: int,
) -> Tensor:
    """The layer in blocks of rows, (M, K) to (M, N), with sums from `_int8_sums` or float32."""
    x_zero = x_zero.reshape(-1, 1)
    if exact.has_int8_units():
        centred = derived(_centred(weight_bits, in_features), weight)
        sums = _int8_sums(codes, x_zero, centred, weight_zero - 2 ** (weight_bits - 1))
    else:
        levels = derived(float_levels(weight_bits, in_features), weight, weight_zero)
        sums = _float_sums(codes, x_zero, levels, 2**weight_bits - 1)
    return _in_blocks(sums, len(codes), x_scale.reshape(-1, 1), weight_scale, bias)


def _in_blocks(
    sums_of: Callable[[slice], Tensor],
    length: int,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Sums of all rows times both scales, plus bias, (length, N), in blocks that fit the cache."""
    y = weight_scale.new_empty(length, len(weight_scale))
    for rows in exact.blocks(length, BLOCK_ROWS):
        y[rows].copy_(sums_of(rows)).mul_(exact.some_rows(x_scale, rows) * weight_scale)
        if bias is not None:
            y[rows] += bias
    return y


def _int8_sums(
    codes: Tensor, x_zero: Tensor, weight: Tensor, centre: Tensor
) -> Callable[[slice], Tensor]:
    """Sums of some rows: the product of codes as they are, then what the zero points take away."""
    columns = weight.t()
    in_features = codes.shape[1]
    symmetric = not centre.any()
    row_of_ones = codes.new_ones(1, in_features)
    column_of_ones = weight.new_ones(in_features, 1)
    weight_sums = torch._int_mm(row_of_ones, columns) - in_features * centre

    def sums(rows: slice) -> Tensor:
        found = torch._int_mm(codes[rows], columns)
        if not symmetric:
            code_sums = torch._int_mm(codes[rows], column_of_ones)
            found.addr_(code_sums.view(-1), centre, alpha=-1)
        return found.sub_(exact.some_rows(x_zero, rows) * weight_sums)

    return sums


def _float_sums(
    codes: Tensor, x_zero: Tensor, levels: Tensor, top: int
) -> Callable[[slice], Tensor]:
    """The same without int8 units: products of levels (K, N) of magnitude `top`, as float32."""
    reach = exact.reach(x_zero, 255) * top

    def sums(rows: slice) -> Tensor:
        left = codes[rows].float() - exact.some_rows(x_zero, rows)
        return exact.float_sums(left, levels, reach=reach)

    return sums


def linear_nested(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """Linear layer with the leading bits of its weight; see `qtool.engine.ops.linear_nested`."""
    codes = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    layer = nested_layer(x_scale, x_zero, weight, weight_scale, bias, bits)
    if layer is not None and len(codes):
        return layer.product(codes.contiguous()).view(*x.shape[:-1], len(weight))
    shifted = weight >> (8 - bits)
    x_zero = x_zero.reshape(-1, 1)
    if exact.has_int8_units():
        sums = _int8_level_sums(codes, x_zero, shifted)
    else:
        levels = shifted.float().mul_(2.0).add_(1.0).t()
        sums = _float_sums(codes, x_zero, levels, 2**bits - 1)
    y = _in_blocks(sums, len(codes), x_scale.reshape(-1, 1), weight_scale, bias)
    return y.view(*x.shape[:-1], len(weight))


def nested_layer(
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
) -> Packed | panels.PanelLinear | None:
    """A layer of nested codes laid out for this CPU, or None where it takes another way.

    In panels all widths share one layout. For oneDNN each has its own, and 8 bits have none: their
    levels do not fit a byte.
    """
    fits = weight.numel() and x_scale.numel() == 1 and x_zero.numel() == 1
    if not (fits and multiplies(weight.shape[1])):
        return None
    scale, zero = both_scales(weight_scale, x_scale), int(x_zero)
    if panels.takes(weight.shape[1]):
        whole = derived(panels.laid_out, weight)
        run = None if whole.run is None else derived(_level_run(bits), weight)
        leading = panels.Panels(whole.panels, derived(_level_sums(bits), weight), run)
        return panels.PanelLinear(leading, scale, bias, zero, bits)
    if bits == 8:
        return None
    return layer_of(derived(_level_packing(bits), weight), scale, bias, zero)


@functools.cache
def _level_packing(bits: int) -> Callable[[Tensor], PackedWeight]:
    def pack(weight: Tensor) -> PackedWeight:
        return pack_levels((weight >> (8 - bits)).mul_(2).add_(1))

    return pack


@functools.cache
def _level_sums(bits: int) -> Callable[[Tensor], Tensor]:
    def sums(weight: Tensor) -> Tensor:
        leading = weight >> (8 - bits)
        return leading.sum(1, dtype=torch.int32).mul_(2).add_(weight.shape[1])

    return sums


@functools.cache
def _level_run(bits: int) -> Callable[[Tensor], int]:
    def run(weight: Tensor) -> int:
        return panels.longest_run(weight >> (8 - bits))

    return run


def _int8_level_sums(codes: Tensor, x_zero: Tensor, shifted: Tensor) -> Callable[[slice], Tensor]:
    """Sums of some rows with the levels 2 h + 1: twice the product with h, and sums of codes."""
    columns = shifted.t()
    in_features = codes.shape[1]
    row_of_ones = codes.new_ones(1, in_features)
    column_of_ones = shifted.new_ones(in_features, 1)
    level_sums = 2 * torch._int_mm(row_of_ones, columns) + in_features

    def sums(rows: slice) -> Tensor:
        found = torch._int_mm(codes[rows], columns).mul_(2)
        found += torch._int_mm(codes[rows], column_of_ones)
        return found.sub_(exact.some_rows(x_zero, rows) * level_sums)

    return sums
