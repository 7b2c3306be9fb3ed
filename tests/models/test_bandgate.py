"""The network that only turns bands down."""

import torch

from qtool.models.bandgate import BandGate


def network(**options):
    torch.manual_seed(0)
    return BandGate(**{"octaves": 3, "width": 8, **options}).eval()


def opened(net, bias):
    for gate in net.gates:
        torch.nn.init.constant_(gate.bias, bias)
    return net


@torch.inference_mode()
def test_untrained_it_leaves_pictures_nearly_alone():
    x = torch.rand(2, 3, 16, 24)
    (out,) = network()(x)
    assert out.shape == x.shape
    assert float((out - x).abs().max()) < 0.15


@torch.inference_mode()
def test_bands_and_the_rest_add_up():
    net = network()
    x = torch.rand(1, 3, 32, 40, dtype=torch.float32)
    bands = net.split(x)
    assert [len(octave) for octave in bands] == [3, 3, 3]
    (shut,) = opened(net, 60.0)(x)
    opponent = torch.einsum("ij,bjhw->bihw", net.to_opponent, x - shut)
    total = torch.stack([band for octave in bands for band in octave]).sum(0)
    expected = net.split(torch.einsum("ij,bjhw->bihw", net.to_opponent, x))
    expected = torch.stack([band for octave in expected for band in octave]).sum(0)
    torch.testing.assert_close(opponent, expected, atol=1e-5, rtol=0)
    assert total.shape == x.shape


@torch.inference_mode()
def test_shut_gates_leave_a_flat_colour_and_nothing_else():
    net = opened(network(), 60.0)
    flat = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(net(flat)[0], flat, atol=1e-5, rtol=0)
    waves = flat + 0.2 * torch.sin(torch.arange(32) * 1.5)
    assert float((net(waves)[0] - flat).std()) < 0.1 * float((waves - flat).std())


@torch.inference_mode()
def test_orientations_are_told_apart():
    net = network()
    columns = torch.sin(torch.arange(32) * 2.0).expand(1, 3, 32, 32)
    across, down, mixed = net.split(columns)[0]
    assert float(across.std()) > 10 * float(down.std())
    assert float(across.std()) > 10 * float(mixed.std())


@torch.inference_mode()
def test_sizes_are_multiples_of_the_octaves():
    assert network().size_multiple == 8
    assert BandGate().size_multiple == 32
    assert network()(torch.rand(1, 3, 8, 8))[0].shape == (1, 3, 8, 8)
