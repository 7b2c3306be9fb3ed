"""Triton: attention from codes to codes, with no scores or probabilities in memory.

A program takes some queries of one head and walks over the keys twice, first for the largest score
and the sum of exponentials, then for the probabilities: their codes depend on that sum, so they
cannot be put right afterwards as floats can. Scores are products on int8 tensor cores, worked out
again on the second walk. So is the product with the values for evenly spaced levels; powers of two
take TF32 tensor cores, on which every term is exact, as in `matmul_log2`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.matmul_log2 import powers_of_two
from qtool.engine.kernels.quantize_log2 import log2_codes
from qtool.engine.kernels.quantize_uniform import uniform_codes

TILE = {"BLOCK_M": 64, "BLOCK_N": 32}
MIN_DEPTH = 32  # what a product on int8 tensor cores takes at least
# A limit on registers keeps ptxas from spilling some to fit more programs on a multiprocessor.
OPTIONS = {"num_warps": 8, "num_stages": 3, "maxnreg": 248, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def _centred(
    codes: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Codes of some tokens less 128 as int8 (token, BLOCK_D), zero outside."""
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < WIDTH)[None, :]
    codes = tl.load(codes + (token[:, None] * stride + d[None, :]), mask=inside, other=128)
    return (codes ^ 128).to(tl.int8, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _scores(
    query: tl.tensor,
    query_part: tl.tensor,
    query_shift: tl.tensor,
    keys: tl.tensor,
    key_shift: tl.tensor,
    scale: tl.tensor,
    maps: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    HAS_ADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Scores (queries, keys) of the keys `n` in float32, minus infinity past the last key."""
    n_valid = n < tokens
    key = _centred(keys, n, tokens, stride, WIDTH, BLOCK_D)
    key_part = query_shift * (tl.sum(key.to(tl.int32), 1) - WIDTH * key_shift)
    sums = tl.dot(query, tl.trans(key), out_dtype=tl.int32)
    sums -= query_part[:, None] + key_part[None, :]
    scores = sums.to(tl.float32) * scale
    if HAS_ADDED:
        inside = (m < tokens)[:, None] & n_valid[None, :]
        scores += tl.load(maps + (m[:, None] * tokens + n[None, :]), mask=inside, other=0.0)
    return tl.where(n_valid[None, :], scores, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(
    qkv: tl.tensor,
    qkv_scale: tl.tensor,
    qkv_zero: tl.tensor,
    added: tl.tensor,
    p_scale: tl.tensor,
    p_zero: tl.tensor,
    p_table: tl.tensor,
    out_scale: tl.tensor,
    out_zero: tl.tensor,
    out_table: tl.tensor,
    out: tl.tensor,
    part: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    windows: tl.tensor,
    WIDTH: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    IS_LOG2: tl.constexpr,
    HAS_P_TABLE: tl.constexpr,
    P_TOP: tl.constexpr,
    HAS_OUT_TABLE: tl.constexpr,
    OUT_TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Computes `out` (B, tokens, heads * WIDTH) for one head and some queries.

    Keys lie `part` codes behind the queries, and values as many behind the keys.
    """
    blocks = tl.cdiv(tokens, BLOCK_M)
    program = tl.program_id(0)
    element = (program // blocks // heads).to(tl.int64)
    head = program // blocks % heads
    m = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    m_valid = m < tokens
    stride = heads * WIDTH
    first = element * tokens * stride + head * WIDTH
    keys = qkv + first + part
    values = keys + part
    maps = added
    if HAS_ADDED:
        maps += (element % windows * heads + head) * tokens * tokens
    query = _centred(qkv + first, m, tokens, stride, WIDTH, BLOCK_D)
    query_shift, key_shift = tl.load(qkv_zero) - 128, tl.load(qkv_zero + 1) - 128
    query_part = key_shift * tl.sum(query.to(tl.int32), 1)
    scale = tl.load(qkv_scale) * tl.load(qkv_scale + 1)

    # From the lowest finite number up, so that a block of scores of minus infinity makes no NaN.
    highest = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        scores = _scores(
            query,
            query_part,
            query_shift,
            keys,
            key_shift,
            scale,
            maps,
            m,
            n,
            tokens,
            stride,
            HAS_ADDED,
            WIDTH,
            BLOCK_D,
        )
        before = highest
        highest = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(scores - highest[:, None]), 1)
    inverse = tl.div_rn(1.0, total)

    step = tl.load(p_scale)
    value_zero = tl.load(qkv_zero + 2)
    if IS_LOG2:
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    else:
        middle = tl.load(p_zero)
        sums = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        p_sums = tl.zeros((BLOCK_M,), tl.int32)
        value_sums = tl.zeros((BLOCK_D,), tl.int32)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        scores = _scores(
            query,
            query_part,
            query_shift,
            keys,
            key_shift,
            scale,
            maps,
            m,
            n,
            tokens,
            stride,
            HAS_ADDED,
            WIDTH,
            BLOCK_D,
        )
        p = tl.exp(scores - highest[:, None]) * inverse[:, None]
        value = _centred(values, n, tokens, stride, WIDTH, BLOCK_D)
        if IS_LOG2:  # keys past the last one have p = 0, whose code stands for zero
            power = powers_of_two(log2_codes(tl.div_rn(p, step), P_TOP), P_TOP)
            difference = value.to(tl.float32) - (value_zero - 128).to(tl.float32)
            sums = tl.dot(power, difference, sums, input_precision="tf32")
        else:
            code = uniform_codes(p, step, middle.to(tl.float32), P_TOP)
            if HAS_P_TABLE:
                code = tl.load(p_table + code).to(tl.int32)
            left = tl.where((n < tokens)[None, :], code - 128, 0).to(tl.int8)
            sums = tl.dot(left, value, sums, out_dtype=tl.int32)
            p_sums += tl.sum(left.to(tl.int32), 1)
            value_sums += tl.sum(value.to(tl.int32), 0)
    if IS_LOG2:
        attended = sums
    else:
        value_shift = value_zero - 128
        value_part = (middle - 128) * (value_sums - tokens * value_shift)
        sums -= (value_shift * p_sums)[:, None] + value_part[None, :]
        attended = sums.to(tl.float32)
    attended *= step * tl.load(qkv_scale + 2)
    found = uniform_codes(attended, tl.load(out_scale), tl.load(out_zero).to(tl.float32), OUT_TOP)
    inside = m_valid[:, None] & (d < WIDTH)[None, :]
    if HAS_OUT_TABLE:
        found = tl.load(out_table + found, mask=inside, other=0)
    target = m[:, None] * stride + d[None, :]
    tl.store(out + first + target, found.to(tl.uint8), mask=inside)


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
    out = qkv.new_empty(batch, tokens, heads * width)
    if out.numel() == 0:
        return out
    blocks = triton.cdiv(tokens, TILE["BLOCK_M"])
    with torch.cuda.device_of(qkv):
        attention_kernel[(batch * heads * blocks,)](
            qkv.contiguous(),
            qkv_scale.contiguous(),
            qkv_zero.contiguous(),
            None if added is None else added.contiguous(),
            p_scale,
            p_zero,
            None if p_table is None else p_table.contiguous(),
            out_scale,
            out_zero,
            None if out_table is None else out_table.contiguous(),
            out,
            batch * tokens * heads * width,
            tokens,
            heads,
            1 if added is None else len(added),
            WIDTH=width,
            HAS_ADDED=added is not None,
            IS_LOG2=p_zero is None,
            HAS_P_TABLE=p_table is not None,
            P_TOP=2**p_bits - 1 if p_table is None else 255,
            HAS_OUT_TABLE=out_table is not None,
            OUT_TOP=2**out_bits - 1 if out_table is None else 255,
            BLOCK_D=depth_of(width),
            **TILE,
            **OPTIONS,
        )
    return out


def depth_of(width: int) -> int:
    """The width of a head as the products take it."""
    return int(max(MIN_DEPTH, triton.next_power_of_2(width)))
