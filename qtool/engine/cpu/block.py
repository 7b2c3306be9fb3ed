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
from qtool.engine.cpu.attention import BLOCK_SCORES
from qtool.engine.cpu.linear import NEAR, Packed, gelu_, nested_layer, packed_layer
from qtool.engine.cpu.panels import PanelLinear

MOST_TOKENS = 16384  # so many products of codes fit int32, as in `contracts.MAX_TERMS`
MOST_DEPTH = 256  # what `native.c` holds of a row
LANES = 16  # what its products take at once


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
        self.width, self.tokens = width, tokens
        some = min(batch, max(1, BLOCK_SCORES // (heads * tokens * tokens)))
        self.parts = exact.blocks(batch, some)
        matrices, whole = some * heads, -(-tokens // LANES) * LANES
        self.operands = torch.empty(3, matrices, tokens, depth, dtype=torch.uint8)
        self.scores = torch.empty(2, matrices, tokens, tokens, dtype=torch.float32)
        # What lies behind the codes of a row stays zero.
        self.p_codes = torch.zeros(matrices, tokens, whole, dtype=torch.uint8)
        self.packed = torch.empty(matrices, whole, depth, dtype=native.packed_operands())
        self.columns = torch.empty(matrices, max(whole, depth), dtype=torch.int32)
        self.views = {
            count: _Views(self, count, heads)
            for count in {part.stop - part.start for part in self.parts}
        }


class _Views:
    """Views of the memory of attention for some pictures at once.

    Args:
        room: The memory.
        count: Pictures.
        heads: Attention heads.
    """

    def __init__(self, room: _Room, count: int, heads: int) -> None:
        _, _, tokens, depth = room.operands.shape
        width, self.matrices = room.width, count * heads
        self.scores, self.p = (part[: self.matrices] for part in room.scores)
        self.values = room.operands[2, : self.matrices].view(torch.int8)
        size, by_head = (
            (count, heads, tokens, depth),
            (heads * tokens * depth, tokens * depth, depth),
        )
        from_qkv, to_codes = (tokens * 3 * width, depth, 3 * width), (tokens * width, depth, width)
        self.from_qkv = native.walk(size, from_qkv, by_head)
        self.to_codes = native.walk(size, by_head, to_codes)
        rows = (1, 1, self.matrices * tokens, tokens)
        self.over_scores = native.walk(rows, (0, 0, tokens), (0, 0, room.p_codes.shape[2]))


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
        query, key, value = block.operands
        self.quantizers = [
            native.quantizer(scale, operand.zero, operand.table, operand.bits, signed=number > 0)
            for number, (scale, operand) in enumerate(
                zip(block.projected, block.operands, strict=True)
            )
        ]
        self.operands = (native.Quantizer * 3)(*self.quantizers)
        self.zeros = [int(operand.zero) for operand in block.operands if operand.zero is not None]
        p, out = block.probability, block.proj
        self.probability = native.quantizer(p.scale, p.zero, p.table, p.bits)
        self.probability_zero = None if p.zero is None else int(p.zero)
        self.score_scale = float(query.scale * key.scale)
        self.attended = native.quantizer(
            *(out.scale, out.zero, out.table, out.bits), factor=float(p.scale * value.scale)
        )
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
        lib = native.library()
        projected = None if isinstance(qkv, PanelLinear) else qkv.product(room.codes)
        tokens, width, depth = room.tokens, self.width, self.width // self.heads
        operands, step = room.operands.data_ptr(), room.operands.stride(0)
        keys, values = operands + step, operands + 2 * step
        scores, p_codes = room.scores.data_ptr(), room.p_codes.data_ptr()
        packed, columns = room.packed.data_ptr(), room.columns.data_ptr()
        query_zero, key_zero, value_zero = self.zeros
        for some in room.parts:
            views = room.views[some.stop - some.start]
            rows = slice(some.start * tokens, some.stop * tokens)
            target = codes + rows.start * width
            if isinstance(qkv, PanelLinear):
                qkv.codes(room.codes[rows], operands, views.from_qkv, self.operands, step)
            elif projected is not None:
                first, go = projected[rows].data_ptr(), views.from_qkv
                lib.qtool_codes(first, operands, go, self.operands, 3, width, step, threads)
            lib.qtool_scores(
                *(operands, keys, scores, views.matrices, tokens, depth),
                *(query_zero, key_zero, self.score_scale, packed, columns, threads),
            )
            torch.softmax(views.scores, -1, out=views.p)
            p = views.p.data_ptr()
            if self.probability_zero is None:
                lib.qtool_powers(p, views.matrices * tokens, tokens, self.probability, threads)
                levels = views.values.float().sub_(value_zero - 128)
                found = torch.bmm(views.p, levels)
                lib.qtool_codes(
                    found.data_ptr(), target, views.to_codes, self.attended, 1, 0, 0, threads
                )
                continue
            lib.qtool_codes(p, p_codes, views.over_scores, self.probability, 1, 0, 0, threads)
            lib.qtool_attended(
                *(p_codes, room.p_codes.shape[2], values, target, views.to_codes),
                *(self.probability_zero, value_zero, self.attended, packed, columns, threads),
            )
