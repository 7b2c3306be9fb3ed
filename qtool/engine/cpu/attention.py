"""Fast CPU versions of the products of attention, one by one and all in one."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.engine.cpu import codes as quantizers
from qtool.engine.cpu import exact

EXPONENT_BIAS = quantizers.EXPONENT_BIAS
BLOCK_SCORES = 1 << 19


def matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Tensor:
    """Batched integer product; see `qtool.engine.ops.matmul`."""
    scale = a_scale.reshape(()) * b_scale.reshape(())
    if not exact.has_int8_units():
        reach = exact.reach(a_zero, 255) * exact.reach(b_zero, 255)
        sums = exact.float_sums(a.float() - a_zero, b.float() - b_zero, reach=reach)
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
    _, batch, tokens, heads, width = qkv.shape
    p_reach = 1 if p_zero is None else 255 if p_table is not None else 2**p_bits - 1
    out = qkv.new_empty(batch, tokens, heads * width)
    if not out.numel():
        return out
    by_head = out.view(batch, tokens, heads, width).transpose(1, 2)
    size = max(1, BLOCK_SCORES // max(1, heads * tokens * tokens))
    if added is not None:  # so that every block begins with the first of the added maps
        size = -(-size // len(added)) * len(added)
    for some in exact.blocks(batch, size):
        query, key, value = (
            quantizers.levels(part[some].transpose(1, 2), zero).flatten(0, 1)
            for part, zero in zip(qkv.contiguous(), qkv_zero, strict=True)
        )
        scores = exact.float_sums(query, key.transpose(1, 2), reach=255 * 255).float()
        scores = scores.mul_(qkv_scale[0] * qkv_scale[1]).unflatten(0, (-1, heads))
        if added is not None:
            scores = (scores.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
        powers = _probabilities(F.softmax(scores, dim=-1), p_scale, p_zero, p_table, p_bits)
        sums = exact.float_sums(powers.flatten(0, 1), value, reach=255 * p_reach).float()
        attended = sums.mul_(p_scale.reshape(()) * qkv_scale[2]).unflatten(0, (-1, heads))
        quantizers.quantize_into(by_head[some], attended, out_scale, out_zero, out_table, out_bits)
    return out


def _probabilities(
    p: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int
) -> Tensor:
    """Levels of probabilities as float32: codes less their zero point, or powers of two."""
    if zero is None:
        return powers_of_two(p.div_(scale), bits)
    return quantizers.levels(quantizers.quantize(p, scale, zero, table, bits), zero)


def powers_of_two(ratio: Tensor, bits: int) -> Tensor:
    """The power of two that `quantize_log2` stands for, 0 for the top code; overwrites `ratio`."""
    last = min(2**bits - 2, EXPONENT_BIAS - 1)
    field = ratio.view(torch.int32).add_(quantizers.SQRT_HALF_CARRY).bitwise_and_(~0x7FFFFF)
    powers = field.view(torch.float32).clamp_(max=1.0)
    return torch.threshold_(powers, 2.0 ** -(last + 0.5), 0.0)
