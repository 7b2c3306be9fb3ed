"""Triton: what kernels do with values that are in registers, cheaper than Triton's own ways.

Interpreted kernels take those: the interpreter has no assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.engine.dispatch import INTERPRETED

_COMPILES = tl.constexpr(not INTERPRETED)
_LIFT = tl.constexpr(0x4B000000)  # the bits of 2^23 in float32

# The bytes at $1 plus $5 to $8, four in a register.
_FOUR_ENTRIES = tl.constexpr("""{
    .reg .u64 at<4>;
    .reg .u32 entry<4>;
    cvt.u64.u32 at0, $5; add.u64 at0, at0, $1; ld.global.nc.u8 entry0, [at0];
    cvt.u64.u32 at1, $6; add.u64 at1, at1, $1; ld.global.nc.u8 entry1, [at1];
    cvt.u64.u32 at2, $7; add.u64 at2, at2, $1; ld.global.nc.u8 entry2, [at2];
    cvt.u64.u32 at3, $8; add.u64 at3, at3, $1; ld.global.nc.u8 entry3, [at3];
    prmt.b32 entry0, entry0, entry1, 0x0040;
    prmt.b32 entry2, entry2, entry3, 0x0040;
    prmt.b32 $0, entry0, entry2, 0x5410;
}""")
# The halves at $1 plus twice $3 and $4, two in a register.
_TWO_ENTRIES = tl.constexpr("""{
    .reg .u64 at<2>;
    .reg .b16 entry<2>;
    mad.wide.u32 at0, $3, 2, $1; ld.global.nc.b16 entry0, [at0];
    mad.wide.u32 at1, $4, 2, $1; ld.global.nc.b16 entry1, [at1];
    mov.b32 $0, {entry0, entry1};
}""")
_FOUR_HALVES = tl.constexpr(
    "prmt.b32 $0, $2, 0x64646464, 0x4140; prmt.b32 $1, $2, 0x64646464, 0x4342;"
)


@triton.jit  # type: ignore[untyped-decorator]
def exp2(x: tl.tensor) -> tl.tensor:
    """2 to the power of float32 `x`, within two units in the last place; no subnormal numbers."""
    if _COMPILES:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        power = tl.exp2(tl.minimum(x, 127.0))  # numpy warns of what is beyond
    return power


@triton.jit  # type: ignore[untyped-decorator]
def reciprocal(x: tl.tensor) -> tl.tensor:
    """1 over float32 `x`, within a unit in the last place; no subnormal numbers."""
    if _COMPILES:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit  # type: ignore[untyped-decorator]
def lifted_codes(
    levels: tl.tensor, TOP: tl.constexpr, IS_POSITIVE: tl.constexpr = False
) -> tl.tensor:
    """Codes next to float32 `levels` (values over steps plus zero points), last byte of int32.

    For the end of a kernel: without a division, and a level in the middle between two codes gets
    the even one also where the zero point is odd.
    """
    # Beside 2^23 there is no room for a fraction: the sum is rounded, and its last bits are whole.
    inside = tl.minimum(levels if IS_POSITIVE else tl.maximum(levels, 0.0), TOP)
    return (inside + 8388608.0).to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def levels_of(table: tl.tensor, lifted: tl.tensor) -> tl.tensor:
    """Entries of a table of uint8 or float16 for what `lifted_codes` returned.

    A load of Triton's own would move everything to threads that suit its addresses, and back.
    """
    if not _COMPILES:
        levels = tl.load(table + (lifted - _LIFT))
    elif table.dtype.element_ty == tl.float16:
        levels = tl.inline_asm_elementwise(
            _TWO_ENTRIES,
            "=r,l,l,r,r",
            [table.to(tl.int64) - 2 * _LIFT, lifted],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        levels = tl.inline_asm_elementwise(
            _FOUR_ENTRIES,
            "=r,l,l,l,l,r,r,r,r",
            [table.to(tl.int64) - _LIFT, lifted],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    return levels


@triton.jit  # type: ignore[untyped-decorator]
def lifted_halves(codes: tl.tensor) -> tl.tensor:
    """uint8 `codes` plus 1024 in float16, whose last bits are whole there: no conversion."""
    if _COMPILES:
        halves = tl.inline_asm_elementwise(
            _FOUR_HALVES, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        halves = codes.to(tl.float16) + 1024.0
    return halves


@triton.jit  # type: ignore[untyped-decorator]
def sum_of_bytes(words: tl.tensor) -> tl.tensor:
    """The sum of the four bytes of every int32 word."""
    if _COMPILES:
        sums = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, 0;",
            "=r,r",
            [words],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        sums = (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24 & 255)
    return sums
