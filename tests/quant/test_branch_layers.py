"""A convolution of a branch on the integer engine."""

import pytest
import torch

from qtool.quant.branch_grid import Member, UnitPlan
from qtool.quant.branch_layers import IntegerUnit
from qtool.quant.layers import Geometry

MEMBERS = (Member(3, 2, narrow=True), Member(4, 2))


def unit(members=MEMBERS):
    return IntegerUnit(UnitPlan((6, 4, 3, 3), Geometry((1, 1), (1, 1)), (2, 3), members))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back(bits):
    made = unit(members=(Member(bits, bits),))
    codes = torch.randint(0, 2**bits, (6, 36), generator=torch.Generator().manual_seed(0))
    made.set_codes(codes.to(torch.uint8))
    assert torch.equal(made.weight_codes(), codes.to(torch.uint8))


def test_the_result_is_that_of_a_float_convolution_of_levels():
    made = unit()
    codes = torch.randint(0, 4, (6, 36), generator=torch.Generator().manual_seed(0))
    made.set_codes(codes.to(torch.uint8))
    made.set_scales(4, torch.full((6,), 0.5), torch.arange(6.0), torch.tensor(0.25))
    made.set_scales(3, torch.full((3,), 2.0), torch.zeros(3), torch.tensor(0.5))
    levels = (2.0 * codes - 3).view(6, 4, 3, 3)
    x = torch.randint(0, 8, (2, 4, 5, 5)) * 0.25
    expected = torch.nn.functional.conv2d(x, levels, padding=1) * 0.5
    expected = expected + torch.arange(6.0).view(-1, 1, 1)
    assert torch.allclose(made(x, 4), expected)
    x = torch.randint(0, 8, (2, 2, 5, 5)) * 0.5
    expected = torch.nn.functional.conv2d(x, levels[:3, :2], padding=1) * 2
    assert torch.allclose(made(x, 3), expected)


def test_all_weights_of_a_unit_have_the_same_bits():
    with pytest.raises(ValueError, match="unpack"):
        unit(members=(Member(3, 3), Member(4, 4)))


def test_state_holds_codes_and_scales_alone():
    assert set(unit().state_dict()) == {
        "codes", "alpha_3", "delta_3", "step_3", "alpha_4", "delta_4", "step_4",
    }  # fmt: skip
