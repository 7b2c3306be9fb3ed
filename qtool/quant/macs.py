"""How many multiplications a layer takes for one picture, and what they cost in bit operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtool.quant.plan import LayerPlan


@torch.no_grad()
def multiplications(
    model: nn.Module, plans: Mapping[str, LayerPlan], image: Tensor
) -> dict[str, int]:
    """Count the multiplications of planned layers by running one picture.

    Args:
        model: The float model.
        plans: Its planned layers.
        image: (1, 3, H, W).

    Returns:
        Per layer: outputs times inputs of each for weights; for attention, those of the scores and
        of the product with the values.
    """
    found: dict[str, int] = {}
    handles = []
    for name, plan in plans.items():

        def count(
            module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name
        ) -> None:
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):
                found[name] = output.numel() * weight[0].numel()
            else:
                groups, tokens, channels = args[0].shape
                found[name] = 2 * groups * tokens * tokens * channels

        if plan.kind in ("linear", "conv", "attention"):
            handles.append(model.get_submodule(name).register_forward_hook(count))
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return found
