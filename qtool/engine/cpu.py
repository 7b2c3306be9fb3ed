"""Fast CPU versions: unsigned codes times centred int8 weights, on int8 units where there are any.

With VNNI or AMX `torch._int_mm` takes the products, in blocks of rows so that sums and scaling stay
in the cache. Elsewhere it is a plain loop, thirty times slower than float32, so there the products
run as float32 on integer values, in pieces whose sums are exact. So do convolutions on every CPU:
that needs no copy of overlapping windows and serves depthwise kernels as well.
The arguments are those of `qtool.engine.ops`, already checked. Every function returns the bits of
`qtool.engine.reference`, except `matmul_log2`, whose sums are taken in float32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.engine.packing import packed_width, planes

BLOCK_ROWS = 256
BLOCK_ELEMENTS = 1 << 17
SQRT_HALF_CARRY = 0x800000 - 0x3504F4  # lifts a mantissa above sqrt(1/2) into the exponent
EXPONENT_BIAS = 127
EXACT_SUM = 2**24  # float32 holds every integer up to here


@functools.cache
def has_int8_units() -> bool:
    """Whether PyTorch multiplies uint8 by int8 in hardware here (x86 with VNNI)."""
    return bool(torch.cpu._is_vnni_supported()) and takes_unsigned_codes()


def takes_unsigned_codes() -> bool:
    """Whether `torch._int_mm` takes uint8 on the left; torch 2.11 takes int8 alone."""
    codes, weight = torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.int8)
    try:
        torch._int_mm(codes, weight)
    except RuntimeError:
        return False
    return True


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact integer product of uint8 codes (M, K) and int8 weights (K, N), int32 (M, N)."""
    if has_int8_units():
        return torch._int_mm(codes, weight)
    return float_sums(codes.float(), weight.float(), reach=255 * 128).int()


