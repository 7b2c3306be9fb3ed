"""Attention modules whose two matrix products are quantized.

They take over the parts of the float module they replace, so that every parameter keeps its name,
and hand the products to a child module: simulated while calibrating, integer afterwards.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn


class Products(Protocol):
    """The two matrix products of attention."""

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, N, D) and (B, H, M, D) to (B, H, N, M)."""

    def values(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """(B, H, N, M) and (B, H, M, D) to (B, H, N, D)."""


class _TakesOver(nn.Module):
    """A module made of the children, parameters and buffers of another."""

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

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

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return query, key, value


class QuantAttention(_TakesOver):
    """Global self-attention as in ViT and DeiT: (B, N, C) to (B, N, C)."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend over all tokens; `attn_mask` is added to the scores (or hides where False)."""
        query, key, value = self._heads(x)
        query, key = self.q_norm(query), self.k_norm(key)
        products = cast(Products, self.products)
        scores = products.scores(query * self.scale, key)
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
        attended = products.values(scores.softmax(dim=-1), value)
        attended = self.norm(attended.transpose(1, 2).flatten(2))
        out: Tensor = self.proj_drop(self.proj(attended))
        return out


class QuantWindowAttention(_TakesOver):
    """Self-attention within windows as in Swin: (B * windows, N, C) to the same."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window; `mask` (windows, N, N) is added to the scores."""
        query, key, value = self._heads(x)
        products = cast(Products, self.products)
        scores = products.scores(query * self.scale, key)
        tokens = x.shape[1]
        index = cast(Tensor, self.relative_position_index).flatten()
        bias = cast(Tensor, self.relative_position_bias_table)[index]
        scores = scores + bias.view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            grouped = scores.unflatten(0, (-1, windows)) + mask.unsqueeze(1).unsqueeze(0)
            scores = grouped.flatten(0, 1)
        attended = products.values(scores.softmax(dim=-1), value)
        out: Tensor = self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))
        return out


ATTENTION_CLASSES: dict[str, type[QuantAttention] | type[QuantWindowAttention]] = {
    "tokens": QuantAttention,
    "windows": QuantWindowAttention,
}
"""The replacement for each kind of attention site."""
