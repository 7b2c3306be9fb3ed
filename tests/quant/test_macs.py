"""Multiplications of layers, counted by hand."""

import torch
from torch import nn

from qtool.models import vision
from qtool.quant.macs import multiplications
from qtool.quant.plan import LayerPlan


def test_convolutions_and_linear_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 7),
    )
    plans = {
        "0": LayerPlan("conv", 4, 4),
        "1": LayerPlan("conv", 4, 4),
        "3": LayerPlan("linear", 4, 4),
    }
    found = multiplications(model, plans, torch.zeros(1, 3, 10, 10))
    assert found == {"0": 8 * 25 * 27, "1": 8 * 25 * 9, "3": 7 * 200}


def test_only_planned_layers_count_and_no_hook_stays(tiny_vit):
    site = vision.layout(tiny_vit).attentions[0].name
    plans = {site: LayerPlan("attention", 0, 4), "head": LayerPlan("linear", 4, 4)}
    size = tiny_vit.patch_embed.img_size
    found = multiplications(tiny_vit, plans, torch.zeros(1, 3, *size))
    tokens = tiny_vit.patch_embed.num_patches + tiny_vit.num_prefix_tokens
    assert found == {
        site: 2 * tokens * tokens * tiny_vit.embed_dim,
        "head": tiny_vit.embed_dim * tiny_vit.num_classes,
    }
    assert not any(module._forward_hooks for module in tiny_vit.modules())
