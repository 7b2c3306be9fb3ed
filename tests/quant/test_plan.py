"""Which layers get how many bits."""

import pytest
from torch import nn

from qtool.errors import UsageError
from qtool.models import vision
from qtool.quant.bits import BitSpec
from qtool.quant.plan import (
    FIRST_INPUT_BITS,
    LayerPlan,
    is_convolution,
    plan_layers,
    replace_module,
    weight_parameters,
)

W4A4 = BitSpec(4, 4)


def planned(model, bits=W4A4, **options):
    names = [site.name for site in vision.layout(model).attentions]
    return plan_layers(model, attentions=names, bits=bits, **options)


def test_every_linear_layer_attention_and_patch_embedding_is_planned(tiny_vit):
    plans = planned(tiny_vit)
    block = [".attn", ".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.fc2"]
    expected = [f"blocks.{number}{part}" for number in range(2) for part in block]
    assert list(plans) == ["patch_embed.proj", *expected, "head"]
    assert plans["patch_embed.proj"] == LayerPlan("conv", 4, FIRST_INPUT_BITS)
    assert plans["blocks.0.mlp.fc1"] == LayerPlan("linear", 4, 4)
    assert plans["blocks.1.attn"] == LayerPlan("attention", 0, 4, probabilities="log2")


def test_swin_reductions_and_head_are_planned(tiny_swin):
    plans = planned(tiny_swin)
    assert plans["layers.1.downsample.reduction"].kind == "linear"
    assert plans["head.fc"].kind == "linear"
    assert [name for name, plan in plans.items() if plan.kind == "attention"] == [
        "layers.0.blocks.0.attn",
        "layers.0.blocks.1.attn",
        "layers.1.blocks.0.attn",
    ]


@pytest.mark.parametrize(
    ("activation", "probabilities"), [(2, "log2"), (6, "log2"), (7, "uniform"), (8, "uniform")]
)
def test_wide_probabilities_are_uniform(tiny_vit, activation, probabilities):
    plan = planned(tiny_vit, BitSpec(3, activation))["blocks.0.attn"]
    assert plan == LayerPlan("attention", 0, activation, probabilities=probabilities)


@pytest.mark.parametrize("activation", [2, 4, 7])
def test_tables_serve_all_activations_below_eight_bits(tiny_vit, activation):
    plans = planned(
        tiny_vit, BitSpec(4, activation), quantizer="table", keep=[("head", BitSpec(8, 8))]
    )
    assert plans["blocks.0.attn"] == LayerPlan("attention", 0, activation, "table", "table")
    assert plans["blocks.0.attn.qkv"] == LayerPlan("linear", 4, activation, "table")
    assert plans["patch_embed.proj"].quantizer == "uniform"
    assert plans["head"] == LayerPlan("linear", 8, 8, "uniform")


def test_the_last_rule_that_matches_wins(tiny_vit):
    keep = [("blocks.*", BitSpec(6, 6)), ("*.fc1", BitSpec(8, 8)), ("blocks.1.*", BitSpec(5, 7))]
    plans = planned(tiny_vit, keep=keep)
    found = {name: (plan.weight_bits, plan.input_bits) for name, plan in plans.items()}
    assert found["blocks.0.mlp.fc1"] == (8, 8)
    assert found["blocks.0.mlp.fc2"] == (6, 6)
    assert found["blocks.1.mlp.fc1"] == (5, 7)
    assert found["head"] == (4, 4)
    assert plans["blocks.1.attn"].probabilities == "uniform"


def test_skipped_layers_are_absent_and_skip_beats_keep(tiny_vit):
    plans = planned(tiny_vit, keep=[("head", BitSpec(8, 8))], skip=["head", "blocks.0.*"])
    assert "head" not in plans
    assert not [name for name in plans if name.startswith("blocks.0")]
    assert "blocks.1.attn" in plans


@pytest.mark.parametrize("rule", [{"skip": ["haed"]}, {"keep": [("haed", W4A4)]}])
def test_a_glob_that_matches_nothing_is_an_error_that_names_layers(tiny_vit, rule):
    with pytest.raises(UsageError, match="'haed'") as caught:
        planned(tiny_vit, **rule)
    assert "patch_embed.proj" in caught.value.remedy


def test_nothing_left_to_quantize_is_an_error(tiny_vit):
    with pytest.raises(UsageError, match="every layer is skipped"):
        planned(tiny_vit, skip=["*"])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(4, 6, 4, stride=2, padding=1, groups=2), True),
        (nn.Conv2d(4, 6, 4, padding="valid"), True),
        (nn.Conv2d(4, 6, 4, padding="same"), False),
        (nn.Conv2d(4, 6, 4, padding=1, padding_mode="reflect"), False),
        (nn.ConvTranspose2d(4, 6, 4), False),
        (nn.Conv1d(4, 6, 4), False),
    ],
)
def test_convolutions_are_told_from_others(module, expected):
    assert is_convolution(module) is expected


def test_only_the_first_convolution_sees_the_picture(build_model):
    model = build_model("resnet18", num_classes=7)
    norms = dict(vision.layout(model).batch_norms)
    plans = planned(model, quantizer="table", batch_norms=norms)
    assert plans["conv1"] == LayerPlan("conv", 4, FIRST_INPUT_BITS, norm="bn1")
    first = plans["layer1.0.conv1"]
    assert first == LayerPlan("conv", 4, 4, "table", norm="layer1.0.bn1")
    assert first.options() == {"quantizer": "table", "norm": "layer1.0.bn1"}
    assert plans["fc"] == LayerPlan("linear", 4, 4, "table")
    assert sum(plan.kind == "conv" for plan in plans.values()) == 20
    kept = planned(model, keep=[("conv1", BitSpec(8, 8)), ("fc", BitSpec(8, 8))])
    assert (kept["conv1"].weight_bits, kept["fc"].input_bits) == (8, 8)


def test_modules_are_replaced_by_name(tiny_vit):
    identity, other = nn.Identity(), nn.Identity()
    replace_module(tiny_vit, "blocks.1.mlp.fc1", identity)
    replace_module(tiny_vit, "head", other)
    assert tiny_vit.blocks[1].mlp.fc1 is identity
    assert tiny_vit.head is other


def test_planned_weights_are_counted(tiny_vit):
    plans = planned(tiny_vit, skip=["blocks.*"])
    assert weight_parameters(tiny_vit, plans) == 32 * 3 * 8 * 8 + 10 * 32
