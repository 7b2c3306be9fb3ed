"""Tiles cover a picture, and their weights add up to one everywhere."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.methods.undem.tiles import mirrored, plan_axis

axes = st.builds(
    plan_axis,
    st.integers(1, 3000),
    tile=st.integers(0, 700),
    overlap=st.integers(0, 200),
    multiple=st.sampled_from([8, 32, 64]),
    shrink=st.booleans(),
)


@given(axes)
def test_weights_add_up_to_one(axis):
    total = torch.zeros(axis.starts[-1] + axis.size)
    for index, start in enumerate(axis.starts):
        total[start : start + axis.size] += axis.weights(index)
    assert len(total) >= axis.length
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@given(
    st.integers(1, 3000),
    st.integers(0, 700),
    st.integers(0, 200),
    st.sampled_from([8, 32, 64]),
)
def test_tiles_are_equal_aligned_and_overlap(length, tile, overlap, multiple):
    whole, shrunk = (
        plan_axis(length, tile=tile, overlap=overlap, multiple=multiple, shrink=shrink)
        for shrink in (False, True)
    )
    for axis in (whole, shrunk):
        assert axis.size % multiple == 0
        assert all(start % multiple == 0 for start in axis.starts)
        assert axis.starts[-1] + axis.size - axis.length < multiple
        for left, right in zip(axis.starts, axis.starts[1:], strict=False):
            assert left + axis.size - right >= min(overlap, axis.size - multiple)
    assert len(shrunk.starts) == len(whole.starts)
    assert shrunk.size <= whole.size


def test_tiles_shrink_to_what_as_many_need():
    tiles = {"tile": 1024, "overlap": 128, "multiple": 32}
    assert plan_axis(4000, **tiles).size == 1024
    assert plan_axis(4000, **tiles, shrink=True).size == 928


def test_a_small_picture_is_one_tile():
    axis = plan_axis(50, tile=1024, overlap=128, multiple=64)
    assert (axis.starts, axis.size) == ((0,), 64)
    assert plan_axis(2000, tile=0, overlap=128, multiple=32).starts == (0,)


def test_borders_are_mirrored_as_often_as_needed():
    assert mirrored(0, 9, 3).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert mirrored(2, 3, 4).tolist() == [2, 3, 2]
    assert mirrored(0, 3, 1).tolist() == [0, 0, 0]
