"""Shapes, names and sizes of the moire synthesis networks."""

import pytest
import torch

from qtool.methods.undem.generator import FeatureEncoder, MoireDiscriminator, MoireGenerator


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_published_sizes():
    assert size(FeatureEncoder()) == 11_648
    assert size(MoireGenerator()) == 2_416_259
    assert size(MoireDiscriminator()) == 2_764_737


def test_published_names():
    encoder = FeatureEncoder().state_dict()
    assert encoder["conv1_b.1.weight"].shape == (16, 3, 7, 7)
    for block in ("conv3_b", "conv4_b"):
        for place in (1, 5):
            assert encoder[f"{block}.0.conv_block.{place}.weight"].shape == (16, 16, 3, 3)
    judge = MoireDiscriminator().state_dict()
    assert {name.rpartition(".")[0] for name in judge} == {f"model.{i}" for i in (0, 2, 5, 8, 11)}


def test_a_picture_of_192_is_judged_on_a_map_of_22():
    judge = MoireDiscriminator()
    x = torch.rand(1, 3, 192, 192)
    assert judge.map(x).shape == (1, 1, 22, 22)
    torch.testing.assert_close(judge(x), judge.map(x).mean((1, 2, 3)))


@torch.no_grad()
@pytest.mark.parametrize(("variant", "white"), [("own", 1.0), ("published", 0.7615942)])
def test_bands_are_painted_at_full_size(variant, white):
    generator = MoireGenerator(width=8, variant=variant)
    features = FeatureEncoder()(torch.rand(2, 3, 24, 32))
    clean = torch.ones(2, 3, 24, 32)
    assert not torch.equal(generator(features, clean * 0.5), clean * 0.5)
    # With nothing to paint, white stays white but in the published form: tanh(1).
    for parameter in generator.conv15_b.parameters():
        parameter.zero_()
    torch.testing.assert_close(generator(features, clean), clean * white)


@torch.no_grad()
def test_weights_start_narrow_and_without_running_statistics():
    generator = MoireGenerator(width=32)
    assert abs(float(generator.conv1_b[1].weight.std()) - 0.02) < 1e-3
    assert not list(generator.buffers())
