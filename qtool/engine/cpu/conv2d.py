"""Fast CPU versions of convolutions: panels, oneDNN, or exact sums in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.engine.cpu import exact
from qtool.engine.cpu.codes import quantize
from qtool.engine.cpu.exact import EXACT_SUM, blocks
from qtool.engine.cpu.linear import (
    Packed,
    PackedWeight,
    both_scales,
    float_levels,
    int8_levels,
    layer_of,
    multiplies,
    no_zeros,
    pack_levels,
)
from qtool.engine.cpu.panels import PanelLinear
from qtool.engine.cpu.windows import Output, convolve
from qtool.engine.geometry import cuts_patches, layout_of
from qtool.engine.resident import derived


def conv2d(
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
) -> Tensor:
    """Integer convolution; see `qtool.engine.ops.conv2d`."""
    depth = x.shape[1] // groups
    bias = None if bias is None else bias.contiguous()
    shape = (len(weight), depth, *kernel)
    if x.numel() and len(weight):
        shared = (x, x_scale, x_zero, weight, weight_scale, weight_zero, bias, weight_bits)
        geometry = (kernel, stride, padding, dilation, groups)
        if (found := convolve(*shared, *geometry)) is not None:
            return found
        patches = cuts_patches(kernel, stride, padding, dilation, groups)
        if patches and multiplies(math.prod(shape[1:])):
            levels = derived(_patch_packing(weight_bits, shape), weight, weight_zero)
            if levels is not None:
                scale = derived(both_scales, weight_scale, x_scale)
                return _over_patches(x, layer_of(levels, scale, bias, int(x_zero)), kernel)
    if exact.has_int8_units() and x.numel() and len(weight):
        place = (tuple(stride), tuple(padding), tuple(dilation), groups)
        packing = _packing(weight_bits, shape, *place)
        if (packed := derived(packing, weight, weight_zero, x_zero)) is not None:
            scale = derived(both_scales, weight_scale, x_scale)
            x = x.contiguous(memory_format=layout_of(x))
            return _product(x, int(x_zero), packed, scale, bias, *place)
    levels = derived(float_levels(weight_bits, depth * math.prod(kernel)), weight, weight_zero).t()
    codes = x.float().sub_(x_zero.reshape(()))
    step = _exact_depth(codes, levels, depth)
    if step == 0:
        codes, levels, step = codes.double(), levels.double(), depth
    levels = levels.view(len(levels), depth, *kernel)
    codes = codes.unflatten(1, (groups, depth))
    parts = (
        F.conv2d(
            codes[:, :, channels].flatten(1, 2),
            levels[:, channels],
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
            groups=groups,
        )
        for channels in blocks(depth, step)
    )
    sums = next(parts)
    for part in parts:
        sums = sums.double() + part
    y = sums.float().mul_((x_scale * weight_scale).view(-1, 1, 1))
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def conv2d_quantize(
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
    activation: str,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Tensor:
    """Integer convolution that ends in codes; see `qtool.engine.ops.conv2d_quantize`."""
    shared = (x, x_scale, x_zero, weight, weight_scale, weight_zero)
    bias = None if bias is None else bias.contiguous()
    geometry = (kernel, stride, padding, dilation, groups)
    output = (out_scale, out_zero, out_table, out_bits)
    if x.numel() and len(weight):
        ending = Output(activation, *output)
        if (found := convolve(*shared, bias, weight_bits, *geometry, ending)) is not None:
            return found
    return quantize(conv2d(*shared, bias, weight_bits, *geometry), *output, activation)


def _over_patches(x: Tensor, layer: Packed | PanelLinear, kernel: Sequence[int]) -> Tensor:
    """A layer over patches of (B, C, H, W); what is left over at the edges stays unread."""
    down, across = kernel
    rows, columns = x.shape[2] // down, x.shape[3] // across
    inside = x.permute(0, 2, 3, 1)[:, : rows * down, : columns * across]
    patches = inside.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3)
    y = layer.product(patches.reshape(len(x) * rows * columns, -1))
    return y.view(len(x), rows, columns, -1).permute(0, 3, 1, 2)


@functools.cache
def _patch_packing(
    bits: int, shape: tuple[int, ...]
) -> Callable[[Tensor, Tensor], PackedWeight | None]:
    """Lays weights out for patches whose channels lie side by side."""

    def pack(weight: Tensor, weight_zero: Tensor) -> PackedWeight | None:
        levels = int8_levels(weight, weight_zero, bits, math.prod(shape[1:]))
        if levels is None:
            return None
        return pack_levels(levels.view(shape).permute(0, 2, 3, 1).reshape(shape[0], -1))

    return pack


def _product(
    x: Tensor,
    x_zero: int,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """One oneDNN convolution. Scales go in as one, for the reason told in `linear.Packed`."""
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        x,
        1.0,
        x_zero,
        packed,
        scale,
        no_zeros(len(scale)),
        bias,
        stride,
        padding,
        dilation,
        groups,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return y


@functools.cache
def _packing(
    bits: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Callable[[Tensor, Tensor, Tensor], Tensor | None]:
    """Lays weights of a shape out for oneDNN; levels beyond int8 take another way."""

    def pack(weight: Tensor, weight_zero: Tensor, x_zero: Tensor) -> Tensor | None:
        levels = int8_levels(weight, weight_zero, bits, math.prod(shape[1:]))
        if levels is None:
            return None
        scales = torch.ones(shape[0])
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            levels.view(shape), scales, 1.0, int(x_zero), stride, padding, dilation, groups
        )
        return packed

    return pack


def _exact_depth(codes: Tensor, levels: Tensor, depth: int) -> int:
    """How many channels may be summed at once so that every sum stays an exact float32.

    Args:
        codes: Integer-valued activations, any shape.
        levels: Integer-valued weights (N, depth * kernel area).
        depth: Channels of a group.
    """
    if not codes.numel() or not levels.numel():
        return depth
    low, high = codes.permute(0, 2, 3, 1).aminmax()  # as they lie, mostly; else it is a copy
    reach = max(-float(low), float(high))
    if float(levels.abs().sum(dim=1).amax()) * reach <= EXACT_SUM:
        return depth
    area = levels.shape[1] // depth
    return int((EXACT_SUM) // (float(levels.abs().amax()) * reach * area))
