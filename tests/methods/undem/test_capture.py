"""How photographs are drawn."""

import json

import pytest
import torch

from qtool.methods.undem.capture import Draw, draw_capture


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_equal_seeds_draw_equal_photographs_and_others_differ():
    assert draw_capture(seeded(3)) == draw_capture(seeded(3))
    assert draw_capture(seeded(3)) != draw_capture(seeded(4))


def test_most_photographs_beat_and_all_are_in_range():
    captures = [draw_capture(seeded(seed)) for seed in range(200)]
    scales = [capture.pose.scale for capture in captures]
    assert 0.7 < sum(1.5 <= scale <= 3.2 for scale in scales) / 200 < 0.9
    assert all(0.8 <= scale <= 5 for scale in scales)
    assert all(0.15 < capture.resize_x <= capture.resize_y <= 1 for capture in captures)
    assert all(75 <= capture.quality <= 97 for capture in captures)
    assert {capture.panel for capture in captures} == {"rgb", "bgr", "diamond"}


def test_a_photograph_can_be_stored():
    stored = json.loads(json.dumps(draw_capture(seeded()).to_dict()))
    assert stored["pose"]["scale"] == draw_capture(seeded()).pose.scale


def test_shares_are_kept():
    draw = Draw(seeded(1))
    picks = [draw.pick(("a", "b", "c"), (1, 0, 3)) for _ in range(400)]
    assert picks.count("b") == 0
    assert picks.count("a") / 400 == pytest.approx(0.25, abs=0.07)
    assert {draw.index(3) for _ in range(60)} == {0, 1, 2}
