"""Residual networks as lists of blocks."""

import pytest
import torch

from qtool.errors import UsageError
from qtool.models import vision
from qtool.models.residual import residual_layout


def described(name, size=None, **arguments):
    return residual_layout(vision.build(name, arguments, device="meta"), input_size=size)


def test_a_network_for_cifar():
    layout = described("resnet8", (3, 32, 32))
    assert layout.stem == ("conv1", "bn1", "act1")
    assert layout.head == ("global_pool", "linear")
    assert [block.name for block in layout.blocks] == ["layer1.0", "layer2.0", "layer3.0"]
    second = layout.blocks[1]
    assert (second.shortcut, second.stride, second.before) == (None, 2, 8)
    conv = second.convolutions[0]
    assert (conv.name, conv.norm) == ("layer2.0.conv1", "layer2.0.bn1")
    assert (conv.inputs, conv.outputs, conv.stride, conv.pixels) == (16, 32, (2, 2), 256)
    assert conv.multiplications() == 16 * 32 * 9 * 256
    assert conv.multiplications(8, 4) == 8 * 4 * 9 * 256


def test_a_network_of_timm():
    layout = described("resnet50", (3, 64, 64))
    assert layout.stem == ("conv1", "bn1", "act1", "maxpool")
    assert layout.head == ("global_pool", "fc")
    assert len(layout.blocks) == 16
    assert len(layout.convolutions) == 52
    first = layout.blocks[0]
    assert first.shortcut is not None
    assert first.shortcut.norm == "layer1.0.downsample.1"
    assert first.all_convolutions[-1] is first.shortcut
    assert [conv.kernel for conv in first.convolutions] == [(1, 1), (3, 3), (1, 1)]


def test_multiplications_agree_with_the_weights():
    layout = described("resnet18", (3, 224, 224))
    assert sum(conv.multiplications() for conv in layout.convolutions) == pytest.approx(
        1.6955e9, rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_tiny_patch16_224", "no body of residual blocks"),
        ("seresnet50", "has se"),
        ("resnext50_32x4d", "groups"),
        ("resnet50d", "downsample"),
    ],
)
def test_other_networks_are_refused(name, words):
    with pytest.raises(UsageError, match=words):
        described(name)


def test_other_activations_are_refused():
    with pytest.raises(UsageError, match="SiLU"):
        described("resnet18", act_layer="silu")


def test_counting_leaves_the_mode_alone():
    model = vision.build("resnet8", {}).train()
    residual_layout(model, input_size=(3, 16, 16))
    assert model.training
    assert all(torch.equal(b, torch.zeros_like(b)) for n, b in model.named_buffers() if "mean" in n)
