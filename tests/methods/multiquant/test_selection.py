"""Which branches serve which width, and slices of half the cost."""

from collections import Counter
from itertools import pairwise

import pytest

from qtool.methods.multiquant.selection import (
    Selection,
    branch_count,
    narrow_widths,
    select,
)
from qtool.models import vision
from qtool.models.residual import residual_layout

ALL = range(2, 9)


def layout(name):
    size = (3, 32, 32) if name in ("resnet20", "resnet56") else (3, 224, 224)
    return residual_layout(vision.build(name, {}, device="meta"), input_size=size)


def spoken(selection):
    """Branches from 1, with h for the narrow one, as the notes write them."""
    return {
        bits: " ".join(
            f"h{branch + 1}" if branch == chosen.narrow else str(branch + 1)
            for branch in chosen.branches
        )
        for bits, chosen in selection.items()
    }


def test_the_amortized_table():
    assert spoken(select(ALL)) == {
        2: "1", 3: "1 h2", 4: "2 3", 5: "2 3 h4", 6: "2 3 4", 7: "1 2 3 h4", 8: "1 2 3 4",
    }  # fmt: skip
    assert spoken(select((8, 2, 4, 6))) == {2: "1", 4: "2 3", 6: "2 3 4", 8: "1 2 3 4"}


def test_the_prefix_rule():
    assert spoken(select(ALL, amortized=False)) == {
        2: "1", 3: "1 h2", 4: "1 2", 5: "1 2 h3", 6: "1 2 3", 7: "1 2 3 h4", 8: "1 2 3 4",
    }  # fmt: skip
    assert spoken(select((2, 3, 4))) == {2: "1", 3: "1 h2", 4: "1 2"}
    assert select((4,)) == {4: Selection((0, 1))}


@pytest.mark.parametrize(
    ("widths", "amortized", "uses"),
    [
        ((2, 4, 6, 8), False, [4, 3, 2, 1]),
        ((2, 4, 6, 8), True, [2, 3, 3, 2]),
        (ALL, True, [4, 6, 5, 4]),
    ],
)
def test_how_many_widths_use_a_branch(widths, amortized, uses):
    chosen = select(widths, amortized=amortized).values()
    counts = Counter(branch for selection in chosen for branch in selection.branches)
    assert [counts[branch] for branch in range(4)] == uses


def test_branches_are_as_many_as_the_widest_width_needs():
    assert [branch_count((bits,)) for bits in ALL] == [1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "resnet18", "resnet50"])
def test_slices_take_half_the_multiplications_and_keep_the_ends(name):
    body = layout(name)
    narrow = narrow_widths(body)
    taken = sum(conv.multiplications(*narrow.channels[conv.name]) for conv in body.convolutions)
    whole = sum(conv.multiplications() for conv in body.convolutions)
    assert taken / whole == pytest.approx(narrow.share)
    assert 0.49 <= narrow.share <= 0.51
    first, last = body.blocks[0].convolutions[0], body.blocks[-1].convolutions[-1]
    assert narrow.channels[first.name][0] == first.inputs
    assert narrow.channels[last.name][1] == last.outputs
    assert all(
        narrow.channels[block.convolutions[0].name][1] < block.convolutions[0].outputs
        for block in body.blocks
    )


def test_channels_of_neighbours_agree():
    body = layout("resnet18")
    channels = narrow_widths(body).channels
    for block in body.blocks:
        for one, other in pairwise(block.convolutions):
            assert channels[one.name][1] == channels[other.name][0]
        if block.shortcut is not None:
            ends = channels[block.shortcut.name]
            assert ends == (channels[block.convolutions[0].name][0], ends[1])
            assert ends[1] == channels[block.convolutions[-1].name][1]


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
@pytest.mark.parametrize("amortized", [True, False])
def test_bit_operations_are_those_of_a_plain_network(name, amortized):
    body = layout(name)
    share = narrow_widths(body).share
    for bits, chosen in select(ALL, amortized=amortized).items():
        full = len(chosen.branches) - (chosen.narrow is not None)
        branches = full + share * (chosen.narrow is not None)
        assert 2 * bits * branches == pytest.approx(bits * bits, rel=0.01)
