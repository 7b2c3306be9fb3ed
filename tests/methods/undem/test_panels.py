"""Light of subpixels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.methods.undem.panels import CELLS, tile

gaps = st.floats(0, 1)


@given(st.sampled_from(["rgb", "bgr", "diamond"]), gaps, gaps)
def test_gaps_cost_no_brightness(panel, gap_x, gap_y):
    light = tile(panel, gap_x=gap_x, gap_y=gap_y)
    assert bool((light >= 0).all())
    torch.testing.assert_close(light.mean((1, 2)), torch.ones(3))


def test_stripes_lie_side_by_side_in_their_order():
    light = tile("rgb")
    assert light.shape == (3, CELLS, CELLS)
    assert light.argmax(0)[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert tile("bgr").argmax(0)[0].tolist() == [2, 2, 1, 1, 0, 0]


def test_a_whole_gap_is_black():
    light = tile("rgb", gap_x=1.0, gap_y=1.0)
    assert float(light[:, -1].sum()) == 0
    assert float(light[0, :, 1].sum()) == 0


def test_a_diamond_panel_has_twice_as_many_green_spots():
    light = tile("diamond")
    assert light.shape == (3, 2 * CELLS, 2 * CELLS)
    green, red = light[1], light[0]
    assert torch.equal(green[:CELLS, :CELLS], green[:CELLS, CELLS:])
    assert not torch.equal(red[:CELLS, :CELLS], red[:CELLS, CELLS:])


@pytest.mark.parametrize("panel", ["rgb", "bgr", "diamond"])
def test_tiles_fit_together(panel):
    # A shift by a whole period changes nothing; by half a period it does.
    light = tile(panel, gap_x=0.5)
    side = light.shape[-1]
    assert torch.equal(light.roll(side, -1), light)
    assert not torch.equal(light.roll(side // 2, -1), light)
