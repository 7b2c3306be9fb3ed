"""Attention modules whose two matrix products are quantized.

They take over the parts of the float module they replace, so that every parameter keeps its name,
and hand the products to a child module: simulated while calibrating, integer afterwards.
"""

from __future__ import annotations

from types import NoneType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from qtool.engine import ops
from qtool.quant.layers import CodeQuantizer, Feeds, IntegerProducts, QuantLinear


class Products(Protocol):
    """The two matrix products of attention."""

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, N, D) and (B, H, M, D) to (B, H, N, M)."""

    def values(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, M) and (B, H, M, D) to (B, H, N, D)."""


_NORMS = ("q_norm", "k_norm", "norm")


class _TakesOver(nn.Module):
    """A module made of the children, parameters and buffers of another."""

    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    operand_scale: Tensor
    operand_zero_point: Tensor
    operand_table: Tensor | None
    projected_scale: Tensor

    def __init__(self, source: nn.Module, products: nn.Module) -> None:
        super().__init__()
        for name, child in source.named_children():
            self.add_module(name, child)
        for name, parameter in source.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        persistent = set(source.state_dict())
        for name, buffer in source.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in persistent)
        self.products = products
        self.num_heads = cast(int, source.num_heads)
        self.scale = cast(float, source.scale)

    def _attended(
        self, projected: Tensor, added: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """Attend on what `qkv` returned, (B, N, 3 C), to (B, N, C).

        Args:
            projected: Queries, keys and values, or their codes (3, B, N, C).
            added: Added to the scores of every `len(added)` elements of the batch in turn,
                (windows, heads, N, N), or None.
            residual: Added to the result by an integer `proj`, (B, N, C), or None.
        """
        if projected.dtype == torch.uint8:
            attended = self._attended_codes(projected.unflatten(3, (self.num_heads, -1)), added)
        else:
            operands = projected.unflatten(2, (3, self.num_heads, -1))
            query, key, value = operands.permute(2, 0, 3, 1, 4).unbind(0)
            query, key = self._normed("q_norm", query), self._normed("k_norm", key)
            products = cast(Products, self.products)
            scores = products.scores(query * self.scale, key)
            if added is not None:
                scores = (scores.unflatten(0, (-1, len(added))) + added).flatten(0, 1)
            values = products.values(scores.softmax(dim=-1), value)
            attended = self._normed("norm", values.transpose(1, 2).flatten(2))
        out = self.proj(attended) if residual is None else self.proj(attended, residual)
        dropped: Tensor = self.proj_drop(out)
        return dropped

    def _normed(self, name: str, x: Tensor) -> Tensor:
        """Apply one of the norms that some models have here."""
        norm = getattr(self, name, None)
        out: Tensor = x if norm is None else norm(x)
        return out

    def _attended_codes(self, codes: Tensor, added: Tensor | None) -> Tensor:
        """Codes (3, B, N, heads, D) to the codes (B, N, C) that `proj` takes."""
        products = cast(IntegerProducts, self.products)
        reader = cast(QuantLinear, self.proj).input_quantizer()
        p_scale, p_zero = products.parameters_of("probability")
        return ops.attention(
            codes,
            self.operand_scale,
            self.operand_zero_point,
            added=added,
            p_scale=p_scale,
            p_zero=None if products.probabilities == "log2" else p_zero,
            p_table=products.table_of("probability"),
            p_bits=products.bits,
            out_scale=reader.scale,
            out_zero=reader.zero_point,
            out_table=reader.table,
            out_bits=reader.bits,
        )

    def _operand_quantizers(self) -> CodeQuantizer:
        """How queries, keys and values are quantized as they leave `qkv`."""
        bits = cast(IntegerProducts, self.products).bits
        return CodeQuantizer(
            self.projected_scale, self.operand_zero_point, self.operand_table, bits
        )

    def is_plain(self) -> bool:
        """Whether there are no norms in here."""
        return all(
            isinstance(getattr(self, name, None), (nn.Identity, NoneType)) for name in _NORMS
        )

    def as_projected(self, scale: Tensor) -> Tensor:
        """Scales (3,) of queries, keys and values as `qkv` gives them.

        Queries are quantized after their scaling, which the quantizer of `qkv` takes over.
        """
        return scale / scale.new_tensor([self.scale, 1.0, 1.0])

    def take_codes(self) -> bool:
        """Let `qkv` end in codes, if everything here is quantized; tell whether it does."""
        layers = all(type(layer) is QuantLinear for layer in (self.qkv, self.proj))
        if not (self.is_plain() and layers and type(self.products) is IntegerProducts):
            return False
        operands = self.products.operands()
        for name, parameter in (
            ("operand_scale", operands.scale),
            ("operand_zero_point", operands.zero_point),
            ("operand_table", operands.table),
            ("projected_scale", self.as_projected(operands.scale)),
        ):
            self.register_buffer(name, parameter, persistent=False)
        cast(QuantLinear, self.qkv).feeds = Feeds(self._operand_quantizers)
        return True


class QuantAttention(_TakesOver):
    """Global self-attention as in ViT and DeiT: (B, N, C) to (B, N, C)."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attend over all tokens; `attn_mask` is added to the scores (or hides where False).

        `residual` is added to the result where all layers are integer.
        """
        batch, tokens, _ = x.shape
        if is_causal:
            attn_mask = x.new_ones((tokens, tokens), dtype=torch.bool).tril()
        added = None
        if attn_mask is not None:
            added = attn_mask
            if attn_mask.dtype == torch.bool:
                added = torch.zeros_like(attn_mask, dtype=torch.float32)
                added = added.masked_fill_(~attn_mask, -torch.inf)
            maps = batch if attn_mask.dim() == 4 and len(attn_mask) > 1 else 1
            added = added.expand(maps, self.num_heads, tokens, tokens)
        return self._attended(self.qkv(x), added, residual)


class QuantWindowAttention(_TakesOver):
    """Self-attention within windows as in Swin: (B * windows, N, C) to the same."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window; `mask` (windows, N, N) is added to the scores."""
        tokens = x.shape[1]
        index = cast(Tensor, self.relative_position_index).flatten()
        bias = cast(Tensor, self.relative_position_bias_table)[index]
        added = bias.view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            added = added + mask.unsqueeze(1)
        return self._attended(self.qkv(x), added)


ATTENTION_CLASSES: dict[str, type[QuantAttention] | type[QuantWindowAttention]] = {
    "tokens": QuantAttention,
    "windows": QuantWindowAttention,
}
"""The replacement for each kind of attention site."""
