"""Integer layers against arithmetic written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qtool.engine import ops
from qtool.quant.layers import Geometry, IntegerProducts, QuantConv2d, QuantLinear

WIDTHS = range(2, 9)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def filled(kind, shape, generator, *, weight_bits=4, input_bits=8, bias=True):
    """A layer with random codes and parameters, and its codes."""
    layer = kind.empty(shape, weight_bits=weight_bits, input_bits=input_bits, bias=bias)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    codes = torch.randint(0, 2**weight_bits, (rows, columns), generator=generator)
    layer.set_codes(codes.to(torch.uint8))
    layer.weight_scale.copy_(torch.rand(rows, generator=generator) + 0.1)
    layer.weight_zero_point.copy_(torch.randint(0, 2**weight_bits, (rows,), generator=generator))
    layer.input_scale.fill_(0.03)
    layer.input_zero_point.fill_(2 ** (input_bits - 1))
    if bias:
        layer.bias.copy_(torch.randn(rows, generator=generator))
    return layer, codes


def restored(x, scale, zero, bits):
    """Values in float64 after quantization to evenly spaced codes."""
    codes = (torch.round(x / scale) + zero).clamp(0, 2**bits - 1)
    return (codes.double() - zero) * scale.double()


@pytest.mark.parametrize("weight_bits", WIDTHS)
@pytest.mark.parametrize("input_bits", [2, 5, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_its_formula(generator, weight_bits, input_bits, bias):
    layer, codes = filled(
        QuantLinear, (7, 37), generator, weight_bits=weight_bits, input_bits=input_bits, bias=bias
    )
    assert torch.equal(layer.weight_codes().long(), codes)
    weight = (codes - layer.weight_zero_point[:, None]) * layer.weight_scale.double()[:, None]
    torch.testing.assert_close(layer.dequantized_weight().double(), weight, rtol=1e-6, atol=0)
    x = torch.randn(2, 3, 37, generator=generator)
    inputs = restored(x, layer.input_scale, layer.input_zero_point, input_bits)
    expected = inputs @ weight.T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_bits", [2, 5, 8])
def test_convolution_is_its_formula(generator, weight_bits):
    layer, _ = filled(QuantConv2d, (6, 2, 3, 2), generator, weight_bits=weight_bits)
    geometry = Geometry(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    layer.geometry = geometry
    images = torch.randn(2, 4, 6, 8, generator=generator)
    weight = layer.dequantized_weight().double().view(6, 2, 3, 2)
    inputs = restored(images, layer.input_scale, layer.input_zero_point, 8)
    expected = F.conv2d(inputs, weight, layer.bias.double(), **geometry._asdict())
    torch.testing.assert_close(layer(images).double(), expected, rtol=1e-5, atol=1e-5)


def test_geometry_is_read_off_a_convolution():
    source = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=2, groups=2)
    assert Geometry.of(source) == Geometry((2, 1), (1, 0), (2, 2), 2)
    assert Geometry.of(nn.Conv2d(4, 6, 3, padding="valid")) == Geometry()


def test_state_has_the_names_and_types_of_a_checkpoint(generator):
    layer, _ = filled(QuantConv2d, (5, 3, 2, 4), generator, weight_bits=3)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
    assert found == {
        "weight_packed": (torch.uint8, (5, ops.packed_width(3, 24))),
        "weight_scale": (torch.float32, (5,)),
        "weight_zero_point": (torch.int32, (5,)),
        "weight_shape": (torch.int64, (4,)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int32, (1,)),
        "bias": (torch.float32, (5,)),
    }
    assert layer.weight_shape.tolist() == [5, 3, 2, 4]
    assert not list(layer.parameters())
    bare = QuantLinear.empty((5, 8), weight_bits=3, input_bits=8, bias=False)
    assert "bias" not in bare.state_dict()


def test_new_codes_replace_the_unpacked_copy(generator):
    layer, _ = filled(QuantLinear, (4, 16), generator)
    other, _ = filled(QuantLinear, (4, 16), generator)
    x = torch.randn(3, 16, generator=generator)
    before, wanted = layer(x), other(x)
    assert not torch.equal(before, wanted)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), wanted)
    layer.set_codes(torch.zeros(4, 16, dtype=torch.uint8))
    assert not layer.weight_codes().any()
    assert not torch.equal(layer(x), wanted)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("probabilities", ["log2", "uniform"])
def test_products_are_their_formulas(generator, bits, probabilities):
    products = IntegerProducts(bits=bits, probabilities=probabilities)
    for name in ("query", "key", "value"):
        getattr(products, f"{name}_scale").fill_(6.0 / 2**bits)
        getattr(products, f"{name}_zero_point").fill_(2 ** (bits - 1))
    products.probability_scale.fill_(0.9 if probabilities == "log2" else 1.0 / (2**bits - 1))
    query, value = (torch.randn(2, 3, 9, 5, generator=generator) for _ in range(2))
    key = torch.randn(2, 3, 7, 5, generator=generator)

    def operand(name, x):
        return restored(x, *products.parameters_of(name), bits)

    expected = operand("query", query) @ operand("key", key).mT
    torch.testing.assert_close(products.scores(query, key).double(), expected, rtol=1e-5, atol=1e-5)
    probability = torch.randn(2, 3, 7, 9, generator=generator).softmax(-1)
    if probabilities == "log2":
        codes = torch.round(-torch.log2(probability.double() / 0.9)).clamp(0)
        top = 2**bits - 1
        weights = 0.9 * torch.exp2(-codes).masked_fill(codes >= top, 0)
    else:
        weights = operand("probability", probability)
    torch.testing.assert_close(
        products.values(probability, value).double(),
        weights @ operand("value", value),
        rtol=1e-5,
        atol=1e-5,
    )


def test_log2_products_have_no_zero_point_for_probabilities():
    names = set(IntegerProducts(bits=4, probabilities="log2").state_dict())
    assert "probability_scale" in names
    assert "probability_zero_point" not in names
    assert "probability_zero_point" in IntegerProducts(bits=8, probabilities="uniform").state_dict()


def test_layers_print_their_bits(generator):
    layer, _ = filled(QuantLinear, (4, 16), generator, weight_bits=3, input_bits=6)
    assert "(4, 16), w3a6" in repr(layer)
    assert "a5, probabilities=log2" in repr(IntegerProducts(bits=5, probabilities="log2"))
