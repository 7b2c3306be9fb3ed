"""Triton: power-of-two codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"BLOCK": 1024}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator]
def log2_codes(ratio: tl.tensor, TOP: tl.constexpr) -> tl.tensor:
    """Codes of float32 quotients as int32: the exponent field of a quotient is its code."""
    tiny = ratio < 1.1754943508222875e-38  # below the normal range the field would be zero
    normal = ratio * tl.where(tiny, 18446744073709551616.0, 1.0)
    # The addend lifts a mantissa above sqrt(1/2) (0x3504F3 in float32) into the exponent.
    field = (normal.to(tl.int32, bitcast=True) + (0x800000 - 0x3504F4)) >> 23
    code = tl.where(tiny, 64 + 127, 127) - field
    code = tl.minimum(tl.maximum(code, 0), TOP)
    return tl.where(ratio <= 0, TOP, code)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_log2_kernel(
    x: tl.tensor,
    scale: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantizes one block of `x` (count,)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    ratio = tl.div_rn(tl.load(x + index, mask=inside, other=0.0), tl.load(scale))
    tl.store(codes + index, log2_codes(ratio, TOP).to(tl.uint8), mask=inside)


def quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Power-of-two codes of `x`; see `qtool.engine.ops.quantize_log2`."""
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.uint8)
    if x.numel() == 0:
        return codes
    with torch.cuda.device_of(x):
        quantize_log2_kernel[(triton.cdiv(x.numel(), BLOCK["BLOCK"]),)](
            x, scale, codes, x.numel(), TOP=2**bits - 1, **BLOCK, **OPTIONS
        )
    return codes
