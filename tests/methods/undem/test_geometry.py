"""Where sensor samples look."""

import math

import torch

from qtool.methods.undem.geometry import Pose, screen_points


def test_straight_on_samples_are_evenly_spaced():
    u, v = screen_points(Pose(scale=2.5), 6, 8, samples=2)
    assert u.shape == v.shape == (12, 16)
    torch.testing.assert_close(u.diff(dim=1), torch.full((12, 15), 0.2), atol=1e-5, rtol=0)
    torch.testing.assert_close(v.diff(dim=0), torch.full((11, 16), 0.2), atol=1e-5, rtol=0)
    assert abs(float(u.mean())) < 1e-5


def test_roll_turns_the_grid():
    u, v = screen_points(Pose(scale=2.0, roll=30.0), 4, 4, samples=1)
    step = torch.tensor([float(u[0, 1] - u[0, 0]), float(v[0, 1] - v[0, 0])])
    assert abs(float(step.norm()) - 0.5) < 1e-4
    assert abs(abs(math.degrees(math.atan2(step[1], step[0]))) - 30) < 0.01


def test_yaw_makes_one_side_denser():
    pose = Pose(scale=2.0, yaw=12.0)
    u, _ = screen_points(pose, 1, 4000, samples=1)
    steps = u[0, ::500].diff()
    assert bool((steps.diff() > 0).all()) or bool((steps.diff() < 0).all())


def test_distortion_grows_from_the_middle():
    bent, _ = screen_points(Pose(scale=2.0, distortion=0.08), 1, 4000, samples=1)
    plain, _ = screen_points(Pose(scale=2.0), 1, 4000, samples=1)
    away = (bent - plain)[0].abs()
    assert float(away[2000]) < 1e-3
    # r = 1 half width at the edge: r (1 + k1).
    assert abs(float(away[0]) / abs(float(plain[0, 0])) - 0.08) < 1e-3


def test_parts_have_their_phase_at_their_centre():
    pose = Pose(scale=2.0, yaw=5.0, centre_x=0.4, centre_y=-0.2, phase_x=0.25, phase_y=1.5)
    u, v = screen_points(pose, 2, 2, samples=1)
    assert abs(float(u.mean()) - 0.25) < 1e-3
    assert abs(float(v.mean()) - 1.5) < 1e-3
