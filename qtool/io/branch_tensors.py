"""The tensors of a network of branches in a checkpoint, and what can be wrong with them.

| tensor                | type | shape               | content                                   |
|-----------------------|------|---------------------|-------------------------------------------|
| `NAME.p1` .. `NAME.p8`| U8   | (N, row bytes)      | codes of branch 1, 2, ... packed in rows  |
| `NAME.alpha`          | F32  | (rows,)             | scales of rows, BatchNorm folded in       |
| `NAME.delta`          | F32  | (rows,)             | biases of rows                            |
| `NAME.act`            | F32  | (members,)          | scales of activations, which have no zero |

NAME is the path of a convolution in the float model. A member is a branch at a width that selects
it; members stand in the order of the widths, and within a width in that of its branches. `alpha`
and `delta` hold the rows of all members one after the other: N of a whole branch, fewer of a narrow
one. Everything but codes comes first in the file, then all p1, all p2, ..., each a section: a file
cut off behind a section still serves the widths whose branches are there. Parts that are shared by
all branches have the names `stem.*` and `head.*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from qtool.io.container import shown

MAX_BRANCHES = 8
SIZES = ("rows", "columns", "narrow_rows", "narrow_inputs", "macs", "narrow_macs")
"""What the header tells of every convolution."""

_LARGEST = 2**48

_PLANE = re.compile(r"p([1-8])", re.ASCII)
_BYTE = 8

Bits = Annotated[int, Field(ge=2, le=8)]
Number = Annotated[int, Field(ge=1, le=MAX_BRANCHES)]


class BranchWidth(BaseModel):
    """The branches of one width.

    Attributes:
        bits: Bits of activations.
        branches: Numbers of the branches from 1, in the order in which they are averaged.
        narrow: The one of them that runs as a slice, or None.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: Bits
    branches: Annotated[list[Number], Field(min_length=1, max_length=MAX_BRANCHES)]
    narrow: Number | None = None

    @model_validator(mode="after")
    def _branches_are_distinct(self) -> Self:
        if len(set(self.branches)) < len(self.branches):
            raise ValueError(f"a branch of {self.bits} bits is there twice")
        if self.narrow is not None and self.narrow not in self.branches:
            raise ValueError(f"the narrow branch of {self.bits} bits is none of its branches")
        return self


class BranchTable(BaseModel):
    """What a file with the engine `branches` says about its widths.

    Attributes:
        weight_bits: Bits of the weights of each branch.
        widths: The widths, rising.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight_bits: Annotated[list[Bits], Field(min_length=1, max_length=MAX_BRANCHES)]
    widths: Annotated[list[BranchWidth], Field(min_length=1, max_length=7)]

    @model_validator(mode="after")
    def _widths_rise_and_have_branches(self) -> Self:
        bits = self.bits
        if bits != sorted(set(bits)):
            raise ValueError(f"the widths {bits} do not rise")
        if max(max(width.branches) for width in self.widths) > len(self.weight_bits):
            raise ValueError("a width has a branch that is not there")
        return self

    @property
    def bits(self) -> list[int]:
        """The widths as numbers."""
        return [width.bits for width in self.widths]

    def members(self) -> list[tuple[int, int, bool]]:
        """Width, branch from 1 and whether it is narrow, in the order of the tensors."""
        return [
            (width.bits, branch, branch == width.narrow)
            for width in self.widths
            for branch in width.branches
        ]

    def there(self, branches: int) -> list[int]:
        """The widths that the first so many branches serve."""
        return [width.bits for width in self.widths if max(width.branches) <= branches]


def plane_of(leaf: str) -> int:
    """Number of the branch whose codes a tensor holds, by its last name; 0 for other tensors."""
    match = _PLANE.fullmatch(leaf)
    return int(match[1]) if match else 0


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of packed codes: planes of 4, 2 and 1 bits, each in whole bytes."""
    if bits == _BYTE:
        return columns
    return sum((columns * part + _BYTE - 1) // _BYTE for part in (4, 2, 1) if bits & part)


def unit_problem(
    own: Mapping[str, Tensor],
    table: BranchTable,
    *,
    rows: int,
    columns: int,
    narrow_rows: int,
    branches: int,
) -> str:
    """Say in one line what is wrong with the tensors of a convolution, or nothing.

    Args:
        own: Its tensors by their last name.
        table: The widths of the file.
        rows: Channels that a whole branch writes.
        columns: Weights of a row.
        narrow_rows: Channels that a narrow branch writes.
        branches: Number of branches whose codes should be there.
    """
    needed = {"alpha", "delta", "act"} | {f"p{number + 1}" for number in range(branches)}
    if own.keys() != needed:
        found = shown(", ".join(sorted(own)))
        return f"it has the tensors {found}, not {shown(', '.join(sorted(needed)))}"
    for number, bits in enumerate(table.weight_bits[:branches]):
        plane, shape = own[f"p{number + 1}"], (rows, row_bytes(columns, bits))
        if plane.dtype != torch.uint8 or tuple(plane.shape) != shape:
            return f"p{number + 1} is {_described(plane)}, not uint8 {shape}"
    members = table.members()
    total = sum(narrow_rows if narrow else rows for _, _, narrow in members)
    for leaf, size in (("alpha", total), ("delta", total), ("act", len(members))):
        tensor = own[leaf]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != (size,):
            return f"{leaf} is {_described(tensor)}, not float32 ({size},)"
        if not bool(tensor.isfinite().all()) or (leaf == "act" and bool((tensor <= 0).any())):
            return f"{leaf} is not finite and, for act, positive everywhere"
    return ""


def sizes_problem(options: Mapping[str, object]) -> str:
    """Say what is wrong with the sizes that the header tells of a convolution, or nothing."""
    for key in SIZES:
        value = options.get(key)
        if type(value) is not int or not 0 < value < _LARGEST:
            return f"{key} is {shown(str(value))}, not a size"
    return ""


def size_of(options: Mapping[str, object], key: str) -> int:
    """A size that the header tells of a convolution.

    Raises:
        ValueError: It is not there.
    """
    value = options.get(key)
    if type(value) is not int:
        raise ValueError(f"the header tells no {key}")
    return value


def first_rows(table: BranchTable, rows: int, narrow_rows: int) -> Sequence[tuple[int, int]]:
    """Where the rows of every member begin and end in `alpha` and `delta`."""
    spans = []
    begin = 0
    for _, _, narrow in table.members():
        end = begin + (narrow_rows if narrow else rows)
        spans.append((begin, end))
        begin = end
    return spans


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
