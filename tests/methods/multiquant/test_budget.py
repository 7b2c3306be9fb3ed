"""Bits go where they help most, and the budget is kept."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from qtool.methods.multiquant.budget import Option, allot


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
