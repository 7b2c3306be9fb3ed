"""Shapes are where they should be, and patterns cover what they should."""

import pytest
import torch

from qtool.demo.shapes import PATTERNS, SHAPES, pattern_weight, signed_distance

INSIDE = {
    "disc": (0.0, 0.0),
    "triangle": (0.0, 0.0),
    "star": (0.0, 0.9),
    "cross": (0.8, 0.0),
    "ring": (0.66, 0.0),
    "crescent": (-0.6, 0.0),
}
OUTSIDE = {
    "disc": (0.9, 0.0),
    "triangle": (0.0, 0.6),
    "star": (0.0, -0.6),
    "cross": (0.6, 0.6),
    "ring": (0.0, 0.0),
    "crescent": (0.4, 0.0),
}


def distance(shape, point):
    kind = torch.tensor([list(SHAPES).index(shape)])
    u, v = (torch.tensor([[value]]) for value in point)
    return float(signed_distance(kind, u, v))


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_tells_inside_from_outside(shape):
    assert distance(shape, INSIDE[shape]) < 0
    assert distance(shape, OUTSIDE[shape]) > 0
    assert distance(shape, (1.3, 1.3)) > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_changes_no_faster_than_the_way(shape):
    points = torch.rand(2, 1, 4000, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    steps = torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(1)) * 1e-2
    kind = torch.tensor([list(SHAPES).index(shape)])
    change = signed_distance(kind, *(points + steps)) - signed_distance(kind, *points)
    assert (change.abs() <= torch.hypot(*steps) * 1.01 + 1e-6).all()


def test_a_mixed_batch_equals_one_kind_at_a_time():
    kinds = torch.arange(len(SHAPES))
    u, v = torch.rand(2, len(SHAPES), 50) * 2 - 1
    mixed = signed_distance(kinds, u, v)
    for row in range(len(SHAPES)):
        alone = signed_distance(kinds[row : row + 1], u[row : row + 1], v[row : row + 1])
        torch.testing.assert_close(mixed[row], alone[0])


@pytest.mark.parametrize(
    ("pattern", "share"), [("plain", 0.0), ("striped", 0.5), ("dotted", 0.32), ("checkered", 0.5)]
)
def test_share_of_the_second_colour(pattern, share):
    points = torch.rand(2, 1, 40000, generator=torch.Generator().manual_seed(0)) * 9
    kind = torch.tensor([list(PATTERNS).index(pattern)])
    weight = pattern_weight(kind, points[0], points[1], torch.tensor([[50.0]]))
    assert float(weight.mean()) == pytest.approx(share, abs=0.02)
    assert float(weight.min()) >= 0
    assert float(weight.max()) <= 1


def test_checkered_repeats_after_a_period():
    points = torch.rand(2, 1, 1000)
    kind = torch.tensor([list(PATTERNS).index("checkered")])
    sharpness = torch.tensor([[8.0]])
    here = pattern_weight(kind, points[0], points[1], sharpness)
    there = pattern_weight(kind, points[0] + 1, points[1] + 2, sharpness)
    torch.testing.assert_close(here, there, atol=1e-4, rtol=0)
    swapped = pattern_weight(kind, points[0] + 0.5, points[1], sharpness)
    torch.testing.assert_close(here, 1 - swapped, atol=1e-4, rtol=0)
