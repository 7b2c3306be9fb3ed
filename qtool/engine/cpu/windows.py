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
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:
    """What `qtool.engine.ops.conv2d` returns, channels last, or None where it takes another way."""
    if exact.has_int8_units() or not native.has_vectors():
        return None
    scale = derived(both_scales, weight_scale, x_scale)
    window = native.Window(
        len(x),
        x.shape[1],
        tuple(x.shape[2:]),
        output_size(x.shape[2:], kernel=kernel, stride=stride, padding=padding, dilation=dilation),
        *(tuple(pair) for pair in (kernel, stride, padding, dilation)),
        int(x_zero),
    )
    area, inputs = math.prod(kernel), x.shape[1] // groups
    y = None
    if groups == 1 and panels.on_vectors(_whole(area * inputs)):
        levels = derived(_panel_packing(weight_bits, tuple(kernel), inputs), weight, weight_zero)
        if levels is not None:
            layer = panels.PanelLinear(levels, scale, bias, window.zero)
            y = layer.windows(_channels_last(x), window)
    elif groups == x.shape[1] == len(weight) and area < MOST_TAPS:
        kernels = derived(_depthwise_packing(weight_bits, area), weight, weight_zero)
        y = _depthwise(_channels_last(x), kernels, scale, bias, window)
    return None if y is None else y.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _whole(inputs: int) -> int:
    """Inputs of a layer in panels that has room for so many."""
    return -(-inputs // panels.GROUP) * panels.GROUP


@functools.cache
def _panel_packing(
    bits: int, kernel: tuple[int, ...], inputs: int
) -> Callable[[Tensor, Tensor], panels.Panels | None]:
    """Lays weights out for windows whose channels lie side by side."""
    terms = math.prod(kernel) * inputs

    def pack(weight: Tensor, weight_zero: Tensor) -> panels.Panels | None:
        levels = int8_levels(weight, weight_zero, bits, terms)
        if levels is None:
            return None
        last = levels.view(-1, inputs, *kernel).permute(0, 2, 3, 1).reshape(-1, terms)
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


def _depthwise(
    codes: Tensor, kernels: _Kernels, scale: Tensor, bias: Tensor | None, window: native.Window
) -> Tensor:
    """Every channel with its own kernel, (B, H, W, C) to float32 (B, H', W', C)."""
    y = codes.new_empty(*window.shape, window.channels, dtype=torch.float32)
    outside = codes.new_full((window.channels,), window.zero)
    offset = kernels.sums * -window.zero
    scale, bias = _filled(scale), None if bias is None else _filled(bias)
    native.library().qtool_depthwise(
        window,
        codes.data_ptr(),
        outside.data_ptr(),
        kernels.levels.data_ptr(),
        offset.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _filled(x: Tensor) -> Tensor:
    """With zeros up to a multiple of the channels that are taken at once."""
    return x.contiguous() if len(x) % LANES == 0 else F.pad(x, (0, -len(x) % LANES))
