"""Bits per layer under a budget."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import UsageError
from qtool.quant.allocation import allocate, mean_bits

WIDTHS = (2, 4, 8)


@st.composite
def layers(draw):
    names = [f"layer{index}" for index in range(draw(st.integers(1, 4)))]
    sizes = {name: draw(st.integers(1, 50)) for name in names}
    losses = {
        name: dict(
            zip(
                WIDTHS,
                sorted(draw(st.lists(st.floats(0, 9), min_size=3, max_size=3)), reverse=True),
                strict=True,
            )
        )
        for name in names
    }
    return losses, sizes


def total(losses, chosen):
    return sum(losses[name][bits] for name, bits in chosen.items())


@given(layers(), st.floats(2.2, 8))
def test_no_choice_within_the_budget_is_better(case, average):
    losses, sizes = case
    chosen = allocate(losses, sizes, average=average)
    assert list(chosen) == list(losses)
    assert mean_bits(chosen, sizes) <= average + 1e-9
    # Costs are rounded up to parts of the budget, so only choices with some slack must be beaten.
    for widths in itertools.product(WIDTHS, repeat=len(losses)):
        other = dict(zip(losses, widths, strict=True))
        if mean_bits(other, sizes) <= average * (1 - len(losses) / 4000):
            assert total(losses, chosen) <= total(losses, other) + 1e-9


def test_bits_go_where_rounding_hurts():
    losses = {"robust": {2: 1.0, 4: 0.9, 8: 0.8}, "fragile": {2: 9.0, 4: 3.0, 8: 0.0}}
    assert allocate(losses, {"robust": 10, "fragile": 10}, average=5) == {"robust": 2, "fragile": 8}


def test_what_costs_nothing_takes_the_best_width():
    losses = {"free": {2: 1.0, 8: 0.5}, "paid": {2: 1.0, 8: 0.5}}
    chosen = allocate(losses, {"free": 0, "paid": 5}, average=2)
    assert chosen == {"free": 8, "paid": 2}
    assert mean_bits(chosen, {"free": 0, "paid": 5}) == 2
    assert mean_bits({}, {}) == 0


def test_a_budget_below_the_narrowest_widths_is_refused():
    with pytest.raises(UsageError, match=r"2\.5 bits"):
        allocate({"a": {8: 0.0}, "b": {2: 1.0, 4: 0.0}}, {"a": 5, "b": 5}, average=2.5)
