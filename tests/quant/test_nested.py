"""The arithmetic of nested codes: its identities, its planes, its errors."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.engine import ops
from qtool.quant import nested

WIDTHS = range(2, 9)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def whole(generator):
    """Unsigned 8-bit codes."""
    return torch.randint(0, 256, (64, 97), generator=generator)


def digits(whole):
    return [(whole >> shift) & 3 for shift in (6, 4, 2, 0)]


def level(whole, bits):
    """Level of the leading bits, by the definition."""
    return 2 * (whole >> (8 - bits)) - (2**bits - 1)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_even_widths_are_sums_of_two_bit_branches(whole, planes):
    branches = [2 * digit - 3 for digit in digits(whole)]
    total = sum(4 ** (planes - 1 - k) * branches[k] for k in range(planes))
    assert torch.equal(total, level(whole, 2 * planes))
    assert set(branches[0].unique().tolist()) == {-3, -1, 1, 3}


@pytest.mark.parametrize("bits", WIDTHS)
def test_fewer_bits_stand_for_the_middle_of_what_they_replace(bits):
    whole = torch.arange(256)
    middle = level(whole, 8).view(2**bits, -1).double().mean(dim=1)
    expected = level(whole, bits).view(2**bits, -1)[:, 0] * 2 ** (8 - bits)
    assert torch.equal(middle, expected.double())


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_shift_of_the_signed_code_gives_the_signed_code_of_fewer_bits(whole, bits):
    signed = (whole - 128).to(torch.int8)
    shifted = signed >> (8 - bits)
    assert torch.equal(shifted.long(), (whole >> (8 - bits)) - 2 ** (bits - 1))
    assert torch.equal(2 * shifted.long() + 1, level(whole, bits))
    assert torch.equal(nested.code_levels(signed, bits=bits).long(), level(whole, bits))
    if bits < 8:
        assert torch.equal((2 * shifted + 1).long(), level(whole, bits))  # fits int8


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_product_and_sums_give_the_layer_exactly(whole, generator, bits):
    a = torch.randint(0, 256, (11, 97), generator=generator)
    zero = 37
    q = (whole - 128) >> (8 - bits)
    expected = (a - zero) @ level(whole, bits).T
    sums = 2 * (a @ q.T) - 2 * zero * q.sum(dim=1) + a.sum(dim=1, keepdim=True) - 97 * zero
    assert torch.equal(sums, expected)
    one = torch.ones(64)
    y = ops.linear_nested(
        a.to(torch.uint8),
        one[:1],
        torch.tensor([zero]).int(),
        (whole - 128).to(torch.int8),
        one,
        bits=bits,
    )
    assert torch.equal(y.long(), expected)


@given(st.integers(1, 41), st.integers(1, 7), st.integers(1, 4), st.randoms(use_true_random=False))
def test_planes_come_back(columns, rows, kept, random):
    values = [[random.randrange(-128, 128) for _ in range(columns)] for _ in range(rows)]
    codes = torch.tensor(values, dtype=torch.int8)
    planes = nested.split_planes(codes)
    assert [tuple(plane.shape) for plane in planes] == [(rows, nested.plane_bytes(columns))] * 4
    assert torch.equal(nested.join_planes(planes, columns), codes)
    prefix = nested.join_planes(planes[:kept], columns)
    assert torch.equal(prefix >> (8 - 2 * kept), codes >> (8 - 2 * kept))


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights_snap_to_the_levels_of_their_codes(generator, bits):
    weight = torch.randn(9, 40, generator=generator).requires_grad_()
    step = torch.rand(9, generator=generator) * 0.01 + 0.005
    levels = nested.nested_levels(weight, step, bits=bits)
    codes = nested.nested_codes(weight.detach(), step)
    assert torch.equal(levels, nested.code_levels(codes, bits=bits))
    levels.sum().backward()
    inside = (weight.abs() < 128 * 2 * step[:, None]).float()
    distance = step[:, None] * 2 ** (8 - bits)
    torch.testing.assert_close(weight.grad * distance, inside)


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_the_error_of_a_row_never_rises_with_the_width(generator, tails):
    weight = torch.randn(32, 256, generator=generator)
    if tails == "heavy":
        weight = weight * torch.rand(32, 256, generator=generator).clamp_min(0.05).rsqrt()
    moment = torch.rand(256, generator=generator) + 0.1
    step = nested.search_step(weight, moment, list(WIDTHS), [2.0] + [1.0] * 6)
    errors = []
    for bits in WIDTHS:
        levels = nested.nested_levels(weight, step, bits=bits)
        scale = nested.fit_scale(weight, levels, moment)
        errors.append(((levels * scale[:, None] - weight).square() * moment).sum(dim=1))
    for coarse, fine in itertools.pairwise(errors):
        assert bool((fine < coarse).all())


def test_rows_of_zeros_get_the_scale_zero():
    weight, moment = torch.zeros(2, 8), torch.ones(8)
    step = nested.search_step(weight, moment, [4, 8], [1.0, 1.0])
    assert bool((step > 0).all())
    levels = nested.nested_levels(weight, step, bits=4)
    assert nested.fit_scale(weight, levels, moment).tolist() == [0.0, 0.0]


def test_a_full_moment_with_a_diagonal_alone_is_the_diagonal(generator):
    weight = torch.randn(5, 12, generator=generator)
    moment = torch.rand(12, generator=generator) + 0.1
    levels = nested.nested_levels(weight, torch.full((5,), 0.02), bits=4)
    expected = nested.fit_scale(weight, levels, moment)
    torch.testing.assert_close(nested.fit_scale(weight, levels, moment.diag()), expected)


def test_a_range_for_low_widths_is_narrower(generator):
    weight, moment = torch.randn(16, 512, generator=generator), torch.ones(512)
    low = nested.search_step(weight, moment, [2, 8], [8.0, 1.0])
    high = nested.search_step(weight, moment, [2, 8], [1.0, 8.0])
    assert bool((low <= high).all())
    assert float(low.mean()) < 0.9 * float(high.mean())
