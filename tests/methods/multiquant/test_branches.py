"""A body in several branches: selection, merging, switching, and the same bits as integers."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from qtool.errors import UsageError
from qtool.methods.multiquant.branches import (
    BODY,
    branched,
    freeze,
    members_of,
    observe,
)
from qtool.methods.multiquant.selection import select
from qtool.models import vision
from qtool.models.residual import residual_layout
from qtool.quant.branch_simulation import SimulatedUnit
from qtool.quant.switchable import make_switchable
from qtool.quant.widths import bits as at_bits

SIZE = (3, 16, 16)
ALL = tuple(range(2, 9))


@pytest.fixture
def images():
    return torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(0))


def made(model, images=None, **options):
    layout = residual_layout(model, input_size=SIZE)
    network, _ = branched(model, layout, **{"widths": ALL, **options})
    if images is not None:
        observe(network, images)
    return network.eval()


def units(network, name):
    return [body.unit(name) for body in network.bodies]


def test_members_are_the_widths_that_select_a_branch():
    selection = select(ALL)
    found = [[(m.width, m.narrow) for m in members_of(k, selection)] for k in range(4)]
    assert found[0] == [(2, False), (3, False), (7, False), (8, False)]
    assert found[1] == [
        (3, True), (4, False), (5, False), (6, False), (7, False), (8, False),
    ]  # fmt: skip
    assert found[3] == [(5, True), (6, False), (7, True), (8, False)]


@torch.no_grad()
def test_the_head_reads_the_mean_of_the_branches(tiny_resnet, images):
    network = made(tiny_resnet, images)
    features = network.stem(images)
    for width, branches in ((2, [0]), (5, [1, 2, 3]), (8, [0, 1, 2, 3])):
        outputs = [network.body(branch)(features, width) for branch in branches]
        assert {output.shape for output in outputs} == {outputs[0].shape}
        mean = torch.stack(outputs).mean(dim=0)
        assert torch.allclose(network.head(mean), network.at(images, width), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("one_set", [False, True])
def test_integers_give_the_same_bits_at_every_width(tiny_resnet, images, one_set):
    network = made(tiny_resnet, images, one_set=one_set)
    frozen = freeze(network)
    outputs = [frozen.at(images, width) for width in ALL]
    for width, output in zip(ALL, outputs, strict=True):
        assert torch.equal(output, network.at(images, width))
    assert all(not torch.equal(a, b) for a, b in pairwise(outputs))
    assert len(frozen.bodies) == (len(ALL) if one_set else 4)


@torch.no_grad()
def test_integers_give_the_same_bits_with_shortcuts_of_weights(build_model, trained_norms, images):
    model = build_model("resnet18", num_classes=3, channels=(8, 8, 16, 16), layers=(1, 1, 1, 1))
    network = made(trained_norms(model), images, widths=(2, 3, 4))
    frozen = freeze(network)
    assert len(network.bodies) == 2
    for width in (2, 3, 4):
        assert torch.equal(frozen.at(images, width), network.at(images, width))


def test_weights_really_are_of_two_bits_and_the_same_at_every_width(tiny_resnet, images):
    frozen = freeze(made(tiny_resnet, images))
    for body in frozen.bodies:
        for unit in body.units.values():
            assert unit.weight_bits == 2
            assert set(unit.weight_codes().unique().tolist()) <= {0, 1, 2, 3}
            assert sum(name == "codes" for name, _ in unit.named_buffers()) == 1


def test_branches_start_apart_and_only_by_a_little(tiny_resnet):
    network = made(tiny_resnet)
    weight = tiny_resnet.get_parameter("layer2.0.conv1.weight")
    weights = [unit.weight for unit in units(network, "layer2.0.conv1")]
    for index, one in enumerate(weights):
        assert all(not torch.equal(one, other) for other in weights[:index])
        assert float((one - weight).detach().std()) < 0.2 * float(weight.detach().std())
    again = made(tiny_resnet, seed=0)
    assert torch.equal(units(again, "layer2.0.conv1")[2].weight, weights[2])
    other = made(tiny_resnet, seed=1)
    assert not torch.equal(units(other, "layer2.0.conv1")[2].weight, weights[2])


def test_bounds_belong_to_the_branch_and_activations_to_branch_and_width(tiny_resnet):
    network = made(tiny_resnet)
    for branch, unit in enumerate(units(network, "layer1.0.conv1")):
        members = members_of(branch, select(ALL))
        assert unit.log_weight_scale.shape == (1, 8)
        assert unit.log_input_scale.shape == (len(members),)
        assert set(unit.norms) == {str(member.width) for member in members}


def test_one_set_has_one_body_with_a_scale_per_width(tiny_resnet):
    network = made(tiny_resnet, one_set=True)
    assert len(network.bodies) == 1
    unit = units(network, "layer1.0.conv1")[0]
    assert unit.log_weight_scale.shape == (7, 8)
    assert torch.equal(unit.weight, tiny_resnet.get_parameter("layer1.0.conv1.weight"))


def test_eight_bit_activations_with_wide_weights_are_near_the_float_model(tiny_resnet, images):
    network = made(tiny_resnet, images, one_set=True, widths=(8,)).train()
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(
            network.at(images, 8).flatten(), tiny_resnet.train()(images).flatten(), dim=0
        )
    assert cosine > 0.99


@torch.no_grad()
def test_the_whole_network_is_switched_at_once(tiny_resnet, images):
    frozen = make_switchable(freeze(made(tiny_resnet, images)))
    assert frozen.active_bits == "w8a8"
    frozen.set_bits(3)
    assert frozen.active_bits == "w3a3"
    low = frozen(images)
    assert torch.equal(low, frozen.at(images, 3))
    with at_bits("w5a5"):
        assert torch.equal(frozen(images), frozen.at(images, 5))
    assert torch.equal(frozen(images, bits=8), frozen.at(images, 8))
    assert torch.equal(frozen(images), low)
    with pytest.raises(UsageError, match="cannot run at w4a6"):
        frozen.set_bits("w4a6")
    with pytest.raises(UsageError, match="no layer matches"):
        frozen.set_bits({"layer1.*": 4})
    frozen.set_bits({BODY: 2})
    assert frozen.active_bits == "w2a2"


def test_observing_keeps_the_mode_and_the_momenta(tiny_resnet, images):
    network = made(tiny_resnet).eval()
    observe(network, images)
    assert not network.training
    norms = [m for body in network.bodies for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    assert not any(u.observing for u in network.modules() if isinstance(u, SimulatedUnit))


def test_what_is_frozen_cannot_be_frozen_again(tiny_resnet, images):
    with pytest.raises(TypeError, match="frozen before"):
        freeze(freeze(made(tiny_resnet, images)))


def test_slices_of_a_real_network_run(images):
    model = vision.build("resnet20", {})
    layout = residual_layout(model, input_size=SIZE)
    network, narrow = branched(model, layout, widths=(3,))
    assert narrow.share == pytest.approx(0.5, abs=0.01)
    assert network.at(images, 3).shape == (4, 10)
