"""A simulated layer and the integer layer it freezes to give the same bits."""

import pytest
import torch
from torch import nn

from qtool.engine import dispatch
from qtool.quant.layers import QuantLinear
from qtool.quant.plan import LayerPlan
from qtool.quant.simulation import (
    SimulatedLayer,
    SimulatedLinear,
    SimulatedProducts,
    dropping,
)

WIDTHS = range(2, 9)
EXACT_BACKENDS = ("auto", "reference")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def seeded(build, *args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **options)


def calibrated(layer, *operands, call=None):
    """The layer with ranges chosen on `operands`, quantizing from now on."""
    layer.observing = True
    (call or layer)(*operands)
    layer.observing = False
    layer.calibrate()
    layer.enabled = True
    return layer


def assert_frozen_equal(simulated, call):
    """`call(layer)` gives the same bits before and after freezing, on every exact backend."""
    expected = call(simulated)
    frozen = simulated.freeze()
    for backend in EXACT_BACKENDS:
        with dispatch.use_backend(backend):
            assert torch.equal(call(frozen), expected), backend
    return frozen


@pytest.mark.parametrize("weight_bits", WIDTHS)
@pytest.mark.parametrize("input_bits", [2, 3, 4, 6, 8])
def test_linear_equals_the_engine(generator, weight_bits, input_bits):
    x = torch.randn(5, 9, 48, generator=generator)
    source = seeded(nn.Linear, 48, 31, bias=weight_bits % 2 == 0)
    plan = LayerPlan("linear", weight_bits, input_bits)
    layer = calibrated(SimulatedLinear(source, plan), x)
    # Inputs beyond the calibrated range are clipped alike.
    frozen = assert_frozen_equal(layer, lambda module: module(3 * x))
    assert isinstance(frozen, QuantLinear)
    assert (frozen.bias is None) == (source.bias is None)


@pytest.mark.parametrize(
    ("bits", "probabilities"),
    [(2, "log2"), (3, "log2"), (4, "log2"), (7, "uniform"), (8, "uniform"), (4, "uniform")],
)
def test_attention_products_equal_the_engine(generator, bits, probabilities):
    query, key, value = torch.randn(3, 2, 3, 17, 16, generator=generator)
    probability = (2 * query @ key.mT).softmax(-1)
    layer = SimulatedProducts(LayerPlan("attention", 0, bits, "uniform", probabilities))
    calibrated(layer, query, key, call=layer.scores)
    calibrated(layer, probability, value, call=layer.values)
    assert_frozen_equal(layer, lambda module: module.scores(query, key))
    assert_frozen_equal(layer, lambda module: module.values(probability, value))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 7])
def test_table_quantizers_equal_the_engine(generator, bits):
    x = torch.randn(5, 9, 48, generator=generator) ** 3
    source = seeded(nn.Linear, 48, 31)
    layer = calibrated(SimulatedLinear(source, LayerPlan("linear", 4, bits, "table")), x)
    assert len(layer.input_table.unique()) <= 2**bits
    frozen = assert_frozen_equal(layer, lambda module: module(3 * x))
    assert torch.equal(frozen.input_table, layer.input_table)
    query, key, value = torch.randn(3, 2, 3, 17, 16, generator=generator)
    probability = (4 * query @ key.mT).softmax(-1)
    products = SimulatedProducts(LayerPlan("attention", 0, bits, "table", "table"))
    calibrated(products, query, key, call=products.scores)
    calibrated(products, probability, value, call=products.values)
    assert_frozen_equal(products, lambda module: module.scores(query, key))
    assert_frozen_equal(products, lambda module: module.values(probability, value))


@pytest.mark.parametrize("bits", [5, 6])
def test_deep_log2_sums_equal_the_engine_to_rounding(generator, bits):
    """Beyond four bits the least power of two is too small for an exact float32 sum."""
    query, key, value = torch.randn(3, 2, 3, 17, 16, generator=generator)
    probability = (4 * query @ key.mT).softmax(-1)
    layer = SimulatedProducts(LayerPlan("attention", 0, bits, "uniform", "log2"))
    calibrated(layer, probability, value, call=layer.values)
    expected = layer.values(probability, value)
    for backend in EXACT_BACKENDS:
        with dispatch.use_backend(backend):
            found = layer.freeze().values(probability, value)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_disabled_layer_is_the_float_layer(generator):
    x = torch.randn(4, 12, generator=generator)
    linear = seeded(nn.Linear, 12, 5)
    torch.testing.assert_close(SimulatedLinear(linear, LayerPlan("linear", 2, 2))(x), linear(x))
    products = SimulatedProducts(LayerPlan("attention", 0, 2, "uniform", "log2"))
    query, key = torch.randn(2, 2, 1, 5, 4, generator=generator)
    assert torch.equal(products.scores(query, key), query @ key.mT)
    assert torch.equal(products.values(query @ key.mT, key), query @ key.mT @ key)


def test_the_float_layer_is_left_alone(generator):
    source = seeded(nn.Linear, 12, 5)
    before = source.weight.clone()
    layer = SimulatedLinear(source, LayerPlan("linear", 2, 2))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(source.weight, before)
    assert source.bias.any()


def test_operands_are_remembered_only_while_observing(generator):
    x = torch.randn(4, 12, generator=generator, requires_grad=True)
    layer = SimulatedLinear(seeded(nn.Linear, 12, 5), LayerPlan("linear", 4, 4))
    layer(x)
    assert layer.seen == {}
    layer.observing = True
    layer(x)
    assert torch.equal(layer.seen["input"], x)
    assert not layer.seen["input"].requires_grad
    layer.calibrate()
    assert layer.seen == {}


def test_gradients_reach_weights_and_bias_through_rounding(generator):
    x = torch.randn(16, 12, generator=generator)
    layer = calibrated(SimulatedLinear(seeded(nn.Linear, 12, 5), LayerPlan("linear", 3, 4)), x)
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert layer.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7])
def test_constant_inputs_keep_their_values(value):
    """A LayerNorm channel of gain 0 hands on a constant, the same for every token."""
    x = torch.full((2, 3, 12), value)
    source = seeded(nn.Linear, 12, 5)
    layer = calibrated(SimulatedLinear(source, LayerPlan("linear", 8, 2)), x)
    assert layer.input_scale.isfinite().all()
    torch.testing.assert_close(layer(x), source(x), rtol=0.02, atol=0.02)
    assert_frozen_equal(layer, lambda module: module(x))


def test_a_layer_without_calibration_says_so():
    with pytest.raises(TypeError, match="SimulatedLayer has nothing to calibrate"):
        SimulatedLayer(LayerPlan("linear", 4, 4)).calibrate()


def test_activations_are_left_unrounded_inside_the_block_alone():
    layers = [SimulatedLinear(nn.Linear(4, 4), LayerPlan("linear", 4, 4)) for _ in range(2)]
    x = torch.zeros(64, 64)
    with dropping(layers, 0.5, seed=3, device=x.device):
        first, second = (layer.unrounded(x) for layer in layers)
        assert torch.equal(first, second)
        assert 0.4 < float(first.float().mean()) < 0.6
        with torch.no_grad():
            assert layers[0].unrounded(x) is None
    assert [layer.unrounded(x) for layer in layers] == [None, None]
    assert [layer.generator for layer in layers] == [None, None]
