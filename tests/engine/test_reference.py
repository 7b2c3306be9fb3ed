"""The reference against formulas written a second way, in numpy and exact Python numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.engine import reference

HALVES = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]


def scalar(value, dtype=torch.float32):
    return torch.tensor([value], dtype=dtype)


def test_uniform_codes_round_halves_to_even():
    codes = reference.quantize_uniform(
        torch.tensor(HALVES), scalar(1.0), scalar(8, torch.int32), bits=4
    )
    assert codes.tolist() == [6, 6, 8, 8, 10, 10, 12]


def test_uniform_codes_stop_at_both_ends():
    x = torch.tensor([-math.inf, -1e30, -9.0, 7.0, 1e30, math.inf])
    codes = reference.quantize_uniform(x, scalar(1.0), scalar(8, torch.int32), bits=4)
    assert codes.tolist() == [0, 0, 0, 15, 15, 15]


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_codes_use_ieee_division(bits):
    generator = np.random.default_rng(bits)
    x = generator.standard_normal((50, 40), dtype=np.float32)
    scale = generator.random((50, 1), dtype=np.float32) * np.float32(0.1) + np.float32(1e-3)
    zero = generator.integers(0, 2**bits, (50, 1)).astype(np.int32)
    expected = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
    codes = reference.quantize_uniform(*map(torch.from_numpy, (x, scale, zero)), bits)
    assert np.array_equal(codes.numpy(), expected)
    expected = np.clip(np.rint(x / scale[0]) + zero[0], 0, 2**bits - 1)
    parameters = map(torch.from_numpy, (x, scale[0], zero[0]))
    assert np.array_equal(reference.quantize_uniform(*parameters, bits).numpy(), expected)


@given(st.floats(0, 2, width=32), st.floats(2**-10, 4, width=32), st.integers(2, 8))
def test_log2_codes_follow_the_exponent_of_the_quotient(x, scale, bits):
    ratio = np.float32(x) / np.float32(scale)
    mantissa, exponent = math.frexp(ratio)
    top = 2**bits - 1
    half = float(np.sqrt(np.float32(0.5)))
    expected = top if ratio == 0 else min(max(-exponent + (mantissa <= half), 0), top)
    code = reference.quantize_log2(torch.tensor([x]), scalar(scale), bits)
    assert code.item() == expected


def test_log2_codes_are_rounded_logarithms():
    x = torch.linspace(0.001, 1, 5000)
    exact = -torch.log2(x.double())
    clear = (exact - exact.floor() - 0.5).abs() > 1e-6
    codes = reference.quantize_log2(x, scalar(1.0), bits=4)
    assert torch.equal(codes[clear].double(), exact[clear].round().clamp(0, 15))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_log2_codes_of_zero_and_below_are_the_top_code(bits):
    x = torch.tensor([0.0, -0.0, -1.0, -1e-40])
    assert reference.quantize_log2(x, scalar(0.3), bits).tolist() == [2**bits - 1] * 4


def test_linear_takes_exact_sums():
    x = torch.full((1, 3), 255, dtype=torch.uint8)
    weight = torch.tensor([[255, 0, 254], [0, 0, 0]], dtype=torch.uint8)
    y = reference.linear(
        x,
        scalar(0.5),
        scalar(5, torch.int32),
        weight,
        torch.tensor([2.0, 0.25]),
        torch.tensor([1, 3], dtype=torch.int32),
        torch.tensor([0.0, 1.0]),
        weight_bits=8,
        in_features=3,
    )
    assert y.tolist() == [[250 * (254 - 1 + 253), 250 * -9 * 0.125 + 1]]


def test_conv2d_is_a_sum_over_windows_with_zeros_around():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (1, 4, 5, 3))
    q = generator.integers(0, 8, (6, 2, 3, 2))
    zero, weight_zero = 100, generator.integers(0, 8, 6)
    out = reference.conv2d(
        torch.from_numpy(x).to(torch.uint8),
        scalar(0.5),
        scalar(zero, torch.int32),
        reference.pack_codes(torch.from_numpy(q.reshape(6, 12)).to(torch.uint8), 3),
        torch.full((6,), 2.0),
        torch.from_numpy(weight_zero).int(),
        torch.arange(6.0),
        3,
        (3, 2),
        (2, 1),
        (1, 2),
        (1, 2),
        2,
    )
    assert out.shape == (1, 6, 3, 5)
    for n, i, j in np.ndindex(6, 3, 5):
        total = n
        for c, r, s in np.ndindex(2, 3, 2):
            row, column = 2 * i + r - 1, j + 2 * s - 2
            if 0 <= row < 5 and 0 <= column < 3:
                value = x[0, n // 3 * 2 + c, row, column] - zero
                total += value * (q[n, c, r, s] - weight_zero[n])
        assert out[0, n, i, j] == total


def test_matmul_multiplies_differences_to_the_zero_points():
    a = torch.tensor([[3, 1]], dtype=torch.uint8)
    b = torch.tensor([[10], [20]], dtype=torch.uint8)
    zero_a, zero_b = scalar(2, torch.int32), scalar(12, torch.int32)
    out = reference.matmul(a, scalar(0.5), zero_a, b, scalar(4.0), zero_b)
    assert out.tolist() == [[((3 - 2) * (10 - 12) + (1 - 2) * (20 - 12)) * 2.0]]


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 255)), min_size=1, max_size=9))
def test_matmul_log2_sums_powers_of_two(terms):
    p, v = (torch.tensor(column, dtype=torch.uint8) for column in zip(*terms, strict=True))
    zero, one = scalar(100, torch.int32), scalar(1.0)
    out = reference.matmul_log2(p.view(1, -1), one, v.view(-1, 1), one, zero, bits=4)
    exact = sum(Fraction(value - 100, 2**code) for code, value in terms if code != 15)
    assert out.item() == np.float32(float(exact))


def test_matmul_log2_takes_codes_above_126_for_zero():
    p = torch.tensor([[126, 127, 200]], dtype=torch.uint8)
    v = torch.full((3, 1), 3, dtype=torch.uint8)
    one = scalar(2.0**100)
    out = reference.matmul_log2(p, one, v, scalar(1.0), scalar(0, torch.int32), bits=8)
    assert out.item() == 3 * 2.0**-26
