"""The compiled passes of the C files beside this one, where the installation could build them.

They are optional: without a C compiler at install time `library()` is None, and the same codes come
out of PyTorch in more passes.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_native.so")
MOST_STEPS = 16  # of a table that vectors look up


class Walk(ctypes.Structure):
    """Sizes of four dimensions, and the strides of the first three in source and target."""

    _fields_ = (
        ("size", ctypes.c_int64 * 4),
        ("source", ctypes.c_int64 * 3),
        ("target", ctypes.c_int64 * 3),
    )


class Quantizer(ctypes.Structure):
    """A per-tensor quantizer of values that are multiplied by `factor` first."""

    _fields_ = (
        ("factor", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("zero", ctypes.c_float),
        ("bottom", ctypes.c_float),
        ("top", ctypes.c_float),
        ("table", ctypes.c_void_p),
        ("powers", ctypes.c_int32),
        ("flip", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("before", ctypes.c_int8 * MOST_STEPS),
        ("level", ctypes.c_uint8 * MOST_STEPS),
    )
    kept: Tensor | None = None


class Window(ctypes.Structure):
    """What a convolution reads; see `native.h`."""

    _fields_ = (
        ("pictures", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("size", ctypes.c_int64 * 2),
        ("found", ctypes.c_int64 * 2),
        ("kernel", ctypes.c_int64 * 2),
        ("stride", ctypes.c_int64 * 2),
        ("padding", ctypes.c_int64 * 2),
        ("dilation", ctypes.c_int64 * 2),
        ("zero", ctypes.c_int64),
    )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Pictures, and places down and across."""
        return self.pictures, *self.found

    @property
    def single(self) -> bool:
        """Whether each place sees one pixel, its own."""
        ones = [*self.kernel, *self.stride]
        return ones == [1, 1, 1, 1] and [*self.padding] == [0, 0]


