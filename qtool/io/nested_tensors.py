"""The tensors of switchable layers in a checkpoint, and what can be wrong with them.

| tensor                    | type | shape                     | content                      |
|---------------------------|------|---------------------------|------------------------------|
| `NAME.p1` .. `NAME.p4`    | U8   | (N, ceil(K / 4))          | base-4 digits of 8-bit codes |
| `NAME.d2`                 | U8   | (N, ceil(K / 4))          | own codes of 2 bits, if any  |
| `NAME.alpha`              | F16  | (weight widths, N)        | scales of rows               |
| `NAME.delta`              | F16  | (weight widths, N)        | bias, corrected per width    |
| `NAME.act`                | F32  | (activation widths, 2)    | scale, zero point            |
| `NAME.act_table`          | U8   | (bytes,)                  | packed tables, if any        |
| `NAME.products.act`       | F32  | (activation widths, 4, 2) | of q, k, softmax, v          |
| `NAME.products.act_table` | U8   | (bytes,)                  | packed tables, if any        |

Four digits lie in a byte, low bits first. A packed table of b bits is 32 bytes that mark the fine
codes at which the next level begins, low bits first, and 2^b bytes of levels. Everything but planes
comes first in the file, then all p1, all p2, p3, p4, each a section: a reader of 4 bits needs no
more than a prefix, and a file cut off behind a section is a smaller file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qtool.io.container import shown

MAX_PLANES = 4
DIGIT_BITS = 2
TABLE_MARKS = 32
NARROW = 8
"""Activations of fewer bits may have a table."""

_PLANE = re.compile(r"p([1-4])", re.ASCII)
_OPERANDS = 4
_LINEAR = frozenset({"alpha", "delta", "act"})


def plane_of(leaf: str) -> int:
    """Number of the plane that a tensor's last name stands for, 1 to 4; 0 for other tensors."""
    match = _PLANE.fullmatch(leaf)
    return int(match[1]) if match else 0


def planes_for(bits: int, *, dedicated: bool = False) -> int:
    """Number of 2-bit planes that hold so many bits; none if 2 bits have codes of their own."""
    return 0 if dedicated and bits == DIGIT_BITS else (bits + 1) // DIGIT_BITS


def bits_of(planes: int) -> int:
    """The most bits that so many planes hold."""
    return DIGIT_BITS * planes


def table_bytes(activation: Sequence[int], operands: int = 1) -> int:
    """Bytes of the packed tables of one layer."""
    return operands * sum(TABLE_MARKS + (1 << bits) for bits in activation if bits < NARROW)


def products_problem(own: Mapping[str, Tensor], activation: Sequence[int], *, table: bool) -> str:
    """Say in one line what is wrong with the tensors of an attention, or nothing."""
    needed = {"act", "act_table"} if table else {"act"}
    if own.keys() != needed:
        return f"it has the tensors {_names(own)}, not {_names(needed)}"
    shape = (len(activation), _OPERANDS, 2)
    return _act_problem(own["act"], shape) or _table_problem(own, activation, _OPERANDS)


def layer_problem(
    own: Mapping[str, Tensor],
    weights: Sequence[int],
    activation: Sequence[int],
    *,
    planes: int,
    table: bool,
    dedicated: bool = False,
) -> str:
    """Say in one line what is wrong with the tensors of a layer with weights, or nothing.

    Args:
        own: Its tensors by their last name.
        weights: The widths that `alpha` and `delta` have rows for.
        activation: The widths that `act` has rows for.
        planes: Number of planes that should be there.
        table: Whether there should be tables.
        dedicated: Whether 2 bits should have codes of their own.
    """
    codes = ["d2"] * dedicated + [f"p{number + 1}" for number in range(planes)]
    needed = _LINEAR | set(codes)
    if table and table_bytes(activation):
        needed |= {"act_table"}
    if own.keys() != needed:
        return f"it has the tensors {_names(own)}, not {_names(needed)}"
    first = own[codes[0]]
    for leaf in codes:
        plane = own[leaf]
        if plane.dtype != torch.uint8 or plane.ndim != 2 or plane.shape != first.shape:
            return f"{leaf} is {_described(plane)}, not uint8 {tuple(first.shape)}"
    for leaf in ("alpha", "delta"):
        tensor, shape = own[leaf], (len(weights), len(first))
        if tensor.dtype != torch.float16 or tuple(tensor.shape) != shape:
            return f"{leaf} is {_described(tensor)}, not float16 {shape}"
        if not bool(tensor.isfinite().all()) or (leaf == "alpha" and bool((tensor < 0).any())):
            return f"{leaf} is not finite and, for alpha, at least zero everywhere"
    shape = (len(activation), 2)
    return _act_problem(own["act"], shape) or _table_problem(own, activation, 1)


def _act_problem(act: Tensor, shape: tuple[int, ...]) -> str:
    if act.dtype != torch.float32 or tuple(act.shape) != shape:
        return f"act is {_described(act)}, not float32 {shape}"
    scale, zero = act[..., 0], act[..., 1]
    if not bool((scale.isfinite() & (scale > 0)).all()):
        return "a scale in act is not positive and finite"
    if not bool(((zero == zero.round()) & (zero >= 0) & (zero < 2**NARROW)).all()):
        return f"a zero point in act is no integer in 0..{2**NARROW - 1}"
    return ""


def _table_problem(own: Mapping[str, Tensor], activation: Sequence[int], operands: int) -> str:
    if "act_table" not in own:
        return ""
    packed, size = own["act_table"], table_bytes(activation, operands)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        return f"act_table is {_described(packed)}, not uint8 ({size},)"
    position = 0
    for bits in (bits for bits in activation if bits < NARROW):
        for _ in range(operands):
            marks = packed[position : position + TABLE_MARKS]
            steps = sum(int(byte).bit_count() for byte in marks.tolist())
            if steps >= 2**bits:
                return f"a table of {bits} bits has {steps + 1} levels"
            position += TABLE_MARKS + 2**bits
    return ""


def _names(leaves: Iterable[str]) -> str:
    return shown(", ".join(sorted(leaves)))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
