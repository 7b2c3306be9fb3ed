"""Whole classifiers, rotated: the same answers from other numbers."""

import pytest
import torch
from torch import nn

from qtool.methods.rotated import rotated
from qtool.models import vision
from qtool.models.layout import layout

VIT = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 1, 1),
    "num_heads": (2, 4, 4),
    "num_classes": 5,
}
DISTILLED = "deit_tiny_distilled_patch16_224"
FAMILIES = [
    ("vit_tiny_patch16_224", VIT, 1),
    (DISTILLED, VIT, 1),
    ("deit3_small_patch16_224", VIT, 1),
    ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 2, "no_embed_class": True}, 1),
    ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}, 1),
    ("vit_tiny_patch16_224", {**VIT, "init_values": 0.3, "qkv_bias": False}, 1),
    ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}, 1),
    ("vit_tiny_patch16_224", {**VIT, "pre_norm": True}, 0),
    ("swin_tiny_patch4_window7_224", SWIN, 2),
]


def built(name, arguments):
    """A model whose norms, scales and biases are not those of a fresh one."""
    torch.manual_seed(0)
    model = vision.build(name, arguments).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    return model.requires_grad_(False)


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(("name", "arguments", "streams"), FAMILIES)
def test_answers_stay(name, arguments, streams):
    model = built(name, arguments)
    found = layout(model)
    assert len(found.streams) == streams
    x = torch.randn(2, 3, arguments["img_size"], arguments["img_size"])
    turned = rotated(model, found, x, quantized=linears(model))
    assert turned is not model
    expected = model(x)
    assert (turned(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    last = found.attentions[-1].name.removesuffix("attn") + "mlp.fc1.weight"
    changed = not torch.allclose(turned.get_parameter(last), model.get_parameter(last), atol=0.1)
    assert changed == bool(streams)


def test_a_model_that_works_on_its_stream_in_secret_is_rotated_in_its_heads_only():
    model = built("vit_tiny_patch16_224", VIT)
    model.blocks[0].register_forward_hook(lambda _, args, out: out.clamp(max=0.5))
    x = torch.randn(2, 3, 32, 32)
    turned = rotated(model, layout(model), x, quantized=linears(model))
    assert torch.allclose(turned(x), model(x), atol=1e-4)
    assert torch.equal(turned.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert not torch.equal(turned.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_a_network_without_attention_is_not_even_copied():
    model = vision.build("resnet18", {"num_classes": 5})
    x = torch.randn(1, 3, 32, 32)
    assert rotated(model, layout(model), x, quantized=linears(model)) is model


def test_norms_without_shifts_keep_the_stream_as_it_is():
    model = vision.build("vit_tiny_patch16_224", VIT)
    model.blocks[1].norm2 = nn.LayerNorm(48, bias=False)
    assert layout(model).streams == ()


def test_a_layer_that_stays_in_float_gets_no_bias():
    model = built("vit_tiny_patch16_224", {**VIT, "qkv_bias": False})
    x = torch.randn(2, 3, 32, 32)
    turned = rotated(model, layout(model), x, quantized=linears(model) - {"blocks.0.attn.qkv"})
    assert turned.state_dict().keys() == model.state_dict().keys()
    assert torch.allclose(turned(x), model(x), atol=1e-4)
