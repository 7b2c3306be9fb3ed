"""Attention modules with exchangeable products against the modules of timm they replace."""

import copy

import pytest
import torch
from torch import nn

from qtool.models import vision
from qtool.quant.attention import ATTENTION_CLASSES, QuantAttention, QuantWindowAttention
from qtool.quant.plan import LayerPlan, replace_module
from qtool.quant.simulation import SimulatedProducts


def float_products():
    """Products that are not quantized: a simulation nobody switched on."""
    return SimulatedProducts(LayerPlan("attention", 0, 4, probabilities="log2"))


def with_float_products(model):
    """A copy of a model with all its attention modules replaced, still in float."""
    replaced = copy.deepcopy(model)
    for site in vision.layout(model).attentions:
        source = replaced.get_submodule(site.name)
        replace_module(replaced, site.name, ATTENTION_CLASSES[site.kind](source, float_products()))
    return replaced.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens():
    return torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_swin"])
def test_a_model_computes_the_same(model, images, request):
    original = request.getfixturevalue(model)
    with torch.no_grad():
        torch.testing.assert_close(
            with_float_products(original)(images), original(images), rtol=1e-4, atol=1e-5
        )


def test_query_and_key_norms_are_kept(build_model, images):
    model = build_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=10,
        qk_norm=True,
    )
    replaced = with_float_products(model)
    assert isinstance(replaced.blocks[0].attn.q_norm, nn.LayerNorm)
    with torch.no_grad():
        torch.testing.assert_close(replaced(images), model(images), rtol=1e-4, atol=1e-5)


def mask(kind):
    hidden = torch.rand(17, 17, generator=torch.Generator().manual_seed(1)) < 0.3
    hidden.fill_diagonal_(False)
    if kind == "hides":
        return {"attn_mask": ~hidden}
    if kind == "adds":
        return {"attn_mask": hidden.float() * -2.0}
    return {"is_causal": kind == "causal"}


@pytest.mark.parametrize("kind", ["none", "hides", "adds", "causal"])
@torch.no_grad()
def test_masks_of_token_attention(tiny_vit, tokens, kind):
    source = tiny_vit.blocks[0].attn
    quantized = QuantAttention(source, float_products())
    torch.testing.assert_close(quantized(tokens, **mask(kind)), source(tokens, **mask(kind)))


@torch.no_grad()
def test_masks_of_window_attention(tiny_swin):
    block = tiny_swin.layers[0].blocks[1]
    assert block.attn_mask is not None
    windows = torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(0))
    quantized = QuantWindowAttention(block.attn, float_products())
    assert not torch.equal(quantized(windows), quantized(windows, mask=block.attn_mask))
    torch.testing.assert_close(quantized(windows), block.attn(windows))
    torch.testing.assert_close(
        quantized(windows, mask=block.attn_mask), block.attn(windows, mask=block.attn_mask)
    )


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_swin"])
def test_tensors_keep_their_names(model, request):
    original = request.getfixturevalue(model)
    replaced = with_float_products(original)
    ours = {name for name in replaced.state_dict() if ".products." not in name}
    assert ours == set(original.state_dict())
    buffers = {name for name, _ in replaced.named_buffers() if ".products." not in name}
    assert buffers == {name for name, _ in original.named_buffers()}
