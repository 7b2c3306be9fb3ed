"""Grids of weights and activations: levels, gradients, codes, the engine's words for them."""

import pytest
import torch

from qtool.quant import branch_grid as grid
from qtool.quant.branch_grid import Member, UnitPlan
from qtool.quant.layers import Geometry


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_bit_weights_have_the_four_odd_levels():
    weight = torch.tensor([[-9.0, -2.1, -1.9, -0.1, 0.1, 1.9, 2.1, 9.0]])
    levels = grid.weight_levels(weight, torch.ones(1), bits=2)
    assert levels.tolist() == [[-3, -3, -1, -1, 1, 1, 3, 3]]
    many = grid.weight_levels(normal(8, 400), torch.full((8,), 0.5), bits=2)
    assert set(many.unique().tolist()) == {-3.0, -1.0, 1.0, 3.0}


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_lie_in_their_range_and_mean_the_levels(bits):
    weight = normal(5, 3, 2, 2)
    scale = grid.initial_weight_scale(weight, bits=bits)
    levels = grid.weight_levels(weight, scale, bits=bits).flatten(1)
    codes = grid.weight_codes(weight, scale, bits=bits)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    engine = grid.engine_weight(codes, bits=bits)
    assert engine.codes.dtype == torch.int8
    assert engine.bits <= 8
    stood_for = engine.codes.int() + 2 ** (engine.bits - 1) - engine.zero
    assert torch.equal(stood_for.float(), levels)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_pass_inside_and_teach_the_scale(bits):
    weight = torch.tensor([[0.3, -0.4, 50.0]], requires_grad=True)
    scale = torch.tensor([0.1], requires_grad=True)
    levels = grid.weight_levels(weight, scale, bits=bits)
    (levels * scale).sum().backward()
    top = 3 if bits == 2 else 2 ** (bits - 1) - 1
    inside = weight.detach().abs() / 0.1 <= top + 1e-4
    assert torch.allclose(weight.grad, inside.float())
    # What rounding did to each weight inside, and the outermost level beyond, as LSQ has it.
    expected = (levels - (weight / 0.1) * inside).sum()
    assert float(scale.grad) == pytest.approx(float(expected.detach()), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_activations_count_from_zero(bits):
    x = torch.tensor([-1.0, 0.0, 0.24, 0.26, 1e3])
    levels = grid.activation_levels(x, torch.tensor(0.5), bits=bits)
    assert levels.tolist() == [0, 0, 0, 1, 2**bits - 1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_activations_pass_between_the_ends(bits):
    top = 2**bits - 1
    x = torch.tensor([-0.5, 0.26, 0.6, 1e3], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    (grid.activation_levels(x, step, bits=bits) * weights).sum().backward()
    ratio = (x / step).clamp(0, top)
    expected = torch.autograd.grad((ratio * weights).sum(), (x, step))
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(step.grad, expected[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_searched_scale_is_near_the_best(bits):
    x = normal(4000).relu()
    found = grid.search_activation_scale(x, bits=bits)

    def error(scale):
        return float((grid.activation_levels(x, scale, bits=bits) * scale - x).square().mean())

    others = found * torch.tensor([0.5, 0.8, 1.25, 2.0])
    assert all(error(found) < error(other) for other in others)
    assert grid.search_activation_scale(torch.zeros(5), bits=bits) > 0


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_first_weight_scale_is_near_the_best_for_normal_weights(bits):
    weight = normal(1, 20_000)
    scale = grid.initial_weight_scale(weight, bits=bits)

    def error(scale):
        levels = grid.weight_levels(weight, scale, bits=bits)
        return float((levels * scale - weight).square().mean())

    assert error(scale) < min(error(scale * 0.8), error(scale * 1.25))


def test_dither_moves_every_weight_by_an_eighth_of_a_step():
    weight, scale = normal(3, 2, 3, 3), torch.tensor([0.1, 0.2, 0.3])
    generator = torch.Generator().manual_seed(1)
    moved = grid.dithered(weight, scale, generator=generator) - weight
    steps = (moved.abs() / (2 * scale.view(-1, 1, 1, 1))).flatten()
    assert torch.allclose(steps, torch.full_like(steps, 1 / 8), rtol=1e-4)
    assert 0 < int((moved > 0).sum()) < moved.numel()
    again = grid.dithered(weight, scale, generator=generator) - weight
    assert not torch.equal(again, moved)


def test_a_plan_knows_its_widths():
    members = (Member(2, 2), Member(3, 2, narrow=True))
    plan = UnitPlan((8, 6, 3, 3), Geometry(), (4, 5), members)
    assert plan.channels(members[0]) == (6, 8)
    assert plan.channels(members[1]) == (4, 5)
    assert plan.index(3) == 1
    assert plan.weight_bits == [2]
    with pytest.raises(KeyError):
        plan.index(4)
