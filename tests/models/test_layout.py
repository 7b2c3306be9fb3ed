"""Attention sites, reconstruction units and tokens of each family."""

import pytest
import torch

from qtool.errors import UsageError
from qtool.models import vision
from qtool.models.layout import layout, unfuse_attention

TINY = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SWIN = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "num_classes": 5,
}


def vit(name="vit_tiny_patch16_224", **more):
    return vision.build(name, {**TINY, **more})


def swin():
    return vision.build("swin_tiny_patch4_window7_224", SWIN)


def test_vit():
    found = layout(vit())
    assert found.units == ("patch_embed.proj", "blocks.0", "blocks.1", "head")
    assert [site.name for site in found.attentions] == ["blocks.0.attn", "blocks.1.attn"]
    assert {(site.kind, site.heads, site.grid) for site in found.attentions} == {
        ("tokens", 3, (2, 2))
    }
    assert (found.class_token, found.prefix_tokens, found.grid) == (True, 1, (2, 2))


def test_distilled_deit_has_two_prefix_tokens_and_two_heads():
    found = layout(vit("deit_tiny_distilled_patch16_224"))
    assert found.prefix_tokens == 2
    assert found.class_token
    assert found.units[-2:] == ("head", "head_dist")


def test_register_tokens_are_prefix_tokens():
    assert layout(vit(reg_tokens=4)).prefix_tokens == 5


def test_average_pooling_without_class_token():
    found = layout(vit(global_pool="avg", class_token=False))
    assert (found.class_token, found.prefix_tokens) == (False, 0)


def test_class_token_that_pooling_ignores():
    found = layout(vit(global_pool="avg"))
    assert (found.class_token, found.prefix_tokens) == (False, 1)


def test_no_head_no_unit():
    assert layout(vit(num_classes=0)).units[-1] == "blocks.1"


def test_swin():
    found = layout(swin())
    assert found.units == (
        "patch_embed.proj",
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.downsample",
        "layers.1.blocks.0",
        "head.fc",
    )
    assert [site.heads for site in found.attentions] == [2, 2, 4]
    assert {(site.kind, site.grid) for site in found.attentions} == {("windows", (4, 4))}
    assert (found.class_token, found.prefix_tokens, found.grid) == (False, 0, (16, 16))


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_unfused_sites_show_their_softmax_map(make):
    model = make()
    found = layout(model)
    images = torch.rand(2, 3, *((32, 32) if make is vit else (64, 64)))
    expected = model(images)
    unfuse_attention(model)
    maps = {}
    for site in found.attentions:
        model.get_submodule(f"{site.name}.attn_drop").register_forward_pre_hook(
            lambda _, inputs, name=site.name: maps.__setitem__(name, inputs[0])
        )
    torch.testing.assert_close(model(images), expected)
    for site in found.attentions:
        tokens = site.grid[0] * site.grid[1] + found.prefix_tokens
        assert maps[site.name].shape[1:] == (site.heads, tokens, tokens)
        torch.testing.assert_close(maps[site.name].sum(-1), torch.ones(maps[site.name].shape[:-1]))


@pytest.mark.parametrize("make", [vit, swin], ids=["vit", "swin"])
def test_units_run_in_the_order_given(make):
    model = make()
    ran = []
    for name in layout(model).units:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.rand(1, 3, *((32, 32) if make is vit else (64, 64))))
    assert tuple(ran) == layout(model).units


def test_convolutional_networks_have_no_attention(build_convolutional):
    for family in ("resnet", "mobilenet", "convnext"):
        found = layout(build_convolutional(family))
        assert found.attentions == ()
        assert bool(found.batch_norms) == (family != "convnext")
        assert (found.class_token, found.prefix_tokens, found.grid) == (False, 0, (0, 0))


@pytest.mark.parametrize(
    "name",
    [
        "resnetv2_50",
        "mobilenetv3_small_050",
        "mixer_s32_224",
        "beit_base_patch16_224",
        "swinv2_tiny_window8_256",
        "vit_relpos_small_patch16_224",
        "vit_base_patch16_siglip_224",
        "vit_tiny_r_s16_p8_224",
        "xcit_nano_12_p8_224",
    ],
)
def test_other_networks_are_refused(name):
    with pytest.raises(UsageError, match="parts between its layers"):
        layout(vision.build(name, {}, device="meta"))


def test_gated_attention_is_refused():
    model = vit()
    model.blocks[0].attn.gate = torch.nn.Linear(4, 4)
    with pytest.raises(UsageError, match="parts between its layers"):
        layout(model)
