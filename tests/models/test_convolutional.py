"""Units and foldable norms of convolutional networks."""

import pytest
import torch
from torch import nn

from qtool.models import vision
from qtool.models.convolutional import chains, parts

FAMILIES = ("resnet", "mobilenet", "convnext")


def test_resnet(build_model):
    found = parts(build_model("resnet18"))
    assert found.units[:4] == ("conv1", "layer1.0", "layer1.1", "layer2.0")
    assert found.units[-1] == "fc"
    assert ("conv1", "bn1") in found.batch_norms
    assert ("layer2.0.downsample.0", "layer2.0.downsample.1") in found.batch_norms
    assert len(found.batch_norms) == 20
    assert found.norms == ()


def test_a_deep_stem_is_one_unit(build_model):
    found = parts(build_model("resnet18d"))
    assert found.units[0] == "conv1"
    stem = [pair for pair in found.batch_norms if pair[0].startswith("conv1")]
    assert sorted(stem) == [
        ("conv1.0", "conv1.1"),
        ("conv1.3", "conv1.4"),
        ("conv1.6", "bn1"),
    ]


def test_mobilenet(build_model):
    found = parts(build_model("mobilenetv2_050"))
    assert found.units[:3] == ("conv_stem", "blocks.0.0", "blocks.1.0")
    assert found.units[-2:] == ("conv_head", "classifier")
    assert ("blocks.1.0.conv_dw", "blocks.1.0.bn2") in found.batch_norms
    assert ("conv_head", "bn2") in found.batch_norms
    assert len(found.batch_norms) == 52


def test_chains_of_blocks(build_model):
    found = list(chains(build_model("mobilenetv2_050")))
    between = tuple(f"blocks.0.0.{name}" for name in ("bn1", "aa", "se"))
    assert found[0] == ("blocks.0.0.conv_dw", between, "blocks.0.0.conv_pw")
    assert ("blocks.1.0.conv_pw", ("blocks.1.0.bn1",), "blocks.1.0.conv_dw") in found
    assert len(found) == 1 + 2 * 16
    found = list(chains(build_model("resnet50")))
    between = ("bn2", "drop_block", "act2", "aa")
    names = tuple(f"layer1.0.{name}" for name in between)
    assert ("layer1.0.conv2", names, "layer1.0.conv3") in found
    assert len(found) == 2 * 16
    assert not list(chains(build_model("vit_tiny_patch16_224", depth=1)))


def test_convnext(build_convolutional):
    found = parts(build_convolutional("convnext"))
    assert found.units == (
        "stem",
        "stages.0.blocks.0",
        "stages.1.downsample",
        "stages.1.blocks.0",
        "stages.2.downsample",
        "stages.2.blocks.0",
        "stages.3.downsample",
        "stages.3.blocks.0",
        "head.fc",
    )
    assert found.batch_norms == ()
    assert found.norms[0] == ("stages.0.blocks.0.norm", "stages.0.blocks.0.mlp.fc1")
    assert len(found.norms) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_units_run_in_the_order_given_and_hold_every_layer(build_convolutional, family):
    model = build_convolutional(family)
    units = vision.layout(model).units
    ran, called = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    for name in units:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.rand(1, 3, 32, 32))
    assert tuple(ran) == units
    assert all(any(f"{name}.".startswith(f"{unit}.") for unit in units) for name in called)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_norm_is_the_only_reader_of_its_convolution(build_convolutional, family):
    model = build_convolutional(family)
    seen, read = {}, {}
    pairs = vision.layout(model).batch_norms
    for convolution, norm in pairs:
        model.get_submodule(convolution).register_forward_hook(
            lambda _, __, output, name=convolution: seen.__setitem__(name, output)
        )
        model.get_submodule(norm).register_forward_pre_hook(
            lambda _, inputs, name=norm: read.__setitem__(name, inputs[0])
        )
    model(torch.rand(1, 3, 32, 32))
    assert len(seen) == len(pairs)
    assert all(read[norm] is seen[convolution] for convolution, norm in pairs)


def test_a_layer_outside_the_units_makes_a_network_unknown(build_model):
    model = build_model("test_resnet", num_classes=10)
    model.side = nn.Linear(3, 3)
    assert parts(model) is None


def test_a_strange_block_makes_a_network_unknown(build_model):
    model = build_model("test_resnet", num_classes=10)
    model.layer1[0] = nn.ModuleList([nn.Conv2d(3, 3, 1)])
    assert parts(model) is None
