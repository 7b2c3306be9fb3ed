"""Triton: batched integer product on int8 tensor cores, for attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def matmul_kernel(
    a: tl.tensor,
    a_scale: tl.tensor,
    a_zero: tl.tensor,
    b: tl.tensor,
    b_scale: tl.tensor,
    b_zero: tl.tensor,
    out: tl.tensor,
    inner: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    terms: tl.tensor,
    a_outer: tl.tensor,
    a_inner: tl.tensor,
    a_row: tl.tensor,
    a_term: tl.tensor,
    b_outer: tl.tensor,
    b_inner: tl.tensor,
    b_term: tl.tensor,
    b_column: tl.tensor,
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
    a_rows = a + batch // inner * a_outer + batch % inner * a_inner + m * a_row
    b_columns = b + batch // inner * b_outer + batch % inner * b_inner + n * b_column
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    a_sums = tl.zeros((BLOCK_M,), tl.int32)
    b_sums = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, terms, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = k < terms
        left = tl.load(
            a_rows[:, None] + (k * a_term)[None, :],
            mask=m_valid[:, None] & inside[None, :],
            other=128,
        )
        right = tl.load(
            b_columns[None, :] + (k * b_term)[:, None],
            mask=inside[:, None] & n_valid[None, :],
            other=128,
        )
        left = (left ^ 128).to(tl.int8, bitcast=True)
        right = (right ^ 128).to(tl.int8, bitcast=True)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        a_sums += tl.sum(left.to(tl.int32), 1)
        b_sums += tl.sum(right.to(tl.int32), 0)
    a_shift, b_shift = tl.load(a_zero) - 128, tl.load(b_zero) - 128
    sums -= (b_shift * a_sums)[:, None] + (a_shift * (b_sums - terms * b_shift))[None, :]
    result = sums.to(tl.float32) * (tl.load(a_scale) * tl.load(b_scale))
    offsets = batch * rows * columns + m[:, None] * columns + n[None, :]
    tl.store(out + offsets, result, mask=m_valid[:, None] & n_valid[None, :])


def matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Tensor:
    """Batched integer product; see `qtool.engine.ops.matmul`."""
    out = a_scale.new_empty(*a.shape[:-1], b.shape[-1])
    if out.numel() == 0:
        return out
    left, right = as_two_batches(a), as_two_batches(b)
    outer, inner, rows, terms = left.shape
    columns = right.shape[-1]
    blocks = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(columns, TILE["BLOCK_N"])
    with torch.cuda.device_of(a):
        matmul_kernel[(outer * inner * blocks,)](
            left,
            a_scale,
            a_zero,
            right,
            b_scale,
            b_zero,
            out,
            inner,
            rows,
            columns,
            terms,
            *left.stride(),
            *right.stride(),
            **TILE,
            **OPTIONS,
        )
    return out


def as_two_batches(matrices: Tensor) -> Tensor:
    """Matrices with any leading dimensions as (outer, inner, rows, columns), views if possible.

    Attention has the two batch dimensions image and head, whose strides seldom merge.
    """
    if matrices.dim() <= 4:
        return matrices[(None,) * (4 - matrices.dim())]
    return matrices.flatten(0, -4)
