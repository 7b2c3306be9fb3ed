"""Every kind of integer layer against the ONNX nodes in its place, run by ONNX Runtime."""

import warnings

import pytest
import torch
from torch import nn

from qtool.quant.bits import BitSpec
from qtool.quant.layers import OPERANDS, Geometry, IntegerProducts, QuantConv2d, QuantLinear
from qtool.quant.nested_layers import NestedConv2d, NestedLinear, NestedProducts
from qtool.quant.onnx_layers import OnnxWeight, Traced
from qtool.quant.widths import Offer

WIDTHS = range(2, 9)
FEATURES = 24


GENERATOR = torch.Generator().manual_seed(0)


def random(*size, low=0, high=2):
    return torch.randint(low, high, size, generator=GENERATOR)


def fill(layer):
    """Random codes and parameters in whatever a layer holds."""
    for name, buffer in layer.named_buffers():
        if name.endswith("table"):
            buffer.copy_(random(*buffer.shape, high=16).sort().values * 17)
        elif name.endswith("input_zero_point") or name.endswith("_zero_point"):
            bits = getattr(layer, "input_bits", None) or getattr(layer, "bits", 2)
            buffer.copy_(random(*buffer.shape, high=2**bits))
        elif buffer.is_floating_point():
            buffer.copy_(0.02 + random(*buffer.shape, high=100) / 1000)
    return layer


def linear(weight_bits, input_bits, *, table=False, kind=QuantLinear, shape=(8, FEATURES)):
    options = {"weight_bits": weight_bits, "input_bits": input_bits, "bias": True, "table": table}
    layer = fill(kind.empty(shape, **options))
    layer.set_codes(random(*layer.weight_codes().shape, high=2**weight_bits).to(torch.uint8))
    layer.weight_zero_point.copy_(random(shape[0], high=2**weight_bits))
    return layer


def convolution(shape, weight_bits, **geometry):
    layer = linear(weight_bits, 8, kind=QuantConv2d, shape=shape)
    layer.geometry = Geometry(**geometry)
    return layer


def nested(name, weight_bits, input_bits, *, kind=NestedLinear, shape=(8, FEATURES), table=False):
    offer = Offer(tuple(WIDTHS), (4, 8))
    layer = kind(
        shape, name=name, offer=offer, active=BitSpec(weight_bits, input_bits), table=table
    )
    fill(layer).codes.copy_(random(*layer.codes.shape, low=-128, high=128))
    return layer


class Zoo(nn.Module):
    """One of every kind; each is given the picture, or its pixels as vectors."""

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleDict(
            {f"w{bits}a{input_bits}": linear(bits, input_bits)
             for bits, input_bits in ((2, 8), (4, 5), (6, 2), (7, 8), (8, 3))}
            | {"table": linear(4, 4, table=True)}
            | {f"nested{bits}": nested(f"n{bits}", bits, 8) for bits in (4, 6, 7, 8)}
            | {"nested_table": nested("nt", 4, 4, table=True)}
        )  # fmt: skip
        self.convolutions = nn.ModuleDict(
            {
                "plain": convolution((6, 3, 3, 3), 4, stride=(2, 1), padding=(1, 0)),
                "wide": convolution((6, 3, 3, 3), 8, padding=(1, 1)),
                "depthwise": convolution(
                    (3, 1, 3, 3), 7, padding=(2, 2), dilation=(2, 2), groups=3
                ),
                "nested": nested("nc", 8, 8, kind=NestedConv2d, shape=(6, 3, 4, 4)),
            }
        )
        self.products = nn.ModuleDict(
            {
                kind: fill(IntegerProducts(bits=bits, probabilities=kind, quantizer=quantizer))
                for kind, bits, quantizer in (
                    ("log2", 4, "uniform"),
                    ("uniform", 8, "uniform"),
                    ("table", 4, "table"),
                )
            }
        )
        offer = Offer((), (4, 8))
        self.products["nested"] = NestedProducts(name="p", offer=offer, active=BitSpec(8, 4))
        fill(self.products["nested"].at(4))

    def forward(self, x):
        vectors = x.flatten(1).unflatten(1, (-1, FEATURES))
        total = sum(layer(vectors).mean() for layer in self.linears.values())
        total = total + sum(layer(x).mean() for layer in self.convolutions.values())
        heads = vectors.unsqueeze(1)
        for products in self.products.values():
            scores = products.scores(heads, heads * 0.5)
            total = total + products.values(scores.softmax(dim=-1), heads).mean()
        return total + x.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def zoo():
    return Zoo()


@pytest.fixture(scope="module")
def recorded(zoo):
    """What each layer received and returned in ONNX Runtime, by name."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    from qtool.io import onnx

    traced = Traced(zoo)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            traced,
            (images[:2],),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            opset_version=onnx.OPSET,
            verbose=False,
        )
    onnx.pack_weights(program.model)
    _, *values = map(torch.from_numpy, onnx.run(onnx.to_bytes(program.model), images.numpy()))
    found, rest = {}, iter(values)
    for name in traced.taps.names:
        count = 3 if name.startswith("products") else 2
        found[name] = [next(rest) for _ in range(count)]
    assert next(rest, None) is None
    return found


def names():
    zoo = Zoo()
    layers = [f"linears.{name}" for name in zoo.linears]
    layers += [f"convolutions.{name}" for name in zoo.convolutions]
    return layers + [f"products.{name}.{part}" for name in zoo.products for part in PARTS]


PARTS = ("scores", "values")


@pytest.mark.parametrize("name", names())
def test_a_layer_computes_what_the_engine_does(zoo, recorded, name):
    *inputs, output = recorded[name]
    owner, _, part = name.rpartition(".")
    layer = getattr(zoo.get_submodule(owner), part) if part in PARTS else zoo.get_submodule(name)
    torch.testing.assert_close(output, layer(*inputs), rtol=1e-4, atol=1e-4)
    assert len(inputs[0]) == 3


@pytest.mark.parametrize("largest", [63, 64, 65, 127])
def test_only_weights_whose_products_fit_in_pairs_are_signed(largest):
    levels = torch.tensor([[-largest, largest], [1, 0]])
    zero = torch.full((2,), 128)
    weight = OnnxWeight(levels, torch.ones(2), zero, axis=1)
    signed = weight.codes.dtype == torch.int8
    assert signed == (2 * 255 * largest < 2**15)
    assert weight.codes.shape == (2, 2)
    restored = weight.codes.int() - weight.zero_point.int()
    assert torch.equal(restored, levels.T.int())


def test_the_model_itself_is_left_alone(zoo):
    before = {name: type(module) for name, module in zoo.named_modules()}
    Traced(zoo)
    assert {name: type(module) for name, module in zoo.named_modules()} == before
    assert all(hasattr(zoo.products["uniform"], f"{name}_scale") for name in OPERANDS)
