"""Triton: unpacking of codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"BLOCK_ROWS": 16, "BLOCK_WIDTH": 128}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def unpack_codes_kernel(
    packed: tl.tensor,
    codes: tl.tensor,
    rows: tl.tensor,
    in_features: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
) -> None:
    """Unpacks one tile of codes (rows, in_features)."""
    blocks = tl.cdiv(in_features, BLOCK_WIDTH)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = (program % blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (k < in_features)[None, :]
    plane = packed + row[:, None] * row_bytes
    code = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.int32)
    for digit in tl.static_range(3, -1, -1):  # field widths 8, 4, 2, 1: the binary digits of BITS
        if BITS & (1 << digit):
            byte = tl.load(plane + (k >> (3 - digit))[None, :], mask=inside, other=0).to(tl.int32)
            shift = (k & ((8 >> digit) - 1)) << digit
            low = BITS & (14 << digit)
            code |= ((byte >> shift[None, :]) & ((1 << (1 << digit)) - 1)) << low
            plane += ((in_features << digit) + 7) >> 3
    offsets = row[:, None] * in_features + k[None, :]
    tl.store(codes + offsets, code.to(tl.uint8), mask=inside)


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes (N, K) of packed rows (N, bytes): the inverse of `pack_codes`."""
    packed = packed.contiguous()
    codes = packed.new_empty(packed.shape[0], in_features)
    if codes.numel() == 0:
        return codes
    blocks = triton.cdiv(in_features, BLOCK["BLOCK_WIDTH"])
    with torch.cuda.device_of(packed):
        unpack_codes_kernel[(triton.cdiv(len(packed), BLOCK["BLOCK_ROWS"]) * blocks,)](
            packed,
            codes,
            len(packed),
            in_features,
            packed.shape[1],
            BITS=bits,
            **BLOCK,
            **OPTIONS,
        )
    return codes
