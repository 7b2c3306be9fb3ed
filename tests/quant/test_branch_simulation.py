"""A convolution of a branch in training, and frozen."""

import pytest
import torch
from torch import nn

from qtool.quant.branch_grid import Member, UnitPlan
from qtool.quant.branch_simulation import SimulatedUnit
from qtool.quant.layers import Geometry

NARROW = (3, 5)


def unit(members, *, stride=1):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    plan = UnitPlan((8, 6, 3, 3), Geometry((stride, stride), (1, 1)), NARROW, members)
    return SimulatedUnit(plan, torch.randn(8, 6, 3, 3) * 0.2, norm)


def images(channels=6):
    return torch.rand(2, channels, 7, 7, generator=torch.Generator().manual_seed(1)) * 3


BRANCH = (Member(2, 2), Member(5, 2, narrow=True), Member(8, 2))
ONE_SET = (Member(2, 2), Member(4, 4), Member(8, 8))


@torch.no_grad()
def observed(made, x):
    made.observing = True
    for member in made.plan.members:
        made(x[:, : made.plan.channels(member)[0]], member.width)
    made.observing = False
    return made


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("members", [BRANCH, ONE_SET])
def test_frozen_units_give_the_same_bits(members, stride):
    made = observed(unit(members, stride=stride), images()).eval()
    for member in members:
        x = images(made.plan.channels(member)[0])
        frozen = made.freeze(member.weight_bits)
        with torch.no_grad():
            expected = made(x, member.width)
            assert torch.equal(frozen(x, member.width), expected)
        assert expected.shape[1] == made.plan.channels(member)[1]


def test_every_width_has_a_norm_of_its_own():
    made = unit(BRANCH).train()
    before = {width: made.norm(width).running_mean.clone() for width in (2, 5, 8)}
    made(images(), 8)
    assert torch.equal(made.norm(2).running_mean, before[2])
    assert torch.equal(made.norm(5).running_mean, before[5])
    assert not torch.equal(made.norm(8).running_mean, before[8])
    assert made.norm(5).num_features == NARROW[1]
    assert torch.equal(made.norm(5).weight, made.norm(2).weight[: NARROW[1]])


def test_a_branch_has_one_scale_of_weights_and_one_set_of_codes():
    made = unit(BRANCH)
    assert made.log_weight_scale.shape == (1, 8)
    assert made.log_input_scale.shape == (3,)
    assert unit(ONE_SET).log_weight_scale.shape == (3, 8)


def test_observing_sets_the_scale_of_one_width():
    made = unit(BRANCH)
    made.observing = True
    made(images(), 8)
    assert made.log_input_scale[0] == made.log_input_scale[1] == 0
    found = float(made.input_scale(8).detach())
    assert found == pytest.approx(float(images().max()) / 255, rel=0.1)


def test_gradients_reach_weights_and_scales():
    made = observed(unit(BRANCH), images()).train()
    made(images(), 8).square().sum().backward()
    assert made.weight.grad.abs().sum() > 0
    assert made.log_input_scale.grad[2] != 0
    assert made.log_input_scale.grad[0] == 0
    assert made.norm(2).weight.grad is None


def test_a_width_that_the_branch_does_not_serve_is_an_error():
    with pytest.raises(KeyError):
        unit(BRANCH)(images(), 4)