def float_sums(left: Tensor, right: Tensor, *, reach: int) -> Tensor:
    """Exact product of integer-valued float32 matrices.

    Args:
        left: (..., M, K).
        right: (..., K, N).
        reach: Largest magnitude that a product of two elements can have.

    Returns:
        (..., M, N), float32 where that holds every possible sum, else int32.
    """
    most = max(1, EXACT_SUM // max(1, reach))
    if left.shape[-1] <= most:
        return left @ right
    sums = left.new_zeros(*left.shape[:-1], right.shape[-1], dtype=torch.int32)
    for terms in _blocks(left.shape[-1], most):
        sums += (left[..., terms] @ right[..., terms, :]).int()
    return sums


@functools.cache
def int8_product_is_exact() -> bool:
    """Whether `product` is exact for all codes: some CPUs saturate 16-bit sums silently."""
    x = torch.full((33, 128), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((128, 32), -128, dtype=torch.int8, device="cpu")
    weight[:, ::2] = 127
    expected = x.double() @ weight.double()
    return all(torch.equal(product(x[:rows], weight).double(), expected[:rows]) for rows in (1, 33))


def quantize_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Uniform codes of `x`; see `qtool.engine.ops.quantize_uniform`."""
    width = x.shape[-1]
    values = x.reshape(math.prod(x.shape[:-1]), width)
    codes = torch.empty_like(values, dtype=torch.uint8)
    scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    for rows in _blocks(len(values), max(1, BLOCK_ELEMENTS // max(1, width))):
        levels = values[rows] / _rows(scale, rows)
        levels.round_().add_(_rows(zero_point, rows)).clamp_(0, 2**bits - 1)
        codes[rows].copy_(levels)
    return codes.view(x.shape)


def quantize_table(x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor) -> Tensor:
    """Levels of `x`; see `qtool.engine.ops.quantize_table`."""
    codes = quantize_uniform(x, scale, zero_point, 8).view(-1)
    for block in _blocks(len(codes), BLOCK_ELEMENTS):
        codes[block] = table.index_select(0, codes[block].int())
    return codes.view(x.shape)


def quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Power-of-two codes of `x`; see `qtool.engine.ops.quantize_log2`.

    The exponent field of the quotient, with a carry where its mantissa lies above sqrt(1/2), is the
    code up to sign.
    """
    top = 2**bits - 1
    values = x.reshape(-1)
    codes = torch.empty_like(values, dtype=torch.uint8)
    for block in _blocks(len(values), BLOCK_ELEMENTS):
        ratio = values[block] / scale.reshape(())
        shift: int | Tensor = 0
        if top > EXPONENT_BIAS - 1:  # only such codes reach quotients below the normal range
            tiny = ratio < torch.finfo(torch.float32).tiny
            ratio = torch.where(tiny, ratio * 2.0**64, ratio)
            shift = tiny.int() * 64
        field = ratio.view(torch.int32).add(SQRT_HALF_CARRY).bitwise_right_shift_(23)
        code = field.neg_().add_(shift).add_(EXPONENT_BIAS).clamp_(0, top)
        codes[block].copy_(code.masked_fill_(ratio <= 0, top))
    return codes.view(x.shape)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed rows (N, bytes) of codes (N, K); see `qtool.engine.packing` for the format."""
    rows, in_features = codes.shape
    packed = codes.new_zeros(rows, packed_width(bits, in_features))
    for width, low, start, _ in planes(bits, in_features):
        per_byte = 8 // width
        for field in range(per_byte):
            source = codes[:, field::per_byte] >> low & 2**width - 1
            packed[:, start : start + source.shape[1]] |= source << field * width
    return packed


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes (N, K) of packed rows (N, bytes): the inverse of `pack_codes`."""
    codes = packed.new_zeros(packed.shape[0], in_features)
    for width, low, start, _ in planes(bits, in_features):
        per_byte = 8 // width
        for field in range(per_byte):
            target = codes[:, field::per_byte]
            source = packed[:, start : start + target.shape[1]]
            target |= (source >> field * width & 2**width - 1) << low
    return codes


def prepare_weight(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes (N, K) less half their range, as int8."""
    return unpack_codes(packed, bits, in_features).sub_(2 ** (bits - 1)).view(torch.int8)


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
) -> Tensor:
    """Integer linear layer; see `qtool.engine.ops.linear`."""
    if weight.dtype == torch.uint8:
        weight = prepare_weight(weight, weight_bits, in_features)
    centre = weight_zero - 2 ** (weight_bits - 1)
    x_scale, x_zero = x_scale.reshape(-1, 1), x_zero.reshape(-1, 1)
    codes = x.reshape(math.prod(x.shape[:-1]), in_features)
    sums_of = _int8_sums if has_int8_units() else _float_sums
    rows_of = sums_of(codes, x_zero, weight, centre)
    y = _scaled(rows_of, len(codes), x_scale, weight_scale, bias)
    return y.view(*x.shape[:-1], len(weight))


def _scaled(
    sums_of: Callable[[slice], Tensor],
    length: int,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Sums of all rows times both scales, plus bias, (length, N), in blocks that fit the cache."""
    y = weight_scale.new_empty(length, len(weight_scale))
    for rows in _blocks(length, BLOCK_ROWS):
        y[rows].copy_(sums_of(rows)).mul_(_rows(x_scale, rows) * weight_scale)
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
        return found.sub_(_rows(x_zero, rows) * weight_sums)

    return sums


def _float_sums(
    codes: Tensor, x_zero: Tensor, weight: Tensor, centre: Tensor
) -> Callable[[slice], Tensor]:
    """The same without int8 units: products of levels, as float32."""
    levels = (weight.float() - centre[:, None]).t()
    reach = _reach(x_zero, 255) * int(levels.abs().max() if levels.numel() else 0)

    def sums(rows: slice) -> Tensor:
        return float_sums(codes[rows].float() - _rows(x_zero, rows), levels, reach=reach)

    return sums


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
    if weight.dtype == torch.uint8:
        weight = prepare_weight(weight, weight_bits, depth * math.prod(kernel))
    levels = weight.float() - (weight_zero - 2 ** (weight_bits - 1)).unsqueeze(1)
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
        for channels in _blocks(depth, step)
    )
    sums = next(parts)
    for part in parts:
        sums = sums.double() + part
    y = sums.float().contiguous().mul_((x_scale * weight_scale).view(-1, 1, 1))
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def _exact_depth(codes: Tensor, levels: Tensor, depth: int) -> int:
    """How many channels may be summed at once so that every sum stays an exact float32.

    Args:
        codes: Integer-valued activations, any shape.
        levels: Integer-valued weights (N, depth * kernel area).
        depth: Channels of a group.
    """
    if not codes.numel() or not levels.numel():
        return depth
    low, high = codes.aminmax()
    reach = max(-float(low), float(high))
    if float(levels.abs().sum(dim=1).amax()) * reach <= EXACT_SUM:
        return depth
    area = levels.shape[1] // depth
    return int((EXACT_SUM) // (float(levels.abs().amax()) * reach * area))


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
    shifted = weight >> (8 - bits)
    x_scale, x_zero = x_scale.reshape(-1, 1), x_zero.reshape(-1, 1)
    codes = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    sums_of = _int8_level_sums if has_int8_units() else _float_level_sums
    rows_of = sums_of(codes, x_zero, shifted, bits)
    y = _scaled(rows_of, len(codes), x_scale, weight_scale, bias)
    return y.view(*x.shape[:-1], len(weight))


def _int8_level_sums(
    codes: Tensor, x_zero: Tensor, shifted: Tensor, bits: int
) -> Callable[[slice], Tensor]:
    """Sums of some rows with the levels 2 h + 1: twice the product with h, and sums of codes."""
    columns = shifted.t()
    in_features = codes.shape[1]
    row_of_ones = codes.new_ones(1, in_features)
    column_of_ones = shifted.new_ones(in_features, 1)
    level_sums = 2 * torch._int_mm(row_of_ones, columns) + in_features

    def sums(rows: slice) -> Tensor:
        found = torch._int_mm(codes[rows], columns).mul_(2)
        found += torch._int_mm(codes[rows], column_of_ones)
        return found.sub_(_rows(x_zero, rows) * level_sums)

    return sums


def _float_level_sums(
    codes: Tensor, x_zero: Tensor, shifted: Tensor, bits: int
) -> Callable[[slice], Tensor]:
    """The same without int8 units: products of levels, as float32."""
    levels = shifted.float().mul_(2.0).add_(1.0).t()
    reach = _reach(x_zero, 255) * (2**bits - 1)

    def sums(rows: slice) -> Tensor:
        return float_sums(codes[rows].float() - _rows(x_zero, rows), levels, reach=reach)

    return sums


def matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Tensor:
    """Batched integer product; see `qtool.engine.ops.matmul`."""
    scale = a_scale.reshape(()) * b_scale.reshape(())
    if not has_int8_units():
        reach = _reach(a_zero, 255) * _reach(b_zero, 255)
        sums = float_sums(a.float() - a_zero, b.float() - b_zero, reach=reach)
        return sums.float().mul_(scale)
    terms = a.shape[-1]
    centred = (b ^ 128).view(torch.int8)
    a_offset, b_offset = int(a_zero), int(b_zero) - 128
    row_of_ones, column_of_ones = a.new_ones(1, terms), centred.new_ones(terms, 1)
    out = scale.new_empty(*a.shape[:-1], b.shape[-1])
    for index in itertools.product(*map(range, a.shape[:-2])):
        left, right = a[index], centred[index]
        sums = torch._int_mm(left, right)
        if b_offset:
            sums -= b_offset * torch._int_mm(left, column_of_ones)
        if a_offset:
            sums -= a_offset * (torch._int_mm(row_of_ones, right) - terms * b_offset)
        out[index].copy_(sums).mul_(scale)
    return out


def matmul_log2(
    p: Tensor, p_scale: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, bits: int
) -> Tensor:
    """Batched product with powers of two; see `qtool.engine.ops.matmul_log2`."""
    exponents = (EXPONENT_BIAS - p.int()).clamp_(min=0)
    weights = exponents.masked_fill_(p == 2**bits - 1, 0).bitwise_left_shift_(23)
    sums = weights.view(torch.float32) @ (v.float() - v_zero.reshape(()))
    return sums.mul_(p_scale.reshape(()) * v_scale.reshape(()))


def _reach(zero: Tensor, top: int) -> int:
    """Largest magnitude of codes 0..top less their zero points."""
    if not zero.numel():
        return 0
    return max(int(zero.max()), top - int(zero.min()))


def _blocks(length: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `length` rows."""
    return [slice(start, start + size) for start in range(0, length, size)]


def _rows(parameter: Tensor, rows: slice) -> Tensor:
    """The rows of a per-token parameter (M, 1), or all of a per-tensor one (1, 1)."""
    return parameter if len(parameter) == 1 else parameter[rows]
