"""Simulated convolutions have the bits of the engine; folding a BatchNorm changes nothing."""

import pytest
import torch
from torch import nn

from qtool.engine import dispatch
from qtool.models import vision
from qtool.quant.convolution import SimulatedConv2d, fold_norms, without_norm
from qtool.quant.layers import QuantConv2d
from qtool.quant.plan import LayerPlan

FORMS = {
    "point": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "patches": {"kernel_size": (4, 2), "stride": (4, 2), "bias": False},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 0), "stride": (1, 2)},
    "grouped": {"kernel_size": 3, "groups": 2, "bias": False},
    "depthwise": {"kernel_size": 7, "padding": 3, "groups": 4},
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def convolution(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv2d(4, 8, **options)


def calibrated(source, plan, images):
    layer = SimulatedConv2d(source, plan)
    layer.observing = True
    layer(images)
    layer.observing = False
    layer.calibrate()
    layer.enabled = True
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("weight_bits", "input_bits", "quantizer"),
    [(2, 8, "uniform"), (4, 4, "table"), (3, 5, "uniform"), (8, 2, "table"), (8, 8, "uniform")],
)
def test_a_simulated_convolution_has_the_bits_of_the_engine(
    generator, form, weight_bits, input_bits, quantizer
):
    images = torch.randn(9, 4, 8, 10, generator=generator)
    source = convolution(**FORMS[form])
    plan = LayerPlan("conv", weight_bits, input_bits, quantizer)
    layer = calibrated(source, plan, images)
    # Inputs beyond the calibrated range are clipped alike.
    expected = layer(3 * images)
    frozen = layer.freeze()
    assert isinstance(frozen, QuantConv2d)
    assert expected.shape == source(images).shape
    for backend in ("auto", "reference"):
        with dispatch.use_backend(backend):
            assert torch.equal(frozen(3 * images), expected), backend
    if weight_bits == input_bits == 8:
        target = source(images).detach()
        error = (layer(images).detach() - target).norm() / target.norm()
        assert float(error) < 0.02


@pytest.mark.parametrize("form", FORMS)
def test_a_disabled_layer_is_the_float_layer(generator, form):
    images = torch.randn(2, 4, 8, 10, generator=generator)
    source = convolution(**FORMS[form])
    layer = SimulatedConv2d(source, LayerPlan("conv", 2, 2))
    torch.testing.assert_close(layer(images), source(images))


def test_large_pictures_are_seen_in_part(generator, monkeypatch):
    images = torch.randn(6, 4, 24, 20, generator=generator)
    layer = SimulatedConv2d(convolution(kernel_size=3, padding=1), LayerPlan("conv", 4, 4))
    whole = layer.search_range(images)
    values = 4 * 9 * 24 * 20
    monkeypatch.setattr("qtool.quant.convolution._WINDOW_VALUES", 6 * values)
    assert all(map(torch.equal, layer.search_range(images), whole))
    for share in (2, 0.4, 0.01):
        monkeypatch.setattr("qtool.quant.convolution._WINDOW_VALUES", int(share * values))
        assert layer._windows(images).numel() <= max(2, 1.05 * share) * values
        scale, zero = layer.search_range(images)
        assert 0.5 < float(scale / whole[0]) < 2
        assert 0 <= int(zero) <= 15


def test_channels_cost_what_the_layer_makes_of_them(generator):
    source = convolution(kernel_size=3, groups=2)
    with torch.no_grad():
        source.weight[:4, 1] = 0  # the second channel of the first group reads nothing
    layer = SimulatedConv2d(source, LayerPlan("conv", 4, 4))
    costs = layer.channel_costs()
    assert costs[1] == 0
    expected = source.weight[4:, 0].square().sum()
    torch.testing.assert_close(costs[2], expected)


def test_gradients_reach_weights_and_bias_through_rounding(generator):
    images = torch.randn(4, 4, 8, 8, generator=generator)
    layer = calibrated(convolution(kernel_size=3), LayerPlan("conv", 3, 4), images)
    layer(images).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert layer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["resnet18", "resnet18d", "mobilenetv2_050"])
def test_folding_leaves_the_function_alone(build_model, trained_norms, architecture):
    model = trained_norms(build_model(architecture, num_classes=7))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pairs = vision.layout(model).batch_norms
    with torch.no_grad():
        expected = model(images)
        found = fold_norms(model, pairs)(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_only_the_pairs_that_are_named_are_folded(build_model):
    model = fold_norms(build_model("resnet18", num_classes=7), [("conv1", "bn1")])
    assert isinstance(model.bn1, nn.Identity)
    assert isinstance(model.layer1[0].bn1, nn.BatchNorm2d)
    assert model.conv1.bias is not None


def test_what_cannot_be_folded_says_so(build_model):
    with pytest.raises(TypeError, match="fc and bn1 are no convolution and BatchNorm"):
        fold_norms(build_model("resnet18", num_classes=7), [("fc", "bn1")])
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="keeps no statistics"):
        fold_norms(bare, [("0", "1")])
    with pytest.raises(ValueError, match="LayerNorm is no BatchNorm"):
        without_norm(nn.LayerNorm(4))


def test_a_norm_without_gain_and_shift_is_folded_too():
    norm = nn.BatchNorm2d(4, affine=False)
    norm.running_mean.copy_(torch.arange(4.0))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    images = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(fold_norms(model, [("0", "1")])(images), expected)
