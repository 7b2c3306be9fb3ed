"""ESDNet has the published parameters, names and shapes, and its blocks compute what is written."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qtool.models import demoire
from qtool.models.esdnet import CrossScaleFusion, DenseBlock, ESDNet, ScaleAwareModule

PUBLISHED = {"esdnet": (5_934_156, 318, 17.55e9), "esdnet_l": (10_623_444, 570, 28.80e9)}


def on_meta(name):
    with torch.device("meta"):
        return demoire.build(name).eval()


def multiply_adds(network, side):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() / 2


def dense_block_keys(prefix, channels, growth, layers):
    for index in range(layers):
        yield f"{prefix}.conv_layers.{index}.conv.0", (growth, channels + growth * index, 3, 3)
    yield f"{prefix}.conv_post.conv", (channels, channels + growth * layers, 1, 1)


def stage_keys(prefix, channels, sam_blocks):
    yield from dense_block_keys(f"{prefix}.rdb", channels, 32, 3)
    for index in range(sam_blocks):
        block = f"{prefix}.sam_blocks.{index}"
        for scale in ("", "_2", "_4"):
            yield from dense_block_keys(f"{block}.basic_block{scale}", channels, 32, 5)
        squeezed = 3 * channels // 4
        yield f"{block}.fusion.compress1", (squeezed, 3 * channels, 1, 1)
        yield f"{block}.fusion.compress2", (squeezed, squeezed, 1, 1)
        yield f"{block}.fusion.excitation", (3 * channels, squeezed, 1, 1)


def published_weights(sam_blocks):
    """Every layer of the published networks and the shape of its weight."""
    yield "encoder.conv_first.0", (48, 12, 5, 5)
    for level, channels in ((1, 48), (2, 96), (3, 192)):
        yield from stage_keys(f"encoder.encoder_{level}", channels, sam_blocks)
        if level < 3:
            yield f"encoder.encoder_{level}.down.0", (2 * channels, channels, 3, 3)
    for level, channels in ((3, 192), (2, 160), (1, 112)):
        yield f"decoder.preconv_{level}.conv.0", (64, channels, 3, 3)
        yield from stage_keys(f"decoder.decoder_{level}", 64, sam_blocks)
        yield f"decoder.decoder_{level}.conv.conv", (12, 64, 3, 3)


@pytest.mark.parametrize(("name", "sam_blocks"), [("esdnet", 1), ("esdnet_l", 2)])
def test_every_key_and_shape_is_the_published_one(name, sam_blocks):
    expected = {}
    for layer, shape in published_weights(sam_blocks):
        expected[f"{layer}.weight"] = shape
        expected[f"{layer}.bias"] = shape[:1]
    state = on_meta(name).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_tensors_and_multiply_adds_are_the_published_ones(name):
    parameters, tensors, operations = PUBLISHED[name]
    network = on_meta(name)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors
    assert math.isclose(multiply_adds(network, 256), operations, rel_tol=5e-4)


@pytest.mark.parametrize("spec", [s for s in demoire.NETWORKS if "esdnet" in s.name])
def test_outputs_are_full_half_and_quarter(spec):
    full, half, quarter = on_meta(spec.name)(torch.empty(1, 3, 64, 128, device="meta"))
    assert full.shape == (1, 3, 64, 128)
    assert half.shape == (1, 3, 32, 64)
    assert quarter.shape == (1, 3, 16, 32)


def test_the_small_network_costs_a_fifteenth():
    small, large = (multiply_adds(on_meta(name), 256) for name in ("esdnet_s", "esdnet"))
    assert small * 15 < large


def test_an_untrained_residual_network_is_the_identity():
    torch.manual_seed(0)
    network = ESDNet(encoder_width=4, decoder_width=4, growth=4, unshuffle=4, residual=True).eval()
    picture = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        full, half, quarter = network(picture)
    assert torch.equal(full, picture)
    assert torch.allclose(half, nn.functional.avg_pool2d(picture, 2), atol=1e-6)
    assert quarter.shape == (2, 3, 16, 16)


def test_a_residual_network_learns_from_its_first_step():
    torch.manual_seed(0)
    network = ESDNet(encoder_width=4, decoder_width=4, growth=4, unshuffle=4, residual=True)
    full, half, quarter = network(torch.rand(1, 3, 64, 64))
    (full.mean() + half.mean() + quarter.mean()).backward()
    for level in (1, 2, 3):
        head = getattr(network.decoder, f"decoder_{level}").conv.conv
        assert head.weight.grad.abs().sum() > 0


def fill(module, values):
    """Give every convolution a constant weight, without bias."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, values.get(name, 0.0))
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def test_a_dense_block_by_hand():
    """One channel, growth one, input 1 everywhere, read off where no border reaches.

    Layer 0: 9 x 1 x 0.1 = 0.9. Layer 1 sees [0.9, 1]: 9 x 0.1 x 1.9 = 1.71. Its dilation is 2.
    Layer 2 sees [1.71, 0.9, 1]: 9 x 0.1 x 3.61 = 3.249. The last has weights 1, 2, 3, 4 on
    [3.249, 1.71, 0.9, 1]: 3.249 + 3.42 + 2.7 + 4 = 13.369; the input makes it 14.369.
    """
    block = DenseBlock(1, 1, (1, 2, 1), residual=True)
    fill(block, {f"conv_layers.{i}.conv.0": 0.1 for i in range(3)})
    block.conv_post.conv.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1))
    out = block(torch.ones(1, 1, 13, 13))
    assert math.isclose(out[0, 0, 6, 6].item(), 14.369, rel_tol=1e-6)
    block.residual = False
    assert math.isclose(block(torch.ones(1, 1, 13, 13))[0, 0, 6, 6].item(), 13.369, rel_tol=1e-6)


@torch.no_grad()
def test_fusion_by_hand():
    """Four channels a map, so three hidden ones; the means are 1, 2 and 3.

    Compress1: 4 x (1 + 2 + 3) / 24 = 1; compress2 and excitation: 3 x 1 / 3 = 1 each. The first
    map is weighted by sigmoid(1), the others, whose excitation is 0, by one half.
    """
    fusion = CrossScaleFusion(4)
    nn.init.constant_(fusion.compress1.weight, 1 / 24)
    nn.init.constant_(fusion.compress2.weight, 1 / 3)
    nn.init.constant_(fusion.excitation.weight, 0.0)
    for layer in (fusion.compress1, fusion.compress2):
        nn.init.zeros_(layer.bias)
    fusion.excitation.weight[:4] = 1 / 3
    nn.init.zeros_(fusion.excitation.bias)
    maps = [torch.full((1, 4, 2, 2), value) for value in (1.0, 2.0, 3.0)]
    first = 1 / (1 + math.exp(-1.0))
    assert torch.allclose(fusion(*maps), torch.full((1, 4, 2, 2), first + 0.5 * 2 + 0.5 * 3))


@torch.no_grad()
def test_a_scale_aware_module_by_hand():
    """Blocks that pass their input on, and weights of one half: x + 3 x / 2 on a flat picture."""
    module = ScaleAwareModule(4, 4)
    fill(module, {})
    for block in (module.basic_block, module.basic_block_2, module.basic_block_4):
        block.conv_post.conv.weight[:, -4:, 0, 0] = torch.eye(4)
    flat = torch.full((1, 4, 8, 8), 0.2)
    assert torch.allclose(module(flat), torch.full((1, 4, 8, 8), 0.5))
