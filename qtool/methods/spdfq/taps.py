"""Looking into attention modules while a forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


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
