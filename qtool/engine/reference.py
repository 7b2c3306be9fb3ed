"""The shortest correct form of every operation: oracle of the tests, way out without a fast path.

Integer sums are taken in float64, where every product and sum of 8-bit codes is exact, so that the
same few lines are right on every device. The arguments are those of `qtool.engine.ops`, already
checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.engine.activations import activated
from qtool.engine.geometry import output_size
from qtool.engine.packing import packed_width, planes

SQRT_HALF = 0.70710678  # rounds to the float32 next to the square root of 1/2
LAST_NORMAL_CODE = 126  # 2^-127 is no normal float32: log2 codes above this one mean zero


def quantize_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Uniform codes of `x`; see `qtool.engine.ops.quantize_uniform`."""
    levels = torch.round(x / _broadcast(scale)) + _broadcast(zero_point)
    return levels.clamp(0, 2**bits - 1).to(torch.uint8)


def quantize_table(x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor) -> Tensor:
    """Levels of `x`; see `qtool.engine.ops.quantize_table`."""
    return table[quantize_uniform(x, scale, zero_point, 8).long()]


def quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Power-of-two codes of `x`; see `qtool.engine.ops.quantize_log2`."""
    mantissa, exponent = torch.frexp(x / _broadcast(scale))
    code = (mantissa <= SQRT_HALF).int() - exponent
    return code.masked_fill(mantissa <= 0, 2**bits - 1).clamp(0, 2**bits - 1).to(torch.uint8)


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor | None, bits: int
) -> Tensor:
    if table is None:
        return quantize_uniform(x, scale, zero_point, bits)
    return quantize_table(x, scale, zero_point, table)


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    bits: int,
) -> Tensor:
    """Codes of a normalised `x`; see `qtool.engine.ops.layer_norm_quantize`."""
    values = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _quantize(values, scale, zero_point, table, bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed rows (N, bytes) of codes (N, K); see `qtool.engine.packing` for the format."""
    rows, in_features = codes.shape
    packed = codes.new_zeros(rows, packed_width(bits, in_features))
    for width, low, start, stop in planes(bits, in_features):
        per_byte = 8 // width
        fields = (codes.int() >> low) & (2**width - 1)
        fields = torch.nn.functional.pad(fields, (0, (stop - start) * per_byte - in_features))
        shifts = torch.arange(per_byte, device=codes.device) * width
        packed[:, start:stop] = (fields.view(rows, stop - start, per_byte) << shifts).sum(2)
    return packed


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes (N, K) of packed rows (N, bytes): the inverse of `pack_codes`."""
    k = torch.arange(in_features, device=packed.device)
    codes = packed.new_zeros(packed.shape[0], in_features, dtype=torch.int32)
    for width, low, start, _ in planes(bits, in_features):
        per_byte = 8 // width
        fields = packed.int()[:, start + k // per_byte] >> (k % per_byte * width)
        codes |= (fields & (2**width - 1)) << low
    return codes.to(torch.uint8)


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
    levels = _weight_levels(weight, weight_zero, weight_bits, in_features)
    sums = (x.double() - _broadcast(x_zero)) @ levels.T
    y: Tensor = sums.float() * (_broadcast(x_scale) * weight_scale)
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


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
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits, in_features)
    y = linear(x, x_scale, x_zero, *parameters)
    y = activated(y, activation)
    groups = len(out_scale)
    tables = [None] * groups if out_table is None else out_table.view(groups, -1)
    parts = [
        _quantize(part, scale, zero, table, out_bits)
        for part, scale, zero, table in zip(
            y.chunk(groups, dim=-1), out_scale, out_zero, tables, strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts)


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
    terms = x.shape[1] // groups * kernel[0] * kernel[1]
    levels = _weight_levels(weight, weight_zero, weight_bits, terms)
    columns = torch.nn.functional.unfold(
        x.double() - _broadcast(x_zero),
        kernel_size=tuple(kernel),
        dilation=tuple(dilation),
        padding=tuple(padding),
        stride=tuple(stride),
    )
    sums = levels.unflatten(0, (groups, -1)) @ columns.unflatten(1, (groups, terms))
    size = output_size(
        x.shape[2:], kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )
    scale = (_broadcast(x_scale) * weight_scale).view(-1, 1, 1)
    y: Tensor = sums.flatten(1, 2).float().unflatten(2, size) * scale
    return y if bias is None else y + bias.view(-1, 1, 1)


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
    parameters = (weight, weight_scale, weight_zero, bias, weight_bits)
    y = conv2d(x, x_scale, x_zero, *parameters, kernel, stride, padding, dilation, groups)
    return _quantize(activated(y, activation), out_scale, out_zero, out_table, out_bits)


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
    levels = 2 * (weight >> (8 - bits)).double() + 1
    sums = (x.double() - _broadcast(x_zero)) @ levels.T
    y: Tensor = sums.float() * (_broadcast(x_scale) * weight_scale)
    return y if bias is None else y + bias


def matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Tensor:
    """Batched integer product; see `qtool.engine.ops.matmul`."""
    sums = (a.double() - _broadcast(a_zero)) @ (b.double() - _broadcast(b_zero))
    return sums.float() * (_broadcast(a_scale) * _broadcast(b_scale))


def matmul_log2(
    p: Tensor, p_scale: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, bits: int
) -> Tensor:
    """Batched product with powers of two; see `qtool.engine.ops.matmul_log2`."""
    means_zero = (p == 2**bits - 1) | (p > LAST_NORMAL_CODE)
    weights = torch.exp2(-p.double()).masked_fill(means_zero, 0)
    sums = weights @ (v.double() - _broadcast(v_zero))
    return sums.float() * (_broadcast(p_scale) * _broadcast(v_scale))


def attention(
    qkv: Tensor,
    qkv_scale: Tensor,
    qkv_zero: Tensor,
    added: Tensor | None,
    p_scale: Tensor,
    p_zero: Tensor | None,
    p_table: Tensor | None,
    p_bits: int,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Tensor:
    """Attention from codes to codes; see `qtool.engine.ops.attention`."""
    (q, k, v), (q_scale, k_scale, v_scale) = qkv.transpose(2, 3), qkv_scale
    q_zero, k_zero, v_zero = qkv_zero
    scores = matmul(q, q_scale, q_zero, k.transpose(-2, -1), k_scale, k_zero)
    if added is not None:
        scores = (scores.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
    p = scores.softmax(dim=-1)
    if p_zero is None:
        codes = quantize_log2(p, p_scale, p_bits)
        attended = matmul_log2(codes, p_scale, v, v_scale, v_zero, p_bits)
    else:
        codes = _quantize(p, p_scale, p_zero, p_table, p_bits)
        attended = matmul(codes, p_scale, p_zero, v, v_scale, v_zero)
    found = _quantize(attended, out_scale, out_zero, out_table, out_bits)
    return found.transpose(1, 2).flatten(2)


def _weight_levels(
    weight: Tensor, weight_zero: Tensor, weight_bits: int, in_features: int
) -> Tensor:
    """Weight codes less their zero points, (N, K) in float64."""
    codes = unpack_codes(weight, weight_bits, in_features).double()
    levels: Tensor = codes - weight_zero.unsqueeze(1)
    return levels


def _broadcast(parameter: Tensor) -> Tensor:
    """A one-element parameter without dimensions, so that it never adds any; others as they are."""
    return parameter.reshape(()) if parameter.numel() == 1 else parameter
