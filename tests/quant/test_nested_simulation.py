"""A layer that calibrates and the integer layer it becomes give the same bits at every width."""

import pytest
import torch
from torch import nn

from qtool.engine import dispatch
from qtool.quant.layers import Geometry
from qtool.quant.nested_layers import NestedConv2d, NestedLinear, windows
from qtool.quant.nested_simulation import SimulatedNested, SimulatedNestedProducts
from qtool.quant.plan import LayerPlan
from qtool.quant.widths import Offer, bits

OFFER = Offer((2, 3, 5, 8), (3, 4, 8))


def seeded(build, *args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(*args, **options)


def coded(layer, *operands, call=None):
    layer.observing = True
    (call or layer)(*operands)
    layer.observing = False
    if isinstance(layer, SimulatedNested):
        layer.code_weights(dict.fromkeys(layer.offer.weight, 1.0), first=3)
    for width in layer.offer.activation:
        layer.choose_input(width)
    layer.enabled = True
    return layer


@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_the_engine(table, bias):
    x = torch.randn(5, 9, 48, generator=torch.Generator().manual_seed(0))
    source = seeded(nn.Linear, 48, 31, bias=bias)
    plan = LayerPlan("linear", 8, 8)
    source.requires_grad_(False)
    layer = SimulatedNested(source, plan, name="one", offer=OFFER, table=table)
    layer = coded(layer.requires_grad_(False), x)
    frozen = layer.freeze()
    assert isinstance(frozen, NestedLinear)
    errors = {}
    for weight in OFFER.weight:
        for width in OFFER.activation:
            for backend in ("auto", "reference"):
                with bits(f"w{weight}a{width}"), dispatch.use_backend(backend):
                    expected = layer(3 * x)
                    assert torch.equal(frozen(3 * x), expected), (weight, width, backend)
            with bits(f"w{weight}a{width}"):
                errors[weight, width] = float((layer(x) - source(x)).square().mean())
    assert errors[8, 8] < errors[5, 8] < errors[3, 8] < errors[2, 8]
    assert errors[8, 8] < errors[8, 4] < errors[8, 3]


def test_patch_embedding_keeps_its_input_width():
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    source = seeded(nn.Conv2d, 3, 20, kernel_size=(8, 4), stride=(8, 4))
    offer = Offer((3, 4, 8), (8,))
    layer = SimulatedNested(source, LayerPlan("conv", 8, 8), name="one", offer=offer, table=False)
    frozen = coded(layer, images).freeze()
    assert isinstance(frozen, NestedConv2d)
    with bits("w4a4"):
        assert str(frozen.width()) == "w4a8"
        assert torch.equal(frozen(images), layer(images))
    assert frozen(images).shape == source(images).shape


GEOMETRIES = {
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": (1, 0), "stride": (2, 1)},
    "dilated": {"kernel_size": (3, 2), "padding": 2, "dilation": (2, 3)},
    "pointwise": {"kernel_size": 1, "stride": 2},
}


@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions_equal_the_engine(geometry, table):
    x = torch.randn(3, 6, 11, 9, generator=torch.Generator().manual_seed(0)) + 0.5
    source = seeded(nn.Conv2d, 6, 14, **GEOMETRIES[geometry]).requires_grad_(False)
    layer = SimulatedNested(source, LayerPlan("conv", 8, 8), name="one", offer=OFFER, table=table)
    layer = coded(layer.requires_grad_(False), x)
    frozen = layer.freeze()
    assert isinstance(frozen, NestedConv2d)
    for weight in OFFER.weight:
        for width in OFFER.activation:
            for backend in ("auto", "reference"):
                with bits(f"w{weight}a{width}"), dispatch.use_backend(backend):
                    assert torch.equal(frozen(x), layer(x)), (weight, width, backend)
    with bits("w8a8"):
        error = (layer(x) - source(x)).square().mean() / source(x).square().mean()
        assert frozen(x).shape == source(x).shape
    assert float(error) < 1e-3


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_windows_are_what_a_convolution_multiplies(geometry):
    x = torch.randn(2, 3, 11, 9, generator=torch.Generator().manual_seed(0))
    source = seeded(nn.Conv2d, 3, 5, bias=False, **GEOMETRIES[geometry]).requires_grad_(False)
    rows = windows(x, source.kernel_size, Geometry.of(source), torch.zeros(1))
    product = (rows @ source.weight.flatten(1).T).movedim(-1, 1)
    assert torch.allclose(product, source(x), atol=1e-6)
    codes = windows(
        torch.full((1, 1, 2, 2), 7, dtype=torch.uint8),
        (3, 3),
        Geometry(padding=(1, 1)),
        torch.tensor([9], dtype=torch.int32),
    )
    assert codes.dtype == torch.uint8
    assert codes[0, 0, 0].tolist() == [9, 9, 9, 9, 7, 7, 9, 7, 7]


@pytest.mark.parametrize("most", [1, 100, 5000])
def test_few_places_are_enough_to_choose_codes(most, monkeypatch):
    monkeypatch.setattr("qtool.quant.nested_simulation._MOST_ROWS", most)
    monkeypatch.setattr("qtool.quant.nested_simulation._WINDOW_VALUES", 60 * most)
    x = torch.randn(3, 6, 11, 9, generator=torch.Generator().manual_seed(0))
    source = seeded(nn.Conv2d, 6, 14, 3, padding=1).requires_grad_(False)
    layer = SimulatedNested(source, LayerPlan("conv", 8, 8), name="one", offer=OFFER, table=False)
    layer.seen = {"input": x}
    assert 1 <= len(layer._rows()) <= most
    assert layer._rows().shape[1] == 54


@pytest.mark.parametrize("quantizer", ["uniform", "table"])
def test_attention_products_equal_the_engine(quantizer):
    query, key, value = torch.randn(3, 2, 3, 17, 16, generator=torch.Generator().manual_seed(0))
    probability = (2 * query @ key.mT).softmax(-1)
    plan = LayerPlan("attention", 0, 8)
    layer = SimulatedNestedProducts(plan, name="one", offer=Offer((), (3, 8)), quantizer=quantizer)
    layer.observing = True
    layer.scores(query, key)
    layer.values(probability, value)
    layer.observing = False
    for width in (3, 8):
        layer.choose_input(width)
    layer.enabled = True
    expected = {}
    for width in (3, 8):
        with bits(f"w4a{width}"):
            expected[width] = layer.scores(query, key), layer.values(probability, value)
    frozen = layer.freeze()
    for width, (scores, values) in expected.items():
        with bits(f"w4a{width}"):
            assert torch.equal(frozen.scores(query, key), scores)
            torch.testing.assert_close(frozen.values(probability, value), values)


def test_large_probabilities_are_not_cut_off_at_8_bits():
    probability = torch.full((1, 1, 4, 200), 0.1 / 199)
    probability[..., 0] = 0.9
    layer = SimulatedNestedProducts(
        LayerPlan("attention", 0, 8), name="one", offer=Offer((), (8,)), quantizer="table"
    )
    value = torch.ones(1, 1, 200, 8)
    layer.observing = True
    layer.scores(value, value)
    layer.values(probability, value)
    layer.choose_input(8)
    scale, zero = layer.at(8).frozen.parameters_of("probability")
    assert int(zero) == 0
    assert float(scale) * 255 == pytest.approx(0.9)
