"""Triton: packing of codes, one launch for each field plane."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.engine.packing import packed_width, planes

BLOCK = {"BLOCK_ROWS": 16, "BLOCK_BYTES": 64}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def pack_codes_kernel(
    codes: tl.tensor,
    packed: tl.tensor,
    rows: tl.tensor,
    in_features: tl.tensor,
    row_bytes: tl.tensor,
    start: tl.tensor,
    plane_bytes: tl.tensor,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
) -> None:
    """Packs one tile of a plane whose fields are `WIDTH` bits of the codes from bit `LOW` on."""
    blocks = tl.cdiv(plane_bytes, BLOCK_BYTES)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    byte = (program % blocks) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    valid = (row < rows)[:, None]
    total = tl.zeros((BLOCK_ROWS, BLOCK_BYTES), tl.int32)
    for field in tl.static_range(8 // WIDTH):
        k = byte * (8 // WIDTH) + field
        offsets = row[:, None] * in_features + k[None, :]
        code = tl.load(codes + offsets, mask=valid & (k < in_features)[None, :], other=0)
        total |= ((code.to(tl.int32) >> LOW) & ((1 << WIDTH) - 1)) << (field * WIDTH)
    offsets = row[:, None] * row_bytes + start + byte[None, :]
    tl.store(packed + offsets, total.to(tl.uint8), mask=valid & (byte < plane_bytes)[None, :])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed rows (N, bytes) of codes (N, K); see `qtool.engine.packing` for the format."""
    rows, in_features = codes.shape
    codes = codes.contiguous()
    packed = codes.new_empty(rows, packed_width(bits, in_features))
    if packed.numel() == 0:
        return packed
    with torch.cuda.device_of(codes):
        for width, low, start, stop in planes(bits, in_features):
            blocks = triton.cdiv(stop - start, BLOCK["BLOCK_BYTES"])
            pack_codes_kernel[(triton.cdiv(rows, BLOCK["BLOCK_ROWS"]) * blocks,)](
                codes,
                packed,
                rows,
                in_features,
                packed.shape[1],
                start,
                stop - start,
                WIDTH=width,
                LOW=low,
                **BLOCK,
                **OPTIONS,
            )
    return packed
