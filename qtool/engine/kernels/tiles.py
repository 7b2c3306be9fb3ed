"""Which tile of a matrix product suits which shape on which GPU.

The table comes from `tests/bench/tune_tiles.py`, which times every candidate on the GPU at hand.
"""

from __future__ import annotations

import enum
import functools
from typing import Any, NamedTuple

import torch


class Ending(enum.StrEnum):
    """What the epilogue of a linear layer makes of its sums."""

    VALUES = "values"
    CODES = "codes"


class Tile(NamedTuple):
    """One way to run a matrix product.

    Attributes:
        rows: Rows of a program.
        columns: Columns of a program.
        depth: Terms of a step.
        warps: Warps of a program.
        stages: Steps whose operands are under way at once.
        registers: Registers of a thread at most; 0 leaves that to the compiler.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int = 0

    def constants(self) -> dict[str, int]:
        """Constants of the kernel."""
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return {**sizes, "BAND": BAND}

    def options(self) -> dict[str, int | bool]:
        """Options of the compiler; contracting multiplication and addition would change bits."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
            **limit,
        }

    def shared_bytes(self) -> int:
        """Shared memory of the operands under way."""
        return self.stages * (self.rows + self.columns) * self.depth


BAND = 8
TUNED_CAPABILITY = 90
SMALLEST = Tile(64, 64, 64, 4, 3)
"""Runs on every GPU from compute capability 8.0 on."""

LINEAR: dict[Ending, tuple[tuple[int, int, Tile], ...]] = {
    Ending.VALUES: (
        (4096, 0, Tile(64, 64, 128, 4, 4)),
        (0, 0, Tile(64, 128, 128, 4, 3)),
    ),
    Ending.CODES: (
        (512, 1536, Tile(64, 64, 128, 4, 4)),
        (512, 0, Tile(64, 128, 128, 4, 4)),
        (4096, 1536, Tile(64, 64, 128, 4, 4)),
        (4096, 2560, Tile(64, 256, 128, 4, 3)),
        (4096, 0, Tile(64, 128, 128, 4, 3)),
        (0, 0, Tile(128, 128, 128, 8, 3)),
    ),
}
"""For each ending: up to so many rows and channels (0: any number), the tile. First match wins."""

_SHALLOW = 64  # terms of a step where deeper ones leave a rest


def of(ending: Ending, capability: int) -> set[Tile]:
    """Every tile that `linear_tile` can return for an ending on GPUs of a capability."""
    if capability != TUNED_CAPABILITY:
        return {SMALLEST}
    tiles = {tile for _, _, tile in LINEAR[ending]} | {SMALLEST}
    return tiles | {tile._replace(depth=_SHALLOW) for tile in tiles}


@functools.cache
def is_tuned(device: torch.device) -> bool:
    """Whether tiles were chosen for GPUs like this one; elsewhere the plainest one runs."""
    if device.type != "cuda":
        return True  # interpreted kernels take what a tuned GPU would
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor == TUNED_CAPABILITY


def linear_tile(
    rows: int, channels: int, in_features: int, ending: Ending, device: torch.device
) -> Tile:
    """The tile of a linear layer.

    Args:
        rows: Rows of the product.
        channels: Output channels.
        in_features: Terms of a sum.
        ending: What becomes of the sums.
        device: The GPU, which has so much shared memory.
    """
    if not is_tuned(device):
        return SMALLEST
    for most_rows, most_channels, tile in LINEAR[ending]:
        if rows <= (most_rows or rows) and channels <= (most_channels or channels):
            if in_features % tile.depth:
                tile = tile._replace(depth=_SHALLOW)
            return tile if tile.shared_bytes() <= _shared_bytes(device) else SMALLEST
    return SMALLEST


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 30
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
