"""Convolutions on 256-bit vectors, where a CPU has no 8-bit units: from codes, not from floats.

What a kernel sees at each place is gathered and multiplied as a row of a linear layer in panels; a
kernel that sees one channel has a pass of its own. See `panels.c` and `depthwise.c`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.engine.cpu import exact, native, panels
from qtool.engine.cpu.linear import both_scales, int8_levels, weight_levels
from qtool.engine.geometry import output_size
from qtool.engine.resident import derived

LANES = 16  # channels that `depthwise.c` takes at once
MOST_TAPS = 128
_ORDER = (0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)  # as vectors of pairs unpack


class Output(NamedTuple):
    """What a convolution that ends in codes does to its values; as in `ops.conv2d_quantize`."""

    activation: str
    scale: Tensor
    zero: Tensor
    table: Tensor | None
    bits: int


class _Kernels(NamedTuple):
    """Depthwise kernels laid out.

    Attributes:
        levels: int16 (channels / 16, pairs of taps, 16, 2).
        sums: Of the levels of each channel, int32 (channels,); a multiple of 16 of them.
    """

    levels: Tensor
    sums: Tensor


def convolve(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output: Output | None = None,
) -> Tensor | None:
    """What `qtool.engine.ops.conv2d` returns, channels last, or None where it takes another way.

    With `output` what `qtool.engine.ops.conv2d_quantize` returns.
    """
    if exact.has_int8_units() or not native.has_vectors():
        return None
    inputs = x.shape[1] // groups
    depthwise = groups == x.shape[1] == len(weight) and groups > 1
    if groups > 1 and not depthwise:
        return None
    told = [weight_scale, weight_zero, x_scale, x_zero]
    told += [] if bias is None else [bias]
    ending = None
    if output is not None:
        told += [output.scale, output.zero, *([] if output.table is None else [output.table])]
        ending = (output.activation, output.bits)
    shape = (inputs, *kernel)
    make = _making(weight_bits, shape, depthwise, bias is not None, ending)
    layer = derived(make, weight, *told)
    if layer is None:
        return None
    window = _window(tuple(x.shape), *map(tuple, (kernel, stride, padding, dilation)), layer.zero)
    return layer(x.permute(0, 2, 3, 1).contiguous(), window).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=1024)
def _window(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    zero: int,
) -> native.Window:
    """Where a convolution looks in codes of a shape (B, C, H, W)."""
    found = output_size(shape[2:], kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    pairs = (shape[2:], found, kernel, stride, padding, dilation)
    return native.Window(shape[0], shape[1], *pairs, zero)


@functools.cache
def _making(
    bits: int,
    shape: tuple[int, ...],
    depthwise: bool,
    has_bias: bool,
    ending: tuple[str, int] | None,
) -> Callable[..., _Mixing | _Depthwise | None]:
    """Makes layers whose kernels see `shape`, (C, height, width), from all that they are told."""
    area, terms = math.prod(shape[1:]), math.prod(shape)

    def make(
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero: Tensor,
        x_scale: Tensor,
        x_zero: Tensor,
        *rest: Tensor,
    ) -> _Mixing | _Depthwise | None:
        bias, output = (rest[0], rest[1:]) if has_bias else (None, rest)
        quantizer = None
        if ending is not None:
            (out_scale, out_zero), table = output[:2], output[2] if len(output) > 2 else None
            quantizer = native.quantizer(
                out_scale, out_zero, table, ending[1], activation=ending[0]
            )
        scale, zero = both_scales(weight_scale, x_scale), int(x_zero)
        if depthwise:
            if area >= MOST_TAPS:
                return None
            kernels = derived(_depthwise_packing(bits, area), weight, weight_zero)
            return _Depthwise(kernels, scale, bias, zero, quantizer)
        if not panels.on_vectors(_whole(terms)):
            return None
        levels = derived(_panel_packing(bits, shape), weight, weight_zero)
        if levels is None:
            return None
        return _Mixing(panels.PanelLinear(levels, scale, bias, zero), zero, quantizer)

    return make


class _Mixing:
    """A convolution that mixes all channels.

    Args:
        layer: Its kernels as rows, in panels.
        zero: Zero point of the input.
        quantizer: What it ends in, or None for values.
    """

    def __init__(
        self, layer: panels.PanelLinear, zero: int, quantizer: native.Quantizer | None
    ) -> None:
        self.layer, self.zero, self.quantizer = layer, zero, quantizer
        self.quantizers = None if quantizer is None else (native.Quantizer * 1)(quantizer)

    def __call__(self, codes: Tensor, window: native.Window) -> Tensor:
        """(B, H, W, C) to (B, H', W', N)."""
        layer = self.layer
        if not window.single or layer.depth != window.channels:
            return layer.windows(codes, window, self.quantizer)
        rows = codes.view(-1, layer.depth)
        if self.quantizers is None:
            return layer.product(rows).view(*window.shape, layer.width)
        y = codes.new_empty(*window.shape, layer.width)
        layer.codes(rows, y.data_ptr(), layer.over_rows(y), self.quantizers, 0)
        return y


class _Depthwise:
    """A convolution that gives every channel a kernel of its own.

    Args:
        kernels: These.
        scale: What sums are multiplied by, (C,).
        bias: (C,) or None.
        zero: Zero point of the input.
        quantizer: What it ends in, or None for values.
    """

    def __init__(
        self,
        kernels: _Kernels,
        scale: Tensor,
        bias: Tensor | None,
        zero: int,
        quantizer: native.Quantizer | None,
    ) -> None:
        self.zero, self.quantizer = zero, quantizer
        offset, outside = kernels.sums * -zero, torch.full((len(scale),), zero, dtype=torch.uint8)
        told = (outside, kernels.levels, offset, _filled(scale))
        self.kept = (*told, None if bias is None else _filled(bias))  # as their addresses are used
        self.told = [None if part is None else part.data_ptr() for part in self.kept]

    def __call__(self, codes: Tensor, window: native.Window) -> Tensor:
        """(B, H, W, C) to (B, H', W', C)."""
        threads = torch.get_num_threads()
        kind = torch.float32 if self.quantizer is None else torch.uint8
        y = codes.new_empty(*window.shape, window.channels, dtype=kind)
        values = y
        if self.quantizer is not None:
            line = window.found[1] * window.channels
            values = codes.new_empty(threads, line, dtype=torch.float32)
        native.library().qtool_depthwise(
            *(window, codes.data_ptr(), *self.told),
            *(values.data_ptr(), y.data_ptr(), self.quantizer, threads),
        )
        return y


def _whole(inputs: int) -> int:
    """Inputs of a layer in panels that has room for so many."""
    return -(-inputs // panels.GROUP) * panels.GROUP


@functools.cache
def _panel_packing(
    bits: int, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor], panels.Panels | None]:
    """Lays weights out for windows whose channels lie side by side."""
    terms = math.prod(shape)

    def pack(weight: Tensor, weight_zero: Tensor) -> panels.Panels | None:
        levels = int8_levels(weight, weight_zero, bits, terms)
        if levels is None:
            return None
        last = levels.view(-1, *shape).permute(0, 2, 3, 1).reshape(-1, terms)
        return panels.laid_out(F.pad(last, (0, _whole(terms) - terms)), vectors=True)

    return pack


@functools.cache
def _depthwise_packing(bits: int, area: int) -> Callable[[Tensor, Tensor], _Kernels]:
    """Lays weights out for `depthwise.c`."""

    def pack(weight: Tensor, weight_zero: Tensor) -> _Kernels:
        levels = weight_levels(weight, weight_zero, bits, area)
        whole = F.pad(levels, (0, area % 2, 0, -len(levels) % LANES))
        pairs = whole.view(-1, LANES, whole.shape[1] // 2, 2).transpose(1, 2)
        return _Kernels(pairs[:, :, _ORDER].contiguous(), whole.sum(1, dtype=torch.int32))

    return pack


def _filled(x: Tensor) -> Tensor:
    """With zeros up to a multiple of the channels that are taken at once."""
    return x.contiguous() if len(x) % LANES == 0 else F.pad(x, (0, -len(x) % LANES))
