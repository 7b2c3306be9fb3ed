"""Small residual networks: names of weights, shortcuts without weights, opening from a file."""

import pytest
import torch
from safetensors.torch import save_file

from qtool.errors import MissingError, UsageError
from qtool.models import cifar, vision


def test_names_are_those_of_the_usual_files():
    names = set(cifar.build("resnet8").state_dict())
    assert {"conv1.weight", "bn1.running_var", "linear.weight", "linear.bias"} <= names
    assert {"layer1.0.conv1.weight", "layer3.0.bn2.bias"} <= names
    assert not any("shortcut" in name or "act1" in name for name in names)


@pytest.mark.parametrize(("name", "convolutions"), [("resnet8", 7), ("resnet20", 19)])
def test_depth_counts_layers_with_weights(name, convolutions):
    model = cifar.build(name, num_classes=7, width=4)
    found = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(found) == convolutions
    assert model.num_classes == 7
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_a_padded_shortcut_skips_pixels_and_adds_zeros():
    x = torch.arange(2.0 * 16).view(1, 2, 4, 4)
    y = cifar.PaddedShortcut(2, 1)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_opened_from_plain_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    source = cifar.build("resnet8", num_classes=3)
    save_file(source.state_dict(), path)
    opened = vision.open_model("resnet8", weights=path)
    assert opened.model_args == {"num_classes": 3}
    assert opened.data == cifar.DATA
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(opened.model(x), source.eval()(x))
    assert vision.resolve("resnet8", weights=path) == "resnet8"
    assert vision.outline("resnet8", weights="pretrained")[1] == (3, 32, 32)
    layout = vision.layout(opened.model)
    assert layout.units[0] == "conv1"
    assert layout.units[-1] == "linear"
    assert len(layout.batch_norms) == 7


def test_without_weights_a_file_is_asked_for():
    for ask in (vision.open_model, vision.resolve):
        with pytest.raises(MissingError) as caught:
            ask("resnet20")
        assert "--weights FILE" in caught.value.remedy


def test_wrong_arguments_and_other_depths_are_refused():
    with pytest.raises(UsageError, match="cannot build resnet20"):
        vision.build("resnet20", {"height": 3})
    with pytest.raises(UsageError, match="no model called 'resnet21'"):
        vision.resolve("resnet21")


def test_real_weights_fit(shared_data):
    path = shared_data / "weights" / "cifar10_resnet20.safetensors"
    opened = vision.open_model("resnet20", weights=path)
    assert opened.model_args == {"num_classes": 10}
