"""Triton: batched product of powers of two with codes, on TF32 tensor cores.

A power of two and the difference of two 8-bit codes are exact in TF32, and so is their product:
only the float32 sum rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.kernels.matmul import as_two_batches

TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def powers_of_two(code: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """What int32 codes stand for, as float32: 2^-code, zero for the top code."""
    means_zero = (code == TOP) | (code > 126)
    return tl.where(means_zero, 0, (127 - code) << 23).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def matmul_log2_kernel(
    p: tl.tensor,
    p_scale: tl.tensor,
    v: tl.tensor,
    v_scale: tl.tensor,
    v_zero: tl.tensor,
    out: tl.tensor,
    inner: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    terms: tl.tensor,
    p_outer: tl.tensor,
    p_inner: tl.tensor,
    p_row: tl.tensor,
    p_term: tl.tensor,
    v_outer: tl.tensor,
    v_inner: tl.tensor,
    v_term: tl.tensor,
    v_column: tl.tensor,
    TOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Computes one tile of one product (rows, columns) of the batch (outer, inner)."""
    n_blocks = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * n_blocks
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = (tile // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % n_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_valid, n_valid = m < rows, n < columns
    p_rows = p + batch // inner * p_outer + batch % inner * p_inner + m * p_row
    v_columns = v + batch // inner * v_outer + batch % inner * v_inner + n * v_column
    zero = tl.load(v_zero).to(tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, terms, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = k < terms
        code = tl.load(
            p_rows[:, None] + (k * p_term)[None, :],
            mask=m_valid[:, None] & inside[None, :],
            other=255,
        ).to(tl.int32)
        value = tl.load(
            v_columns[None, :] + (k * v_term)[:, None],
            mask=inside[:, None] & n_valid[None, :],
            other=0,
        )
        power = powers_of_two(code, TOP)
        sums = tl.dot(power, value.to(tl.float32) - zero, sums, input_precision="tf32")
    result = sums * (tl.load(p_scale) * tl.load(v_scale))
    offsets = batch * rows * columns + m[:, None] * columns + n[None, :]
    tl.store(out + offsets, result, mask=m_valid[:, None] & n_valid[None, :])


def matmul_log2(
    p: Tensor, p_scale: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, bits: int
) -> Tensor:
    """Batched product with powers of two; see `qtool.engine.ops.matmul_log2`."""
    out = p_scale.new_empty(*p.shape[:-1], v.shape[-1])
    if out.numel() == 0:
        return out
    left, right = as_two_batches(p), as_two_batches(v)
    outer, inner, rows, terms = left.shape
    columns = right.shape[-1]
    blocks = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(columns, TILE["BLOCK_N"])
    with torch.cuda.device_of(p):
        matmul_log2_kernel[(outer * inner * blocks,)](
            left,
            p_scale,
            right,
            v_scale,
            v_zero,
            out,
            inner,
            rows,
            columns,
            terms,
            *left.stride(),
            *right.stride(),
            TOP=2**bits - 1,
            **TILE,
            **OPTIONS,
        )
    return out
