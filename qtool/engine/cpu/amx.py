"""Linear layers on the matrix tiles of x86 processors (AMX); see `amx.c`."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.engine.cpu import native

STEP = 64
"""Inputs of a tile; layers have a multiple of it."""

MOST_DEPTH = 8192
PANEL = 32
SIDE = 16


class TilePanels(NamedTuple):
    """Weights as tiles take them.

    Attributes:
        panels: int8 (panels, K / 64, 2, 16, 16, 4): for every 32 columns and 64 inputs two tiles,
            each of four inputs of sixteen columns in every row.
        sums: Sum of the levels of each column, int32 (N,).
    """

    panels: Tensor
    sums: Tensor


def laid_out(levels: Tensor) -> TilePanels:
    """Levels int8 (N, K) in panels; columns are filled up with zeros."""
    width, depth = levels.shape
    panels = -(-width // PANEL)
    whole = levels.new_zeros(panels * PANEL, depth)
    whole[:width] = levels
    tiles = whole.view(panels, 2, SIDE, depth // STEP, SIDE, 4).permute(0, 3, 1, 4, 2, 5)
    return TilePanels(tiles.contiguous(), levels.sum(1, dtype=torch.int32))


def takes(in_features: int) -> bool:
    """Whether layers with so many inputs run on tiles here, and rightly."""
    fits = in_features % STEP == 0 and in_features <= MOST_DEPTH
    return fits and native.has_tiles() and are_exact()


@functools.cache
def are_exact() -> bool:
    """Whether the sums of tiles are right here, found out with a small product."""
    codes = torch.arange(33 * 2 * STEP).remainder_(256).to(torch.uint8).view(33, -1)
    levels = torch.arange(40 * 2 * STEP).mul_(7).remainder_(256).sub_(128).to(torch.int8)
    levels = levels.view(40, -1)
    expected = codes.double() @ levels.double().t()
    layer = TileLinear(laid_out(levels), torch.ones(40), None, 0)
    return bool(torch.equal(layer.product(codes).double(), expected))


class TileLinear:
    """A linear layer from codes to float32 or to codes.

    Args:
        weight: Its weights; of nested codes with the sums of the levels 2 h + 1.
        scale: Scale of the input times that of each channel, (N,).
        bias: (N,) or None.
        zero: Zero point of the input codes.
        nested_bits: Leading bits of nested codes that count; None for levels as they are.
    """

    def __init__(
        self,
        weight: TilePanels,
        scale: Tensor,
        bias: Tensor | None,
        zero: int,
        nested_bits: int | None = None,
    ) -> None:
        self.nested = nested_bits is not None
        bias = None if bias is None else bias.contiguous()
        self.kept = (weight, scale, bias)  # as long as their addresses are in use
        self.width, self.depth = len(scale), weight.panels.shape[1] * STEP
        self.layer = native.TileLayer(
            weight.panels.data_ptr(),
            weight.sums.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.depth,
            self.width,
            zero,
            0 if nested_bits is None else 8 - nested_bits,
        )

    def product(
        self, codes: Tensor, *, added: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The layer on codes (M, K), plus `added` if given; all contiguous, float32 (M, N)."""
        rows, row_sums = len(codes), self._room(codes)
        y = codes.new_empty(rows, self.width, dtype=torch.float32) if out is None else out
        native.library().qtool_tile_values(
            self.layer,
            codes.data_ptr(),
            rows,
            None if row_sums is None else row_sums.data_ptr(),
            None if added is None else added.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def codes(
        self,
        codes: Tensor,
        target: int,
        walk: native.Walk,
        quantizers: ctypes.Array[native.Quantizer],
        apart: int,
    ) -> None:
        """Write codes of the layer, of equal parts of its columns each with a quantizer.

        Args:
            codes: (M, K), contiguous; M are pictures by tokens.
            target: Address of the first code.
            walk: Where codes go: sizes are pictures, heads, tokens and columns of a head, of which
                there is a multiple of 16.
            quantizers: One for each part.
            apart: Elements from one part to the next.
        """
        row_sums = self._room(codes)
        native.library().qtool_tile_codes(
            *(self.layer, codes.data_ptr(), len(codes)),
            None if row_sums is None else row_sums.data_ptr(),
            *(target, walk, quantizers, len(quantizers), apart, torch.get_num_threads()),
        )

    def _room(self, codes: Tensor) -> Tensor | None:
        """Room for the sums of rows that nested levels need."""
        return codes.new_empty(len(codes), dtype=torch.int32) if self.nested else None
