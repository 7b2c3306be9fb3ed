"""The packed format of weight codes: which bits lie where in a row.

A code of b bits is cut into fields of 4, 2 and 1 bits, the binary digits of b: 3 is 2 and 1, 7 is
4, 2 and 1; 8 bits stay whole. Fields of one width form a plane. The widest plane holds the low bits
of the code, the next one the bits above them.

In a plane of width f element k lies in byte k // (8 / f) at bit (k mod (8 / f)) * f, low bits
first. Every plane of a row takes ceil(K * f / 8) bytes; a row is its planes one after the other,
widest first; bits past the last element are zero.
"""

from __future__ import annotations

from typing import NamedTuple

MIN_BITS = 2
MAX_BITS = 8
FIELD_WIDTHS = (8, 4, 2, 1)


class Plane(NamedTuple):
    """One field plane of a packed row.

    Attributes:
        width: Bits of a field.
        low: Bit of the code at which the field begins.
        start: Byte of the packed row at which the plane begins.
        stop: Byte of the packed row at which the plane ends.
    """

    width: int
    low: int
    start: int
    stop: int


def planes(bits: int, in_features: int) -> tuple[Plane, ...]:
    """The field planes of a packed row, in the order in which they are stored.

    Args:
        bits: Width of a code, 2 to 8.
        in_features: Number of codes K in the row.
    """
    result: list[Plane] = []
    low = start = 0
    for width in FIELD_WIDTHS:
        if bits & width:
            stop = start + (in_features * width + 7) // 8
            result.append(Plane(width, low, start, stop))
            low, start = low + width, stop
    return tuple(result)


def packed_width(bits: int, in_features: int) -> int:
    """Bytes of a packed row of `in_features` codes of `bits` bits."""
    return sum((in_features * width + 7) // 8 for width in FIELD_WIDTHS if bits & width)
