"""Levels that all widths of a step share, and where their gradients go."""

import pytest
import torch
from torch import nn

from qtool.quant.branch_grid import Member, UnitPlan
from qtool.quant.branch_sharing import SharedLevels
from qtool.quant.branch_simulation import SimulatedUnit
from qtool.quant.layers import Geometry

BRANCH = (Member(2, 2), Member(5, 2, narrow=True), Member(8, 2))
ONE_SET = (Member(2, 2), Member(5, 5), Member(8, 8))


def units(members, dtype=torch.float64):
    """Two units of different shapes, as of one network."""
    torch.manual_seed(0)
    made = []
    for shape in ((8, 6, 3, 3), (4, 8, 3, 3)):
        plan = UnitPlan(shape, Geometry((1, 1), (1, 1)), (3, 4), members)
        made.append(SimulatedUnit(plan, torch.randn(shape) * 0.2, nn.BatchNorm2d(shape[0])))
        nn.init.normal_(made[-1].log_input_scale, mean=-2, std=0.1)
    return [unit.to(dtype).train() for unit in made]


def run(made):
    """Gradients of three widths, one backward pass each."""
    x = torch.rand(2, 8, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for member in made[0].plan.members:
        for unit in made:
            output = unit(x[:, : unit.plan.channels(member)[0]], member.width)
            output.square().mul(torch.arange(5).double()).sum().backward()
            outputs.append(output.detach())
    return outputs


def gradients(made):
    return [p.grad for unit in made for p in unit.parameters()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("members", [BRANCH, ONE_SET])
def test_sharing_changes_no_number(members, channels_last):
    plain, shared = units(members), units(members)
    expected = run(plain)
    levels = SharedLevels(shared, channels_last=channels_last)
    with levels.held():
        found = run(shared)
        assert shared[0].weight.grad is None
    assert all(unit.held is None for unit in shared)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(gradients(plain), gradients(shared), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_further_steps_add_up():
    made = units(BRANCH)
    levels = SharedLevels(made)
    for _ in range(2):
        with levels.held():
            run(made)
    once = units(BRANCH)
    run(once)
    torch.testing.assert_close(made[0].weight.grad, 2 * once[0].weight.grad)


def test_what_no_width_used_gets_no_gradient():
    made = units(BRANCH)
    with SharedLevels(made).held():
        made[0](torch.ones(1, 6, 4, 4, dtype=torch.float64), 8).square().sum().backward()
    assert int(made[1].weight.grad.count_nonzero()) == 0
    assert made[0].log_input_scale.grad.count_nonzero() <= 1


def test_after_an_error_units_are_as_before():
    made = units(BRANCH)
    with pytest.raises(KeyError), SharedLevels(made).held():
        made[0](torch.ones(1, 6, 4, 4), 4)
    assert made[0].held is None
    assert made[0].weight.grad is None
