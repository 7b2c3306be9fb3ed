"""MBCNN has the published parameters, names and shapes, and its blocks compute what is written."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qtool.errors import UsageError
from qtool.models.mbcnn import MBCNN, ImplicitTransform, MoireBlock, inverse_cosine_transform


@pytest.fixture(scope="module")
def on_meta():
    with torch.device("meta"):
        return MBCNN().eval()


def published_weights():
    """Every layer of the published network and the shape of its weight."""
    for name, inputs, kernel in (("1", 12, 3), ("2", 128, 3), ("3", 128, 3), ("4", 131, 1)):
        yield f"conv_func{name}.conv", (128, inputs, kernel, kernel)
    yield "conv_func5.conv", (128, 131, 1, 1)
    for index in (1, 2, 3):
        yield f"conv{index}.conv", (12, 128, 3, 3)
        for layer in range(5):
            yield f"pos_block{index}.conv_func{layer + 1}.conv", (64, 128 + 64 * layer, 3, 3)
        yield f"pos_block{index}.conv_func_last.conv", (128, 448, 1, 1)
    for index in range(1, 6):
        for layer in range(5):
            yield f"pre_block{index}.conv_relu{layer + 1}.conv", (64, 128 + 64 * layer, 3, 3)
        yield f"pre_block{index}.conv1.conv", (64, 448, 3, 3)
        yield f"pre_block{index}.conv2.conv", (128, 64, 1, 1)
        yield f"global_block{index}.conv_func1.conv", (256, 128, 3, 3)
        yield f"global_block{index}.conv_func2.conv", (256, 128, 1, 1)
        yield f"global_block{index}.conv_func3.conv", (128, 256, 1, 1)
        for name, shape in (("1", (1024, 256)), ("2", (512, 1024)), ("3", (256, 512))):
            yield f"global_block{index}.dense{name}", shape


def test_every_key_and_shape_is_the_published_one(on_meta):
    expected = {}
    for layer, shape in published_weights():
        expected[f"{layer}.weight"] = shape
        expected[f"{layer}.bias"] = shape[:1]
    for index in range(1, 6):
        block = f"pre_block{index}"
        expected[f"{block}.adaptive_implicit_trans1.it_weights.it_weights"] = (64, 1, 1, 1)
        expected[f"{block}.ScaleLayer1.kernel"] = ()
    found = {key: tuple(tensor.shape) for key, tensor in on_meta.state_dict().items()}
    assert found == expected
    assert len(found) == 192


def test_parameters_and_multiply_adds_are_the_published_ones(on_meta):
    assert sum(p.numel() for p in on_meta.parameters()) == 14_192_041
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.empty(1, 3, 256, 256, device="meta"))
    assert math.isclose(counter.get_total_flops() / 2, 67.0e9, rel_tol=5e-4)


def test_outputs_come_coarse_first(on_meta):
    shapes = [out.shape for out in on_meta(torch.empty(1, 3, 64, 96, device="meta"))]
    assert shapes == [(1, 3, 16, 24), (1, 3, 32, 48), (1, 3, 64, 96)]


def test_dilations_of_the_coarsest_level_differ(on_meta):
    def dilations(block, name):
        return [getattr(block, f"{name}{i}").conv.dilation[0] for i in range(1, 6)]

    assert dilations(on_meta.pre_block3, "conv_relu") == [1, 2, 2, 2, 1]
    assert dilations(on_meta.pos_block1, "conv_func") == [1, 2, 2, 2, 1]
    assert dilations(on_meta.pre_block4, "conv_relu") == [1, 2, 3, 2, 1]
    assert dilations(on_meta.pos_block2, "conv_func") == [1, 2, 3, 2, 1]


def test_the_transform_is_orthonormal_and_its_entries_are_the_formula():
    matrix = inverse_cosine_transform()
    assert torch.allclose(matrix @ matrix.T, torch.eye(64), atol=1e-6)
    for u, v, i, j in ((0, 0, 3, 4), (1, 0, 0, 7), (5, 2, 6, 1)):
        scale = math.sqrt((1 if u == 0 else 2) / 8) * math.sqrt((1 if v == 0 else 2) / 8)
        value = math.cos((2 * i + 1) * u * math.pi / 16) * math.cos((2 * j + 1) * v * math.pi / 16)
        assert math.isclose(matrix[u * 8 + v, i * 8 + j].item(), scale * value, abs_tol=1e-6)


@torch.no_grad()
def test_the_two_transforms():
    """A constant has one coefficient, 8 times its value; signed weights turn it back again."""
    signed, product = ImplicitTransform("signed"), ImplicitTransform("relu_product")
    coefficients = torch.zeros(1, 64, 1, 1)
    coefficients[0, 0] = 8.0
    assert torch.allclose(signed(coefficients), torch.ones(1, 64, 1, 1), atol=1e-6)
    signed.it_weights.it_weights.fill_(-1.0)
    assert signed(coefficients).abs().max() == 0
    product.it_weights.it_weights[3] = -2.0
    row = inverse_cosine_transform()[3].mul(-2.0).clamp(min=0)
    pixel = torch.rand(1, 64, 1, 1)
    assert torch.allclose(product(pixel)[0, 3], (row @ pixel.view(64)).view(1, 1), atol=1e-6)


@torch.no_grad()
def test_a_moire_block_adds_a_tenth_at_first():
    """With the last convolution's bias 1 and nothing else, the block adds 0.1 to its input."""
    block = MoireBlock((1, 2, 3, 2, 1), "relu_product")
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    nn.init.ones_(block.conv2.conv.bias)
    x = torch.rand(1, 128, 4, 4)
    assert torch.allclose(block(x), x + 0.1)


@torch.no_grad()
def test_heads_differ_by_their_sigmoids():
    torch.manual_seed(0)
    outputs = {}
    network = MBCNN(head="linear").eval()
    picture = torch.rand(1, 3, 32, 32)
    for head in ("linear", "mixed", "sigmoid"):
        network.head = head
        outputs[head] = network(picture)
    assert torch.equal(outputs["mixed"][0], outputs["linear"][0])
    assert torch.allclose(outputs["mixed"][2], outputs["linear"][2].sigmoid())
    assert torch.allclose(outputs["sigmoid"][0], outputs["linear"][0].sigmoid())
    assert not torch.equal(outputs["sigmoid"][2], outputs["mixed"][2])


@pytest.mark.parametrize("arguments", [{"head": "tanh"}, {"dct": "none"}])
def test_unknown_variants_are_refused(arguments):
    with pytest.raises(UsageError, match=r"choose|variant"):
        MBCNN(**arguments)
