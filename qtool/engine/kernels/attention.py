"""Triton: attention from codes to codes, with no scores or probabilities in memory.

A program takes some queries of one head. Up to `ONE_PASS_TOKENS` keys fit its registers at once.
Beyond that it walks over the keys twice, first for the largest score and the sum of exponentials,
then for the probabilities: their codes depend on that sum, so they cannot be put right afterwards
as floats can. Scores are products on int8 tensor cores. The product with the values is one of
float16, which holds the difference of two codes and every power of two that 4 bits can name, and
float32 sums of up to 256 such products of differences are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.matmul_log2 import powers_of_two
from qtool.engine.kernels.overlap import overlap, wait_for_inputs
from qtool.engine.kernels.quantize_log2 import log2_codes
from qtool.engine.kernels.registers import (
    exp2,
    levels_of,
    lifted_codes,
    lifted_halves,
    sum_of_bytes,
)
from qtool.engine.kernels.tiles import is_tuned
from qtool.engine.resident import derived

MIN_DEPTH = 32  # what a product on int8 tensor cores takes at least
ONE_PASS_TOKENS = 256
ONE_PASS_WIDTH = 64
FILLED_MATRICES = 256  # heads of all pictures that keep every multiprocessor busy
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Form(NamedTuple):
    """How a program goes about its queries.

    Attributes:
        queries: Queries of a program.
        keys: Keys at once.
        one_pass: Whether these are all keys.
        warps: Warps of a program.
        steps: Blocks of queries that a program takes one after the other.
    """

    queries: int
    keys: int
    one_pass: bool
    warps: int
    steps: int = 1

    def constants(self) -> dict[str, int | bool]:
        """Constants of the kernel."""
        blocks = {"BLOCK_M": self.queries, "BLOCK_N": self.keys}
        return {**blocks, "ONE_PASS": self.one_pass, "STEPS": self.steps}

    def options(self) -> dict[str, int | bool]:
        """Options of the compiler; contracting multiplication and addition would change bits."""
        stages = 1 if self.one_pass else 3  # how many blocks of keys or queries are under way
        return {"num_warps": self.warps, "num_stages": stages, "enable_fp_fusion": False}


def form_of(tokens: int, width: int, matrices: int, *, added: bool, tuned: bool = True) -> Form:
    """How to attend over so many tokens in so many heads of this width."""
    fitting = ONE_PASS_TOKENS // 2 if added or not tuned else ONE_PASS_TOKENS
    if tokens <= fitting and width <= ONE_PASS_WIDTH:
        keys = max(MIN_DEPTH, triton.next_power_of_2(tokens))
        # Keys and values are made ready once for all queries, if that leaves enough programs.
        steps = triton.cdiv(tokens, 64) if matrices >= FILLED_MATRICES else 1
        return Form(64, keys, one_pass=True, warps=4, steps=steps)
    wide = width > ONE_PASS_WIDTH
    keys = 32 if added or wide or not tuned else 64
    return Form(64, keys, one_pass=False, warps=8 if wide else 4)


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
def _keys(
    keys: tl.tensor,
    n: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Codes of the keys `n` less 128 as int8 (BLOCK_D, key), and the sum of each one's codes.

    The sums lack what all keys have in common: softmax does not see it.
    """
    key = _centred(keys, n, tokens, stride, WIDTH, BLOCK_D)
    if WIDTH % 4 == 0:
        word = tl.arange(0, BLOCK_D // 4)
        there = (n < tokens)[:, None] & (word < WIDTH // 4)[None, :]
        at = n[:, None] * (stride // 4) + word[None, :]
        words = tl.load(keys.to(tl.pointer_type(tl.int32)) + at, mask=there, other=0)
        key_sums = tl.sum(sum_of_bytes(words), 1)
    else:
        key_sums = tl.sum(key.to(tl.int32), 1)
    return tl.trans(key), key_sums


@triton.jit  # type: ignore[untyped-decorator]
def _scores(
    query: tl.tensor,
    key: tl.tensor,
    key_part: tl.tensor,
    scale: tl.tensor,
    maps: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    tokens: tl.tensor,
    HAS_ADDED: tl.constexpr,
) -> tl.tensor:
    """Scores (queries, keys) of the keys `n`, minus infinity past the last key.

    They are sums of codes, or values in units of ln 2 where something is added to them.
    """
    scores = (tl.dot(query, key, out_dtype=tl.int32) - key_part[None, :]).to(tl.float32)
    if HAS_ADDED:
        inside = (m < tokens)[:, None] & (n < tokens)[None, :]
        more = tl.load(maps + (m[:, None] * tokens + n[None, :]), mask=inside, other=0.0)
        scores = scores * (scale * LOG2_E) + more * LOG2_E
    return tl.where((n < tokens)[None, :], scores, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _powers(scores: tl.tensor, highest: tl.tensor, unit: tl.tensor) -> tl.tensor:
    """Exponentials of scores less the highest one of each query."""
    return exp2(tl.fma(scores, unit, -(highest * unit)[:, None]))


@triton.jit  # type: ignore[untyped-decorator]
def _differences(
    codes: tl.tensor,
    zero: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Codes of some tokens less their zero point in float16 (token, BLOCK_D), zero outside."""
    d = tl.arange(0, BLOCK_D)
    inside = (token < tokens)[:, None] & (d < WIDTH)[None, :]
    at = codes + (token[:, None] * stride + d[None, :])
    return lifted_halves(tl.load(at, mask=inside, other=zero)) - (1024 + zero).to(tl.float16)


@triton.jit  # type: ignore[untyped-decorator]
def _attended(
    powers: tl.tensor,
    factor: tl.tensor,
    zero: tl.tensor,
    table: tl.tensor,
    values: tl.tensor,
    IS_LOG2: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    TOP: tl.constexpr,
) -> tl.tensor:
    """The quantized probabilities `powers * factor * step` times values, in units of `step`.

    The values of keys past the last one are zero.
    """
    if IS_LOG2:
        code = log2_codes(powers * factor[:, None], TOP)
        if TOP <= 15:
            bits = tl.where(code == TOP, 0, (15 - code) << 10).to(tl.int16)
            sums = tl.dot(bits.to(tl.float16, bitcast=True), values, out_dtype=tl.float32)
        else:
            p = powers_of_two(code, TOP)
            sums = tl.dot(p, values.to(tl.float32), input_precision="tf32")
    else:
        level = tl.fma(powers, factor[:, None], zero.to(tl.float32))
        if HAS_TABLE:
            p = levels_of(table, lifted_codes(level, TOP, IS_POSITIVE=True))
        else:  # as floats, which hold them as well
            p = (tl.minimum(level, TOP) + 12582912.0) - (12582912.0 + zero.to(tl.float32))
            p = p.to(tl.float16)
        sums = tl.dot(p, values, out_dtype=tl.float32)
    return sums


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
    OVERLAPS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Computes `out` (B, tokens, heads * WIDTH) for one head and `STEPS` blocks of queries.

    Keys lie `part` codes behind the queries, and values as many behind the keys.
    """
    wait_for_inputs(OVERLAPS)
    parts = tl.cdiv(tokens, BLOCK_M * STEPS)
    program = tl.program_id(0)
    element = (program // parts // heads).to(tl.int64)
    head = program // parts % heads
    d = tl.arange(0, BLOCK_D)
    stride = heads * WIDTH
    first = element * tokens * stride + head * WIDTH
    keys = qkv + first + part
    values = keys + part
    maps = added
    if HAS_ADDED:
        maps += (element % windows * heads + head) * tokens * tokens
    query_shift = tl.load(qkv_zero) - 128
    scale = tl.load(qkv_scale) * tl.load(qkv_scale + 1)
    unit = 1.0 if HAS_ADDED else scale * LOG2_E
    step = tl.load(p_scale)
    value_zero = tl.load(qkv_zero + 2)
    zero = value_zero if IS_LOG2 else tl.load(p_zero)
    out_step = tl.div_rn(step * tl.load(qkv_scale + 2), tl.load(out_scale))
    out_middle = tl.load(out_zero).to(tl.float32)
    n = tl.arange(0, BLOCK_N)
    if ONE_PASS:
        value = _differences(values, value_zero, n, tokens, stride, WIDTH, BLOCK_D)
        key, key_sums = _keys(keys, n, tokens, stride, WIDTH, BLOCK_D)
        key_part = query_shift * key_sums
    for turn in range(STEPS):
        m = (program % parts * STEPS + turn) * BLOCK_M + tl.arange(0, BLOCK_M)
        query = _centred(qkv + first, m, tokens, stride, WIDTH, BLOCK_D)
        if ONE_PASS:
            scores = _scores(query, key, key_part, scale, maps, m, n, tokens, HAS_ADDED)
            # No lower than the lowest finite number, so that scores of minus infinity make no NaN.
            highest = tl.maximum(tl.max(scores, 1), LOWEST)
            powers = _powers(scores, highest, unit)
            factor = tl.div_rn(1.0, tl.sum(powers, 1) * step)
            attended = _attended(powers, factor, zero, p_table, value, IS_LOG2, HAS_P_TABLE, P_TOP)
        else:
            highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, tokens, BLOCK_N):
                key, key_sums = _keys(keys, start + n, tokens, stride, WIDTH, BLOCK_D)
                key_part = query_shift * key_sums
                scores = _scores(query, key, key_part, scale, maps, m, start + n, tokens, HAS_ADDED)
                before = highest
                highest = tl.maximum(highest, tl.max(scores, 1))
                powers = _powers(scores, highest, unit)
                total = total * exp2((before - highest) * unit) + tl.sum(powers, 1)
            factor = tl.div_rn(1.0, total * step)
            attended = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            sums = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
            for start in range(0, tokens, BLOCK_N):
                key, key_sums = _keys(keys, start + n, tokens, stride, WIDTH, BLOCK_D)
                key_part = query_shift * key_sums
                scores = _scores(query, key, key_part, scale, maps, m, start + n, tokens, HAS_ADDED)
                powers = _powers(scores, highest, unit)
                value = _differences(values, value_zero, start + n, tokens, stride, WIDTH, BLOCK_D)
                some = _attended(powers, factor, zero, p_table, value, IS_LOG2, HAS_P_TABLE, P_TOP)
                if IS_LOG2:
                    attended += some
                else:
                    sums += some.to(tl.int32)
            if not IS_LOG2:
                attended = sums.to(tl.float32)
        lifted = lifted_codes(tl.fma(attended, out_step, out_middle), OUT_TOP)
        levels = levels_of(out_table, lifted) if HAS_OUT_TABLE else lifted.to(tl.uint8)
        written = (m < tokens)[:, None] & (d < WIDTH)[None, :]
        tl.store(out + first + (m[:, None] * stride + d[None, :]), levels, mask=written)


def _table_of_differences(table: Tensor, zero: Tensor) -> Tensor:
    """Levels of a table less their zero point in float16."""
    return (table.int() - zero).to(torch.float16)


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
    p_levels = None
    if p_table is not None and p_zero is not None:
        p_levels = derived(_table_of_differences, p_table, p_zero)
    form = form_of(
        tokens, width, batch * heads, added=added is not None, tuned=is_tuned(qkv.device)
    )
    blocks = triton.cdiv(tokens, form.queries * form.steps)
    with torch.cuda.device_of(qkv):
        attention_kernel[(batch * heads * blocks,)](
            qkv.contiguous(),
            qkv_scale.contiguous(),
            qkv_zero.contiguous(),
            None if added is None else added.contiguous(),
            p_scale,
            p_zero,
            p_levels,
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
            **form.constants(),
            **form.options(),
            **overlap(qkv.device),
        )
    return out


def depth_of(width: int) -> int:
    """The width of a head as the products take it."""
    return int(max(MIN_DEPTH, triton.next_power_of_2(width)))
