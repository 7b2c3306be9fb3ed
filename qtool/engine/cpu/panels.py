"""Linear layers whose weights lie in panels, for matrix tiles (AMX) or vectors (AVX2).

See `panels.c`, `amx.c` and `avx2.c`.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.engine.cpu import exact, native

STEP = 64
"""Inputs of a tile; layers on tiles have a multiple of it."""

GROUP = 4
"""Inputs that lie side by side; layers on vectors have a multiple of it."""

MOST_DEPTH = 8192
TILE_COLUMNS = 32
VECTOR_COLUMNS = 16
SIDE = 16
MOST_IN_16_BITS = (2**15 - 1) // 255
"""Largest sum of levels whose product with any codes fits 16 bits."""


class Panels(NamedTuple):
    """Weights laid out for one of two kernels.

    Attributes:
        panels: int8. For tiles (panels, K / 64, 2, 16, 16, 4): for every 32 columns and 64 inputs
            two tiles, each of four inputs of sixteen columns in every row. For vectors
            (panels, K / 4, 16, 4): for every 16 columns and four inputs these, column by column.
        sums: Sum of the levels of each column, int32 (N,).
        run: For vectors, groups of four inputs whose sums fit 16 bits, 0 where not even one does;
            None for tiles.
    """

    panels: Tensor
    sums: Tensor
    run: int | None

    @property
    def depth(self) -> int:
        """Inputs, K."""
        return self.panels.shape[1] * (STEP if self.run is None else GROUP)


def laid_out(levels: Tensor, *, vectors: bool | None = None) -> Panels:
    """Levels int8 (N, K) in panels; columns are filled up with zeros.

    Args:
        levels: What sums are made of.
        vectors: For vectors or for tiles; None for what this CPU takes.
    """
    vectors = not _on_tiles(levels.shape[1]) if vectors is None else vectors
    width, depth = levels.shape
    columns = VECTOR_COLUMNS if vectors else TILE_COLUMNS
    panels = -(-width // columns)
    whole = levels.new_zeros(panels * columns, depth)
    whole[:width] = levels
    sums = levels.sum(1, dtype=torch.int32)
    if vectors:
        groups = whole.view(panels, SIDE, depth // GROUP, GROUP).permute(0, 2, 1, 3)
        return Panels(groups.contiguous(), sums, longest_run(levels))
    tiles = whole.view(panels, 2, SIDE, depth // STEP, SIDE, 4).permute(0, 3, 1, 4, 2, 5)
    return Panels(tiles.contiguous(), sums, None)


def longest_run(levels: Tensor) -> int:
    """How many groups of four inputs `avx2.c` may sum in 16 bits, a power of two, or 0.

    Each half of a group adds to a sum of its own, and saturates apart. A sum reaches furthest where
    codes are 255 wherever levels have one sign.

    Args:
        levels: int8 (N, K).
    """
    halves = levels.view(len(levels), -1, GROUP // 2, 2).to(torch.int16)
    signs = (halves.clamp(min=0), halves.clamp(max=0).neg_())
    pairs = torch.stack([sign.sum(-1, dtype=torch.int16) for sign in signs])
    run = 0
    while int(pairs.max()) <= MOST_IN_16_BITS:
        run = max(1, 2 * run)
        if pairs.shape[2] == 1:
            break
        if pairs.shape[2] % 2:
            pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 1))
        pairs = pairs.unflatten(2, (-1, 2)).sum(3, dtype=torch.int16)
    return run


def takes(in_features: int) -> bool:
    """Whether layers with so many inputs run in panels here, and rightly."""
    return _on_tiles(in_features) or on_vectors(in_features)


def _on_tiles(in_features: int) -> bool:
    fits = in_features % STEP == 0 and in_features <= MOST_DEPTH
    return fits and native.has_tiles() and are_exact(vectors=False)


def on_vectors(in_features: int) -> bool:
    """Whether that is on vectors; where there are 8-bit units but no tiles, oneDNN does better."""
    fits = in_features % GROUP == 0 and in_features <= MOST_DEPTH
    if not fits or exact.has_int8_units():
        return False
    return native.has_vectors() and are_exact(vectors=True)


@functools.cache
def are_exact(*, vectors: bool) -> bool:
    """Whether sums are right here, found out with small products."""
    codes = torch.arange(33 * 2 * STEP).remainder_(256).to(torch.uint8).view(33, -1)
    levels = torch.arange(40 * 2 * STEP).mul_(7).remainder_(256).sub_(128).to(torch.int8)
    for some in (levels, levels >> 4):
        expected = codes.double() @ some.view(40, -1).double().t()
        panels = laid_out(some.view(40, -1), vectors=vectors)
        layer = PanelLinear(panels, torch.ones(40), None, 0)
        if not torch.equal(layer.product(codes).double(), expected):
            return False
    return True


class PanelLinear:
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
        weight: Panels,
        scale: Tensor,
        bias: Tensor | None,
        zero: int,
        nested_bits: int | None = None,
    ) -> None:
        self.nested = nested_bits is not None
        bias = None if bias is None else bias.contiguous()
        self.kept = (weight, scale, bias)  # as long as their addresses are in use
        self.width, self.depth = len(scale), weight.depth
        self.layer = native.PanelLayer(
            weight.panels.data_ptr(),
            weight.sums.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.depth,
            self.width,
            zero,
            0 if nested_bits is None else 8 - nested_bits,
            weight.run is not None,
            weight.run if (weight.run or 0) > 1 else 0,  # one at a time is slower than none
        )

    def product(
        self, codes: Tensor, *, added: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The layer on codes (M, K), plus `added` if given; all contiguous, float32 (M, N)."""
        rows, row_sums = len(codes), self._room(codes)
        y = codes.new_empty(rows, self.width, dtype=torch.float32) if out is None else out
        native.library().qtool_panel_values(
            self.layer,
            codes.data_ptr(),
            rows,
            None if row_sums is None else row_sums.data_ptr(),
            None if added is None else added.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def windows(
        self, codes: Tensor, window: native.Window, quantizer: native.Quantizer | None = None
    ) -> Tensor:
        """A convolution on codes (B, H, W, C), contiguous; for vectors only.

        Inputs of the layer are the codes of a window row by row, channels side by side; inputs
        behind those have levels of zero.

        Returns:
            float32 (B, H', W', N), or the codes of these values.
        """
        threads, found = torch.get_num_threads(), native.library()
        room = codes.new_empty(threads, found.qtool_window_room(self.depth))
        kind = torch.float32 if quantizer is None else torch.uint8
        y = codes.new_empty(*window.shape, self.width, dtype=kind)
        found.qtool_panel_windows(
            *(self.layer, window, codes.data_ptr(), room.data_ptr()),
            *((y.data_ptr(), None) if quantizer is None else (None, y.data_ptr())),
            *(self.over_rows(y), quantizer, threads),
        )
        return y

    def over_rows(self, y: Tensor) -> native.Walk:
        """How codes of all columns go to (..., N), contiguous."""
        shape = (1, 1, y.numel() // self.width, self.width)
        return native.walk(shape, (0, 0, 0), (0, 0, self.width))

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
                there is a multiple of 16, except on vectors where there is one head.
            quantizers: One for each part.
            apart: Elements from one part to the next.
        """
        row_sums = self._room(codes)
        native.library().qtool_panel_codes(
            *(self.layer, codes.data_ptr(), len(codes)),
            None if row_sums is None else row_sums.data_ptr(),
            *(target, walk, quantizers, len(quantizers), apart, torch.get_num_threads()),
        )

    def ends_in_codes(self, parts: int) -> bool:
        """Whether `codes` takes so many parts of the columns in rows of their own."""
        whole = self.width % (parts * SIDE) == 0
        return whole or (parts == 1 and bool(self.layer.vectors))

    def _room(self, codes: Tensor) -> Tensor | None:
        """Room for the sums of rows that nested levels need."""
        return codes.new_empty(len(codes), dtype=torch.int32) if self.nested else None
