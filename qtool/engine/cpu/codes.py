"""Fast CPU versions of quantizing: a few passes over blocks that stay in the cache."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.engine.activations import activated
from qtool.engine.cpu import native
from qtool.engine.cpu.exact import blocks, some_rows
from qtool.engine.resident import derived

BLOCK_ELEMENTS = 1 << 18
SQRT_HALF_CARRY = 0x800000 - 0x3504F4  # lifts a mantissa above sqrt(1/2) into the exponent
EXPONENT_BIAS = 127
ROUNDING = 12582912.0
LONG_ROW = 256
GRID_BITS = 8
PAIRED = 1 << 12  # elements from which on a table of pairs pays


def quantize_uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Uniform codes of `x`; see `qtool.engine.ops.quantize_uniform`."""
    if _takes_one_pass(scale, zero_point):
        return _in_one_pass(x, scale, zero_point, None, bits)
    width = x.shape[-1]
    values = x.reshape(math.prod(x.shape[:-1]), width)
    codes = torch.empty_like(values, dtype=torch.uint8)
    scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    top = 2**bits - 1
    for rows in blocks(len(values), max(1, BLOCK_ELEMENTS // max(1, width))):
        zero = some_rows(zero_point, rows).float()
        # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits.
        shifted = (values[rows] / some_rows(scale, rows)).add_(ROUNDING)
        shifted.clamp_(ROUNDING - zero, ROUNDING + top - zero)
        codes[rows].copy_(shifted.view(torch.int32)).add_(zero.to(torch.uint8))
    return codes.view(x.shape)


def quantize_table(x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor) -> Tensor:
    """Levels of `x`; see `qtool.engine.ops.quantize_table`."""
    if _takes_one_pass(scale, zero_point):
        return _in_one_pass(x, scale, zero_point, table, GRID_BITS)
    return look_up(quantize_uniform(x, scale, zero_point, GRID_BITS), table)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    bits: int,
    activation: str = "none",
) -> Tensor:
    """Uniform codes, or levels where there is a table, after "relu", "relu6" or nothing."""
    if _takes_one_pass(scale, zero_point):
        return _in_one_pass(x, scale, zero_point, table, bits, activation)
    x = activated(x, activation)
    if table is None:
        return quantize_uniform(x, scale, zero_point, bits)
    return quantize_table(x, scale, zero_point, table)


def quantize_into(
    out: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, table: Tensor | None, bits: int
) -> None:
    """Write what `quantize` returns into a uint8 tensor.

    Args:
        out: uint8, of four dimensions and with a contiguous last one, as `x`.
        x: float32.
        scale: One element.
        zero_point: One element.
        table: uint8 (256,) or None.
        bits: Width of a uniform code.
    """
    if _takes_one_pass(scale, zero_point):
        native.codes(x, out, native.quantizer(scale, zero_point, table, bits))
    else:
        out.copy_(quantize(x, scale, zero_point, table, bits))


def levels(codes: Tensor, zero_point: Tensor) -> Tensor:
    """Codes less their zero point as contiguous float32; four dimensions, the last contiguous."""
    if native.library() is None:
        return (codes.float() - zero_point).contiguous()
    found = torch.empty(codes.shape, dtype=torch.float32)
    native.widen(codes, found, float(zero_point))
    return found


def _takes_one_pass(scale: Tensor, zero_point: Tensor) -> bool:
    return scale.numel() == zero_point.numel() == 1 and native.library() is not None


def _in_one_pass(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    table: Tensor | None,
    bits: int,
    activation: str = "none",
) -> Tensor:
    """Codes or levels by compiled code."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    values = x.permute(0, 2, 3, 1) if last else x.contiguous()
    codes = torch.empty_like(values, dtype=torch.uint8)
    row = 1
    for size in reversed(values.shape):
        if row >= LONG_ROW:
            break
        row *= size
    shape = (1, 1, values.numel() // max(1, row), row)
    how = native.quantizer(scale, zero_point, table, bits, activation=activation)
    native.codes(values.view(shape), codes.view(shape), how)
    return codes.permute(0, 3, 1, 2) if last else codes


def look_up(fine: Tensor, table: Tensor) -> Tensor:
    """Levels of contiguous fine codes: two at a time, which halves the lookups.

    Args:
        fine: uint8 of any shape; with several tables its first dimension counts them.
        table: uint8 (256,) or (G, 256).
    """
    groups = fine.view(1 if table.dim() == 1 else len(table), -1)
    if groups.shape[1] < PAIRED or groups.shape[1] % 2:
        tables = table.view(-1, 256)
        found = [t.index_select(0, g.int()) for t, g in zip(tables, groups, strict=True)]
    else:
        pairs = derived(_pairs, table)
        found = [
            t.index_select(0, g.view(torch.uint16).int()).view(torch.uint8)
            for t, g in zip(pairs, groups, strict=True)
        ]
    return (found[0] if len(found) == 1 else torch.cat(found)).view(fine.shape)


def _pairs(table: Tensor) -> Tensor:
    """Levels of every two fine codes as they lie in memory, (G, 65536) of two bytes each."""
    first, second = table.view(-1, 1, 256, 1), table.view(-1, 256, 1, 1)
    both = torch.cat(torch.broadcast_tensors(first, second), dim=-1)
    return both.contiguous().view(torch.int16).flatten(1)


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
    values = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return quantize(values, scale, zero_point, table, bits)


def quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Power-of-two codes of `x`; see `qtool.engine.ops.quantize_log2`.

    The exponent field of the quotient, with a carry where its mantissa lies above sqrt(1/2), is the
    code up to sign.
    """
    top = 2**bits - 1
    values = x.reshape(-1)
    codes = torch.empty_like(values, dtype=torch.uint8)
    for block in blocks(len(values), BLOCK_ELEMENTS):
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
