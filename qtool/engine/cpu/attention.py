"""Fast CPU versions of the products of attention, one by one and all in one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.engine.cpu import codes as quantizers
from qtool.engine.cpu import exact, native

EXPONENT_BIAS = quantizers.EXPONENT_BIAS
BLOCK_SCORES = 1 << 19
LANES = 16  # what the compiled products take at once
MOST_TOKENS = 16384  # so many products of codes fit int32, as in `contracts.MAX_TERMS`
MOST_DEPTH = 256  # what `native.c` holds of a row


class Parameters(NamedTuple):
    """What the compiled products are told.

    Attributes:
        zeros: Zero points of queries, keys and values.
        score_scale: Scale of queries times that of keys.
        probability: Quantizer of probabilities.
        probability_zero: Its zero point, or None for powers of two.
        attended: Quantizer of what comes out; its factor is the scale of probabilities times that
            of values.
    """

    zeros: tuple[int, int, int]
    score_scale: float
    probability: native.Quantizer
    probability_zero: int | None
    attended: native.Quantizer


class _Views(NamedTuple):
    """Memory of some pictures: scores, probabilities, how these and what is attended are walked."""

    scores: Tensor
    probabilities: Tensor
    rows: native.Walk
    attended: native.Walk


Quantizer = tuple[Tensor, "Tensor | None", "Tensor | None", int]
"""Scale, zero point or None for powers of two, table or None, and bits."""


def parameters(
    scales: Sequence[Tensor], zeros: Sequence[Tensor], probability: Quantizer, output: Quantizer
) -> Parameters:
    """Parameters from scales and zero points of queries, keys and values, and two quantizers."""
    query, key, value = scales
    query_zero, key_zero, value_zero = map(int, zeros)
    p_scale, p_zero, _, _ = probability
    return Parameters(
        (query_zero, key_zero, value_zero),
        float(query * key),
        native.quantizer(*probability),
        None if p_zero is None else int(p_zero),
        native.quantizer(*output, factor=float(p_scale * value)),
    )


class Products:
    """Memory of the compiled products, for up to so many matrices, one for each head of a picture.

    Args:
        matrices: Their number.
        tokens: Tokens of a picture.
        depth: Channels of a head.
    """

    def __init__(self, matrices: int, tokens: int, depth: int) -> None:
        whole = -(-tokens // LANES) * LANES
        self.operands = torch.empty(3, matrices, tokens, depth, dtype=torch.uint8)
        self.scores = torch.empty(2, matrices, tokens, tokens, dtype=torch.float32)
        # What lies behind the codes of a row stays zero.
        self.p_codes = torch.zeros(matrices, tokens, whole, dtype=torch.uint8)
        self.packed = torch.empty(matrices, whole, depth, dtype=native.packed_operands())
        self.columns = torch.empty(matrices, max(whole, depth), dtype=torch.int32)
        self.views: dict[tuple[int, int], _Views] = {}

    def _views_of(self, pictures: int, heads: int) -> _Views:
        """Views of the memory, worked out once."""
        if (found := self.views.get((pictures, heads))) is None:
            _, _, tokens, depth = self.operands.shape
            matrices, width, whole = pictures * heads, heads * depth, self.p_codes.shape[2]
            scores, p = (part[:matrices] for part in self.scores)
            found = self.views[pictures, heads] = _Views(
                scores,
                p,
                native.walk((1, 1, matrices * tokens, tokens), (0, 0, tokens), (0, 0, whole)),
                native.walk(
                    (pictures, heads, tokens, depth),
                    (heads * tokens * depth, tokens * depth, depth),
                    (tokens * width, depth, width),
                ),
            )
        return found

    def attend(
        self, told: Parameters, target: int, pictures: int, heads: int, added: Tensor | None = None
    ) -> None:
        """From the operands of the first matrices to codes of attended values.

        Operands are codes, of keys and values less 128.

        Args:
            told: Parameters.
            target: Address of the codes, (pictures, tokens, heads * depth).
            pictures: Their number.
            heads: Heads of each.
            added: Maps that are added to the scores, (maps, heads, tokens, tokens); pictures take
                them in turn.
        """
        lib, threads = native.library(), torch.get_num_threads()
        _, _, tokens, depth = self.operands.shape
        scores, p, rows, go = self._views_of(pictures, heads)
        matrices, step = len(scores), self.operands.stride(0)
        query, p_codes = self.operands.data_ptr(), self.p_codes.data_ptr()
        packed, columns = self.packed.data_ptr(), self.columns.data_ptr()
        query_zero, key_zero, value_zero = told.zeros
        lib.qtool_scores(
            *(query, query + step, scores.data_ptr(), matrices, tokens, depth),
            *(query_zero, key_zero, told.score_scale, packed, columns, threads),
        )
        if added is not None:
            scores.view(-1, len(added), heads, tokens, tokens).add_(added)
        torch.softmax(scores, -1, out=p)
        if told.probability_zero is None:
            lib.qtool_powers(p.data_ptr(), matrices * tokens, tokens, told.probability, threads)
            values = self.operands[2, :matrices].view(torch.int8)
            found = torch.bmm(p, values.float().sub_(value_zero - 128))
            lib.qtool_codes(found.data_ptr(), target, go, told.attended, 1, 0, 0, threads)
            return
        lib.qtool_codes(p.data_ptr(), p_codes, rows, told.probability, 1, 0, 0, threads)
        lib.qtool_attended(
            *(p_codes, self.p_codes.shape[2], query + 2 * step, target, go),
            *(told.probability_zero, value_zero, told.attended, packed, columns, threads),
        )


def multiplies(tokens: int, depth: int) -> bool:
    """Whether the compiled products are there and take such heads."""
    fits = 1 < tokens <= MOST_TOKENS and depth <= MOST_DEPTH and depth % LANES == 0
    return fits and native.multiplies_codes()


def matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor
) -> Tensor:
    """Batched integer product; see `qtool.engine.ops.matmul`."""
    scale = a_scale.reshape(()) * b_scale.reshape(())
    if not exact.has_int8_units():
        reach = exact.reach(a_zero, 255) * exact.reach(b_zero, 255)
        sums = exact.float_sums(a.float() - a_zero, b.float() - b_zero, reach=reach)
        return sums.float().mul_(scale)
    terms = a.shape[-1]
    centred = (b ^ 128).view(torch.int8)
    a_offset, b_offset = int(a_zero), int(b_zero) - 128
    row_of_ones, column_of_ones = a.new_ones(1, terms), centred.new_ones(terms, 1)
    out = scale.new_empty(*a.shape[:-1], b.shape[-1])
    for index in itertools.product(*map(range, a.shape[:-2])):
        left, right = a[index], centred[index]
        sums = torch._int_mm(left, right)
        if b_offset:
            sums -= b_offset * torch._int_mm(left, column_of_ones)
        if a_offset:
            sums -= a_offset * (torch._int_mm(row_of_ones, right) - terms * b_offset)
        out[index].copy_(sums).mul_(scale)
    return out


def matmul_log2(
    p: Tensor, p_scale: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, bits: int
) -> Tensor:
    """Batched product with powers of two; see `qtool.engine.ops.matmul_log2`."""
    exponents = (EXPONENT_BIAS - p.int()).clamp_(min=0)
    weights = exponents.masked_fill_(p == 2**bits - 1, 0).bitwise_left_shift_(23)
    sums = weights.view(torch.float32) @ (v.float() - v_zero.reshape(()))
    return sums.mul_(p_scale.reshape(()) * v_scale.reshape(()))


def attention(
    qkv: Tensor,
    qkv_scale: Tensor,
    qkv_zero: Tensor,
    added: Tensor | None,
    p_scale: Tensor,
    p_zero: Tensor | None,
    p_table: Tensor | None,
    p_bits: int,
    out_scale: Tensor,
    out_zero: Tensor,
    out_table: Tensor | None,
    out_bits: int,
) -> Tensor:
    """Attention from codes to codes; see `qtool.engine.ops.attention`."""
    _, batch, tokens, heads, width = qkv.shape
    p_reach = 1 if p_zero is None else 255 if p_table is not None else 2**p_bits - 1
    out = qkv.new_empty(batch, tokens, heads * width)
    if not out.numel():
        return out
    by_head = out.view(batch, tokens, heads, width).transpose(1, 2)
    size = max(1, BLOCK_SCORES // max(1, heads * tokens * tokens))
    if added is not None:  # so that every block begins with the first of the added maps
        size = -(-size // len(added)) * len(added)
    if multiplies(tokens, width):
        probability = (p_scale, p_zero, p_table, p_bits)
        output = (out_scale, out_zero, out_table, out_bits)
        told = parameters(qkv_scale.split(1), qkv_zero.split(1), probability, output)
        products = Products(min(batch, size) * heads, tokens, width)
        for some in exact.blocks(batch, size):
            pictures = some.stop - some.start
            matrices = pictures * heads
            operands = products.operands[:, :matrices].view(3, pictures, heads, tokens, width)
            operands.copy_(qkv[:, some].transpose(2, 3))
            operands[1:].bitwise_xor_(128)
            products.attend(told, out[some].data_ptr(), pictures, heads, added)
        return out
    for some in exact.blocks(batch, size):
        query, key, value = (
            quantizers.levels(part[some].transpose(1, 2), zero).flatten(0, 1)
            for part, zero in zip(qkv.contiguous(), qkv_zero, strict=True)
        )
        scores = exact.float_sums(query, key.transpose(1, 2), reach=255 * 255).float()
        scores = scores.mul_(qkv_scale[0] * qkv_scale[1]).unflatten(0, (-1, heads))
        if added is not None:
            scores = (scores.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
        powers = _probabilities(F.softmax(scores, dim=-1), p_scale, p_zero, p_table, p_bits)
        sums = exact.float_sums(powers.flatten(0, 1), value, reach=255 * p_reach).float()
        attended = sums.mul_(p_scale.reshape(()) * qkv_scale[2]).unflatten(0, (-1, heads))
        quantizers.quantize_into(by_head[some], attended, out_scale, out_zero, out_table, out_bits)
    return out


def _probabilities(
    p: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, bits: int
) -> Tensor:
    """Levels of probabilities as float32: codes less their zero point, or powers of two."""
    if zero is None:
        return powers_of_two(p.div_(scale), bits)
    return quantizers.levels(quantizers.quantize(p, scale, zero, table, bits), zero)


def powers_of_two(ratio: Tensor, bits: int) -> Tensor:
    """The power of two that `quantize_log2` stands for, 0 for the top code; overwrites `ratio`."""
    last = min(2**bits - 2, EXPONENT_BIAS - 1)
    field = ratio.view(torch.int32).add_(quantizers.SQRT_HALF_CARRY).bitwise_and_(~0x7FFFFF)
    powers = field.view(torch.float32).clamp_(max=1.0)
    return torch.threshold_(powers, 2.0 ** -(last + 0.5), 0.0)
