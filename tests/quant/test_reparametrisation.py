from __future__ import annotations

import pytest
import torch
from torch import nn

from qtool.quant import quantizers, reparametrisation
from qtool.quant.reparametrisation import channel_ranges, fold_into_norm

WIDTH, OUT = 24, 16


def uneven(seed=0, *, dead=()):
    """A LayerNorm whose channels differ in range by a factor of a hundred, and its layer."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        norm.weight.copy_(10 ** torch.empty(WIDTH).uniform_(-1, 1, generator=generator))
        norm.bias.copy_(torch.randn(WIDTH, generator=generator))
        norm.weight[list(dead)] = 0.0
    linear = nn.Linear(WIDTH, OUT)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(OUT, WIDTH, generator=generator) / norm.weight.clamp_min(1))
        linear.bias.copy_(torch.randn(OUT, generator=generator))
    return norm, linear, torch.randn(200, WIDTH, generator=generator)


def fold(norm, linear, x, **bits):
    return fold_into_norm(
        norm,
        linear.weight.data,
        linear.bias.data,
        norm(x),
        **{"weight_bits": 4, "input_bits": 4, **bits},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dead", [(), (3, 7)])
@torch.no_grad()
def test_the_float_function_is_unchanged(seed, dead):
    norm, linear, x = uneven(seed, dead=dead)
    expected = linear(norm(x))
    fold(norm, linear, x)
    torch.testing.assert_close(linear(norm(x)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_channels_end_with_one_range_when_fully_evened(monkeypatch):
    monkeypatch.setattr(reparametrisation, "EXPONENTS", (1.0,))
    norm, linear, x = uneven()
    before = norm(x).std(0)
    assert fold(norm, linear, x) == 1.0
    after = norm(x).std(0)
    assert before.max() / before.min() > 20
    assert after.max() / after.min() < 2


@torch.no_grad()
def test_quantized_output_gets_better_and_the_best_exponent_is_taken():
    def error(norm, linear, x, expected):
        y = norm(x)
        scale, zero = quantizers.search_activation_range(y, bits=4)
        levels = quantizers.uniform_levels(y, scale, zero, bits=4) * scale
        return float((linear(levels) - expected).square().mean())

    norm, linear, x = uneven()
    expected = linear(norm(x))
    before = error(norm, linear, x, expected)
    assert fold(norm, linear, x, weight_bits=8) > 0
    assert error(norm, linear, x, expected) < before / 2


@torch.no_grad()
def test_even_channels_need_no_scaling():
    norm, linear, x = uneven()
    norm.weight.fill_(1.0)
    ratio = 10 ** torch.linspace(-1.5, 1.5, WIDTH)
    linear.weight.mul_(ratio)
    fold(norm, linear, x)
    torch.testing.assert_close(norm.weight, torch.ones(WIDTH), rtol=0.5, atol=0.0)


def test_a_channel_that_never_moves_is_shifted_and_not_scaled():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 5.0
    middle, half = channel_ranges(x)
    assert float(middle[2]) == 5.0
    others = half[[0, 1, 3]]
    assert others.min() / 2 < half[2] < others.max()
