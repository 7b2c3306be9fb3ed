"""Bits per layer under a budget."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import UsageError
from qtool.quant.allocation import Option, allocate, allot, mean_bits

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


def options(*rows):
    return [Option(bits, takes, costs) for bits, takes, costs in rows]


def test_the_layer_that_suffers_gets_the_bits():
    layers = {
        "fragile": options((2, 2, 9.0), (4, 4, 1.0), (8, 8, 0.0)),
        "robust": options((2, 2, 0.2), (4, 4, 0.1), (8, 8, 0.0)),
    }
    assert allot(layers, 10) == {"fragile": 8, "robust": 2}
    assert allot(layers, 16) == {"fragile": 8, "robust": 8}
    assert allot(layers, 6) == {"fragile": 4, "robust": 2}
    assert allot(layers, 3.9) is None


def test_bits_that_take_nothing_more_are_taken():
    assert allot({"one": options((3, 4, 1.0), (4, 4, 1.0))}, 4) == {"one": 4}


costs = st.lists(st.floats(0, 10), min_size=3, max_size=3).map(lambda v: sorted(v, reverse=True))


@given(st.lists(costs, min_size=1, max_size=4), st.floats(0, 40))
def test_the_budget_is_kept_and_not_wasted(tables, budget):
    layers = {
        str(index): options(
            *((bits, bits, cost) for bits, cost in zip((2, 4, 8), own, strict=True))
        )
        for index, own in enumerate(tables)
    }
    found = allot(layers, budget)
    combinations = itertools.product(*layers.values())
    fitting = [c for c in combinations if sum(option.takes for option in c) <= budget]
    assert (found is None) == (not fitting)
    if found is not None:
        chosen = [next(o for o in layers[name] if o.bits == bits) for name, bits in found.items()]
        left = budget - sum(option.takes for option in chosen)
        assert left >= 0
        for name, option in zip(found, chosen, strict=True):
            better = [o for o in layers[name] if o.costs < option.costs and o.bits > option.bits]
            assert all(o.takes - option.takes > left for o in better)
