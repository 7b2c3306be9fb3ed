"""Looking into attention modules while a forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qtool.methods.spdfq import losses
from qtool.models.vision import AttentionSite, Layout


@contextmanager
def unfused(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Make attention modules compute their softmax map in the open."""
    modules = [model.get_submodule(name) for name in names]
    before = [bool(module.fused_attn) for module in modules]
    for module in modules:
        module.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, fused in zip(modules, before, strict=True):
            module.fused_attn = fused  # type: ignore[assignment]


@contextmanager
def tapped(model: nn.Module, names: Sequence[str], *, source: str) -> Iterator[list[Tensor]]:
    """Record, in forward order, what enters the child `source` of some attention modules."""
    store: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        store.append(inputs[0])

    handles = [
        model.get_submodule(name).get_submodule(source).register_forward_pre_hook(record)
        for name in names
    ]
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


def summary_rows(probabilities: Tensor, *, site: AttentionSite, layout: Layout) -> Tensor:
    """Where the image-level summary looks: the class token's row, or the mean over all queries.

    Args:
        probabilities: Softmax map of one attention module, (B, H, N, N).
        site: The module.
        layout: Its model.

    Returns:
        Attention to the image patches, (B, H, T).
    """
    of_tokens = site.kind == "tokens"
    return losses.class_attention(
        probabilities,
        class_token=layout.class_token and of_tokens,
        prefix_tokens=layout.prefix_tokens if of_tokens else 0,
    )


@torch.no_grad()
def summary_attention(
    model: nn.Module, images: Tensor, *, sites: Sequence[AttentionSite], layout: Layout
) -> list[Tensor]:
    """`summary_rows` of some attention modules for images (B, 3, H, W), one (B, H, T) each."""
    names = [site.name for site in sites]
    with unfused(model, names), tapped(model, names, source="attn_drop") as caught:
        model(images)
    return [
        summary_rows(maps, site=site, layout=layout)
        for maps, site in zip(caught, sites, strict=True)
    ]
