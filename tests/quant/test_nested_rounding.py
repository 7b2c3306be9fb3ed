"""Rounding with compensation serves the first width best and spares the others."""

import pytest
import torch

from qtool.quant import nested
from qtool.quant.nested_rounding import round_nested


@pytest.fixture
def layer():
    """Weights, correlated inputs' second moment, steps and scales of all widths."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator) / 96**0.5
    x = torch.randn(4000, 96, generator=generator) @ (torch.eye(96) * 0.3 + mixing)
    moment = x.T @ x / len(x)
    weight = torch.randn(24, 96, generator=generator)
    diagonal = moment.diagonal()
    step = nested.search_step(weight, diagonal, [3, 4, 6, 8], [1.0] * 4)
    scales = {
        bits: nested.fit_scale(weight, nested.nested_levels(weight, step, bits=bits), diagonal)
        for bits in range(2, 9)
    }
    return weight, step, scales, moment


def output_error(codes, weight, moment, bits):
    levels = nested.code_levels(codes, bits=bits)
    scale = nested.fit_scale(weight, levels, moment)
    lost = levels * scale[:, None] - weight
    return float(((lost @ moment) * lost).sum() / ((weight @ moment) * weight).sum())


def test_the_first_width_loses_much_less_than_by_rounding_to_nearest(layer):
    weight, step, scales, moment = layer
    nearest = nested.nested_codes(weight, step)
    codes = round_nested(weight, scales, moment, first=4)
    assert codes.dtype == torch.int8
    better, plain = (output_error(c, weight, moment, 4) for c in (codes, nearest))
    assert better < 0.6 * plain


def test_wider_codes_lose_less_than_narrower_ones(layer):
    weight, _, scales, moment = layer
    codes = round_nested(weight, scales, moment, first=4)
    errors = [output_error(codes, weight, moment, bits) for bits in (3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[1]


def test_independent_inputs_leave_nothing_to_make_up_for(layer):
    weight, _, scales, _ = layer
    codes = round_nested(weight, scales, torch.eye(96), first=8)
    half = 2.0 * scales[8][:, None]
    expected = torch.floor(weight / half).clamp(-128, 127).to(torch.int8)
    assert torch.equal(codes, expected)