class PanelLayer(ctypes.Structure):
    """A linear layer in panels; see `panels.h`."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("depth", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("zero", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("vectors", ctypes.c_int32),
        ("run", ctypes.c_int32),
    )


@functools.cache
def library() -> Any:  # noqa: ANN401  (a CDLL, or None)
    """The library, or None; PyTorch is loaded before it, so that both share one pool of threads."""
    try:
        found = ctypes.CDLL(str(LIBRARY))  # its functions return nothing of interest
        pointer, step, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        real, go, how = ctypes.c_float, ctypes.POINTER(Walk), ctypes.POINTER(Quantizer)
        found.qtool_codes.argtypes = (*(pointer, pointer, go, how), *(step, step, step, number))
        found.qtool_powers.argtypes = (pointer, step, step, how, number)
        found.qtool_tell_steps.argtypes = (how,)
        found.qtool_widen.argtypes = (pointer, pointer, go, real, number)
        if found.qtool_has_vectors():  # as every CPU with tiles has
            layer = ctypes.POINTER(PanelLayer)
            shared = (layer, pointer, step, pointer)
            found.qtool_panel_values.argtypes = (*shared, pointer, pointer, number)
            found.qtool_panel_codes.argtypes = (*shared, pointer, go, how, step, step, number)
            window = ctypes.POINTER(Window)
            found.qtool_panel_windows.argtypes = (
                *(layer, window, pointer, pointer),
                *(pointer, pointer, go, how, number),
            )
            found.qtool_window_room.argtypes, found.qtool_window_room.restype = (step,), step
            found.qtool_depthwise.argtypes = (window, *(pointer,) * 8, how, number)
        if found.qtool_has_products():
            found.qtool_scores.argtypes = (
                *(pointer, pointer, pointer, step, step, step),
                *(number, number, real, pointer, pointer, number),
            )
            found.qtool_attended.argtypes = (
                *(pointer, step, pointer, pointer, go),
                *(number, number, how, pointer, pointer, number),
            )
    except (OSError, AttributeError):
        return None
    return found


def multiplies_codes() -> bool:
    """Whether the products of attention were compiled and run here (x86 with AVX2)."""
    found = library()
    return found is not None and bool(found.qtool_has_products())


def packed_operands() -> torch.dtype:
    """What keys and values are packed as: without 8-bit units in 16 bits."""
    return torch.int8 if library().qtool_has_products() > 1 else torch.int16


def has_tiles() -> bool:
    """Whether linear layers on matrix tiles were compiled and run here (x86 with AMX on Linux)."""
    found = library()
    return found is not None and _finds_tiles(found)


def has_vectors() -> bool:
    """Whether linear layers on 256-bit vectors were compiled and run here (x86 with AVX2)."""
    found = library()
    return found is not None and bool(found.qtool_has_vectors())


@functools.cache
def _finds_tiles(found: Any) -> bool:  # noqa: ANN401  (a CDLL)
    """What a library says of tiles; asked once, for virtual machines are slow to answer."""
    return bool(found.qtool_has_tiles())


@functools.lru_cache(maxsize=4096)
def walk(size: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]) -> Walk:
    """How to go over two tensors of four dimensions, the last of which is contiguous in both.

    Args:
        size: Their shape.
        source: Strides of what is read.
        target: Strides of what is written.
    """
    return Walk(size, source[:3], target[:3])


def quantizer(
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    bits: int,
    *,
    factor: float = 1.0,
    signed: bool = False,
    activation: str = "none",
) -> Quantizer:
    """A quantizer from its parameters.

    Args:
        scale: One element.
        zero: One element, or None for powers of two.
        table: uint8 (256,), or None.
        bits: Width of a code; unused with a table.
        factor: What values are multiplied by first.
        signed: Make codes less 128.
        activation: What values pass through first: "none", "relu" or "relu6".
    """
    table = None if table is None else table.contiguous()
    offset = 0.0 if zero is None else float(zero)
    bottom, top = 0.0, 255.0 if table is not None else 2.0**bits - 1
    if activation != "none":  # rounding keeps the order, so that codes may be cut off instead
        bottom = min(offset, top)
    if activation == "relu6":
        top = min(top, float((6.0 / scale).round()) + offset)
    found = Quantizer(
        factor,
        float(scale),
        offset,
        bottom,
        top,
        None if table is None else table.data_ptr(),
        zero is None,
        128 if signed else 0,
    )
    if table is not None:
        library().qtool_tell_steps(found)
    found.kept = table  # as long as its address is in use
    return found


class Quantizers(NamedTuple):
    """Quantizers of equal parts of some values.

    Attributes:
        each: One by one, which keeps their tables.
        array: Side by side.
    """

    each: list[Quantizer]
    array: ctypes.Array[Quantizer]


def quantizers(scale: Tensor, zero: Tensor, table: Tensor | None, bits: int) -> Quantizers:
    """Quantizers of scales (G,), zero points (G,) and tables (G, 256) or (256,), or None."""
    tables = [None] * len(scale) if table is None else table.view(len(scale), -1).unbind()
    told = zip(scale.split(1), zero.split(1), tables, strict=True)
    each = [quantizer(*one, bits) for one in told]
    return Quantizers(each, (Quantizer * len(each))(*each))


def codes(x: Tensor, out: Tensor, how: Quantizer) -> None:
    """Write the codes of `x` into `out`.

    Args:
        x: float32 of four dimensions, the last one contiguous.
        out: uint8 in the same shape, the last dimension contiguous.
        how: The quantizer.
    """
    go = walk(x.shape, x.stride(), out.stride())
    threads = torch.get_num_threads()
    library().qtool_codes(x.data_ptr(), out.data_ptr(), go, how, 1, 0, 0, threads)


def widen(source: Tensor, out: Tensor, zero: float) -> None:
    """Write codes less their zero point into `out`.

    Args:
        source: uint8 of four dimensions, the last one contiguous.
        out: float32 in the same shape, the last dimension contiguous.
        zero: The zero point.
    """
    go = walk(source.shape, source.stride(), out.stride())
    library().qtool_widen(source.data_ptr(), out.data_ptr(), go, zero, torch.get_num_threads())
