"""A whole transformer block on a CPU with compiled passes: straight from layer to layer.

The arithmetic is that of `layer_norm_quantize`, `linear_quantize`, `attention` and `linear` one
after another, to the last bit. What is saved is everything around it: checks, views, memory and
parameters are worked out once, which is half of the time of a small model.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.engine.cpu import exact, native
from qtool.engine.cpu.attention import (
    BLOCK_SCORES,
    LANES,
    MOST_DEPTH,
    MOST_TOKENS,
    Products,
    parameters,
)
from qtool.engine.cpu.linear import NEAR, Packed, gelu_, nested_layer, packed_layer
from qtool.engine.cpu.panels import PanelLinear


class Layer(NamedTuple):
    """A linear layer and the quantizer of its input; arguments of `qtool.engine.ops.linear`."""

    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    weight_bits: int
    in_features: int
    scale: Tensor
    zero: Tensor
    table: Tensor | None
    bits: int


class NestedLayer(NamedTuple):
    """The same with nested codes; arguments of `qtool.engine.ops.linear_nested`."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor
    weight_bits: int
    scale: Tensor
    zero: Tensor
    table: Tensor | None
    bits: int

    @property
    def in_features(self) -> int:
        """Inputs, K."""
        return self.weight.shape[1]


class Norm(NamedTuple):
    """A LayerNorm."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Operand(NamedTuple):
    """The quantizer of an operand of attention; without a zero point powers of two."""

    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    bits: int


class Block(NamedTuple):
    """Parameters of `x + attention(norm(x))` followed by `x + perceptron(norm(x))`.

    Attributes:
        norms: Before attention and before the perceptron.
        qkv: To queries, keys and values.
        projected: Scales of the three as they leave `qkv`, (3,); queries come unscaled.
        operands: Queries, keys and values as attention takes them.
        probability: Probabilities.
        proj: After attention.
        fc1: Before GELU.
        fc2: After GELU.
        heads: Attention heads.
    """

    norms: tuple[Norm, Norm]
    qkv: Layer | NestedLayer
    projected: Tensor
    operands: tuple[Operand, Operand, Operand]
    probability: Operand
    proj: Layer | NestedLayer
    fc1: Layer | NestedLayer
    fc2: Layer | NestedLayer
    heads: int


class _Room:
    """Memory that the blocks of a model share while one call runs, for one shape of input.

    Args:
        batch: Pictures.
        tokens: Tokens of a picture.
        width: Channels.
        hidden: Channels of the perceptron.
        heads: Attention heads.
        tiled: Whether values before GELU have a place of their own.
    """

    def __init__(
        self, batch: int, tokens: int, width: int, hidden: int, heads: int, *, tiled: bool
    ) -> None:
        rows, depth = batch * tokens, width // heads
        self.hidden = torch.empty(rows, hidden) if tiled else None
        self.codes = torch.empty(rows, width, dtype=torch.uint8)
        self.wide_codes = torch.empty(rows, hidden, dtype=torch.uint8)
        flat, wide = self.codes.view(1, 1, rows, width), self.wide_codes.view(1, 1, rows, hidden)
        self.over_rows = native.walk(flat.shape, flat.stride(), flat.stride())
        self.over_wide_rows = native.walk(wide.shape, wide.stride(), wide.stride())
        some = min(batch, max(1, BLOCK_SCORES // (heads * tokens * tokens)))
        self.parts = exact.blocks(batch, some)
        self.products = Products(some * heads, tokens, depth)
        by_head = (heads * tokens * depth, tokens * depth, depth)
        from_qkv = (tokens * 3 * width, depth, 3 * width)
        self.from_qkv = {
            count: native.walk((count, heads, tokens, depth), from_qkv, by_head)
            for count in {part.stop - part.start for part in self.parts}
        }


class _Rooms(threading.local):
    """The memory of every thread that runs a model, for the last few shapes."""

    def __init__(self) -> None:
        # Memory made in inference mode could not be written to outside of it.
        self.of = functools.lru_cache(maxsize=2)(torch.inference_mode(False)(_room))


def _room(batch: int, tokens: int, width: int, hidden: int, heads: int, tiled: bool) -> _Room:
    return _Room(batch, tokens, width, hidden, heads, tiled=tiled)


_rooms = _Rooms()


def _packed(layer: Layer | NestedLayer) -> Packed | PanelLinear | None:
    """A layer laid out for this CPU, or None where it takes another way."""
    if isinstance(layer, NestedLayer):
        shared = (layer.weight, layer.weight_scale, layer.bias, layer.weight_bits)
        return nested_layer(layer.scale, layer.zero, *shared)
    return packed_layer(
        *(layer.scale, layer.zero, layer.weight, layer.weight_scale, layer.weight_zero),
        *(layer.bias, layer.weight_bits, layer.in_features),
    )


class Program:
    """A block made ready for this CPU.

    Args:
        block: Its parameters. What is written to them later is not seen.
    """

    def __init__(self, block: Block) -> None:
        self.norms, self.heads = block.norms, block.heads
        self.width, self.hidden = block.qkv.in_features, block.fc2.in_features
        layers = (block.qkv, block.proj, block.fc1, block.fc2)
        self.inputs = [
            native.quantizer(layer.scale, layer.zero, layer.table, layer.bits) for layer in layers
        ]
        found = [_packed(layer) for layer in layers]
        self.layers = [layer for layer in found if layer is not None]
        self.quantizers = [
            native.quantizer(scale, operand.zero, operand.table, operand.bits, signed=number > 0)
            for number, (scale, operand) in enumerate(
                zip(block.projected, block.operands, strict=True)
            )
        ]
        self.operands = (native.Quantizer * 3)(*self.quantizers)
        scales = [operand.scale for operand in block.operands]
        zeros = [operand.zero for operand in block.operands if operand.zero is not None]
        out = (block.proj.scale, block.proj.zero, block.proj.table, block.proj.bits)
        self.attention = parameters(scales, zeros, block.probability, out)
        self.possible = len(self.layers) == len(layers)
        self.tiled = all(isinstance(layer, PanelLinear) for layer in self.layers)

    def takes(self, x: Tensor) -> bool:
        """Whether x is what is expected and its sums fit 32 bits."""
        return (
            self.possible
            and x.dim() == 3
            and x.dtype == torch.float32
            and x.shape[0] > 0
            and 1 < x.shape[1] <= MOST_TOKENS
            and self.width // self.heads <= MOST_DEPTH
            and self.width % (self.heads * LANES) == 0
        )

    def run(self, x: Tensor) -> Tensor:
        """The block, (B, N, C) to (B, N, C)."""
        batch, tokens, _ = x.shape
        threads = torch.get_num_threads()
        x = x.contiguous()
        y = torch.empty_like(x)
        near = threads * NEAR // (4 * tokens * self.hidden)
        size = max(1, near) if self.tiled else batch
        for some in exact.blocks(batch, size):
            self._run(x[some], y[some], threads)
        return y

    def _run(self, x: Tensor, y: Tensor, threads: int) -> None:
        """The block on some pictures, into `y`."""
        batch, tokens, width = x.shape
        room: _Room = _rooms.of(batch, tokens, width, self.hidden, self.heads, self.tiled)
        qkv, proj, fc1, fc2 = self.layers
        lib = native.library()
        codes, wide = room.codes.data_ptr(), room.wide_codes.data_ptr()

        self._norm(x, 0, codes, room, threads)
        self._attend(qkv, codes, room, threads)
        proj.product(room.codes, added=x, out=y)
        self._norm(y, 1, codes, room, threads)
        hidden = fc1.product(room.codes, out=room.hidden)
        gelu_(hidden)
        lib.qtool_codes(
            hidden.data_ptr(), wide, room.over_wide_rows, self.inputs[3], 1, 0, 0, threads
        )
        fc2.product(room.wide_codes, added=y, out=y)

    def _norm(self, x: Tensor, number: int, codes: int, room: _Room, threads: int) -> None:
        """Codes of the normalised `x` for the layer behind the first or second norm."""
        norm = self.norms[number]
        values = torch.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        native.library().qtool_codes(
            values.data_ptr(), codes, room.over_rows, self.inputs[2 * number], 1, 0, 0, threads
        )

    def _attend(self, qkv: Packed | PanelLinear, codes: int, room: _Room, threads: int) -> None:
        """The codes of normalised values, at an address, to those of attended ones, in place."""
        projected = None if isinstance(qkv, PanelLinear) else qkv.product(room.codes)
        products, width = room.products, self.width
        _, _, tokens, _ = products.operands.shape
        operands, step = products.operands.data_ptr(), products.operands.stride(0)
        for some in room.parts:
            pictures = some.stop - some.start
            rows, go = slice(some.start * tokens, some.stop * tokens), room.from_qkv[pictures]
            if isinstance(qkv, PanelLinear):
                qkv.codes(room.codes[rows], operands, go, self.operands, step)
            elif projected is not None:
                first = projected[rows].data_ptr()
                native.library().qtool_codes(
                    first, operands, go, self.operands, 3, width, step, threads
                )
            products.attend(self.attention, codes + rows.start * width, pictures, self.heads)
