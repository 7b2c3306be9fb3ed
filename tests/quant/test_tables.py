"""Tables are optimal, and a table quantizer's error is never above the uniform one's."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from qtool.quant import quantizers, tables


def error_of(table, values, weights):
    levels = table[values.round().clamp(0, 255).long()].double()
    squares = (levels - values.double()).square() * weights.double()
    return float(squares.sum() / weights.double().sum())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=7, unique=True),
    st.integers(0, 2**31 - 1),
)
def test_a_table_is_as_good_as_the_best_of_all_partitions(places, seed):
    generator = torch.Generator().manual_seed(seed)
    places = sorted(places)
    values = torch.tensor(places, dtype=torch.float32)
    values = values + 0.8 * torch.rand(len(places), generator=generator) - 0.4
    weights = torch.rand(len(places), generator=generator) + 0.01
    table, error = tables.optimal_table(values, weights, bits=2)
    assert error == pytest.approx(error_of(table, values, weights), abs=1e-9)
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(places)), min(3, len(places) - 1)):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(places))):
            part, weight = values[start:stop].double(), weights[start:stop].double()
            level = ((part * weight).sum() / weight.sum()).round().clamp(0, 255)
            total += float(((part - level).square() * weight).sum())
        best = min(best, total / float(weights.double().sum()))
    assert error == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_table_has_the_levels_of_its_bits_in_order(bits):
    values = 256 * torch.rand(4000, generator=torch.Generator().manual_seed(0)) ** 3
    table, _ = tables.optimal_table(values, torch.ones_like(values), bits=bits)
    assert table.dtype == torch.uint8
    assert (table.int().diff() >= 0).all()
    assert len(table.unique()) == 2**bits


def test_eight_bits_keep_the_grid():
    values = torch.arange(256.0).repeat(3)
    table, error = tables.optimal_table(values, torch.ones_like(values), bits=8)
    assert torch.equal(table, tables.identity())
    assert error == 0


def test_one_value_needs_one_level():
    table, error = tables.optimal_table(torch.full((9,), 77.0), torch.ones(9), bits=4)
    assert (table == 77).all()
    assert error == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("shape", ["gelu", "softmax", "normal"])
def test_tables_beat_uniform_codes(bits, shape):
    x = torch.randn(8, 64, 96, generator=torch.Generator().manual_seed(0))
    x = {"gelu": torch.nn.functional.gelu(x), "softmax": (3 * x).softmax(-1), "normal": x}[shape]
    scale, zero, table = tables.search_table(x, bits=bits)
    found = quantizers.table_levels(x, scale, zero, table) * scale
    step, offset = quantizers.search_activation_range(x, bits=bits)
    uniform = quantizers.uniform_levels(x, step, offset, bits=bits) * step
    assert len(table.unique()) <= 2**bits
    assert (found - x).square().mean() < 0.97 * (uniform - x).square().mean()


def test_weights_of_channels_move_the_levels():
    x = torch.cat((torch.randn(512, 1), 20 + torch.randn(512, 1)), dim=1)
    only = torch.tensor([1.0, 0.0])
    scale, zero, table = tables.search_table(x, bits=2, channel_weights=only)
    found = quantizers.table_levels(x, scale, zero, table) * scale
    plain = tables.search_table(x, bits=2)
    beside = quantizers.table_levels(x, *plain) * plain[0]
    assert (found - x)[:, 0].square().mean() < 0.5 * (beside - x)[:, 0].square().mean()


def test_constant_activations_survive():
    for value in (0.0, 3.0, -2.0):
        x = torch.full((4, 8), value)
        scale, zero, table = tables.search_table(x, bits=4)
        found = quantizers.table_levels(x, scale, zero, table) * scale
        torch.testing.assert_close(found, x, rtol=1e-2, atol=1e-6)


def test_rare_large_values_are_inside_the_grid():
    x = torch.randn(40_000, 50, generator=torch.Generator().manual_seed(1))
    x[2000::4000, 7] = 12.0
    x = x.softmax(-1)
    scale, zero, table = tables.search_table(x, bits=8)
    found = quantizers.table_levels(x, scale, zero, table) * scale
    assert float((found - x).abs().max()) < 0.02
