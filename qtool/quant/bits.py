"""Bit-widths as people write them: `w4a4` is four bits for weights and four for activations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from qtool.errors import UsageError

WEIGHT_BITS: Final = (2, 3, 4, 5, 6, 7, 8)
ACTIVATION_BITS: Final = (*WEIGHT_BITS, 16, 32)

_GRAMMAR = re.compile(r"w([2-8])a([2-8]|16|32)", re.IGNORECASE | re.ASCII)
_SWITCHABLE = re.compile(r"any(?::([2-8])-([2-8])|:([2-8](?:,[2-8])*))?", re.IGNORECASE | re.ASCII)
_DEFAULT_RANGE = (4, 8)
_ACTIVATION = 8
_REMEDY = (
    "write w, the bits of weights (2 to 8), a, the bits of activations; for example w4a4 or w8a8"
)


@dataclass(frozen=True, order=True)
class BitSpec:
    """Bits per weight and per activation.

    Args:
        weight: Bits of a weight code, 2 to 8.
        activation: Bits of an activation code, 2 to 8; 16 and 32 mean floating point.

    Raises:
        UsageError: A width is outside the grammar.
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        if self.weight not in WEIGHT_BITS or self.activation not in ACTIVATION_BITS:
            raise UsageError(f"there is no bit-width {self}", remedy=_REMEDY)

    @classmethod
    def parse(cls, text: str) -> BitSpec:
        """Read `w[2-8]a([2-8]|16|32)`, upper or lower case.

        Raises:
            UsageError: The text is not one bit-width.
        """
        match = _GRAMMAR.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is not a bit-width", remedy=_REMEDY)
        return cls(int(match[1]), int(match[2]))

    @property
    def integer(self) -> bool:
        """Whether activations are integer codes too, as the integer engine needs."""
        return self.activation <= 8

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


def parse_range(text: str) -> tuple[int, ...] | None:
    """Read `any`, `any:LO-HI` or `any:A,B,...`, the widths of a switchable checkpoint.

    Returns:
        The weight bits, rising; `any` alone is 4 to 8, what post-training quantization can do well.
        None where the text is something else.

    Raises:
        UsageError: LO is above HI.
    """
    match = _SWITCHABLE.fullmatch(text)
    if match is None:
        return None
    if match[3]:
        return tuple(sorted({int(bits) for bits in match[3].split(",")}))
    low, high = (int(match[1]), int(match[2])) if match[1] else _DEFAULT_RANGE
    if low > high:
        raise UsageError(f"{text!r} is an empty range", remedy=f"write any:{high}-{low}")
    return tuple(range(low, high + 1))


def parse_width(width: int | str) -> BitSpec:
    """Read a width of a switchable checkpoint: `wNaM`, or N alone for N-bit weights.

    Activations of N alone stay at 8 bits: they are not stored, and the integer engine multiplies
    8-bit numbers as fast as narrower ones.

    Raises:
        UsageError: It is neither.
    """
    text = str(width).strip()
    if not isinstance(width, bool) and re.fullmatch("[2-8]", text, re.ASCII):
        return BitSpec(int(text), _ACTIVATION)
    if _GRAMMAR.fullmatch(text):
        return BitSpec.parse(text)
    raise UsageError(
        f"{text!r} is not a bit-width of a switchable checkpoint",
        remedy="write the bits of weights, 2 to 8, or both, for example 4 or w4a4",
    )


def parse_average(text: str) -> float | None:
    """Read `mixed:AVG`, a mean width with bits chosen layer by layer; None if it is something else.

    Raises:
        UsageError: The mean is not between 2 and 8.
    """
    name, separator, number = text.strip().lower().partition(":")
    if name != "mixed":
        return None
    average = float(number) if re.fullmatch(r"\d+(\.\d+)?", number, re.ASCII) else 0.0
    if not separator or not WEIGHT_BITS[0] <= average <= WEIGHT_BITS[-1]:
        raise UsageError(
            f"{text!r} is not a mean bit-width",
            remedy="write mixed: and a number from 2 to 8, for example mixed:4.0",
        )
    return average


def parse_rule(text: str) -> tuple[str, BitSpec]:
    """Read `GLOB=BITS`, a bit-width for the layers whose names match; `head=8` means `head=w8a8`.

    Raises:
        UsageError: There is no `=`, no glob, or the bits are not 2 to 8.
    """
    glob, separator, bits = text.rpartition("=")
    if not separator or not glob.strip():
        raise UsageError(
            f"{text!r} is not GLOB=BITS",
            remedy="name layers and their bits, for example 'head=w8a8' or 'blocks.0.*=8'",
        )
    spec = BitSpec.parse(f"w{bits}a{bits}" if re.fullmatch("[2-8]", bits) else bits.strip())
    if not spec.integer:
        raise UsageError(
            f"{text!r} keeps activations in floating point, which the integer engine cannot do",
            remedy="give 2 to 8 bits, or leave the layer in float with --skip GLOB",
        )
    return glob.strip(), spec
