"""The physics of the simulated photograph."""

from dataclasses import replace

import pytest
import torch

from qtool.methods.undem import filters
from qtool.methods.undem.capture import Capture, draw_capture
from qtool.methods.undem.geometry import Pose
from qtool.methods.undem.simulator import simulate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grey(side=320, level=0.6):
    return torch.full((3, side, side), level)


@pytest.mark.parametrize("scale", [1.6, 1.8, 2.2, 2.3, 2.6, 3.0, 3.4])
def test_the_two_grids_beat_at_the_predicted_frequency(scale):
    capture = Capture(pose=Pose(scale=scale), blur=0.2)
    photo, _ = simulate(grey(), capture, size=(24, 512), generator=seeded())
    wave = (photo[0] - photo[2]).mean(0)
    spectrum = torch.fft.rfft((wave - wave.mean()) * torch.hann_window(512), n=8192).abs()
    # The slowest waves are what is left of the mean.
    measured = (int(spectrum[80:].argmax()) + 80) / 8192
    assert abs(measured - abs(1 / scale - 0.5)) < 0.004


def test_equal_seeds_give_equal_photographs():
    picture = torch.rand(3, 80, 80, generator=seeded(7))
    runs = []
    for _ in range(2):
        generator = seeded(11)
        capture = draw_capture(generator, samples=2)
        runs.append(simulate(picture, capture, size=(40, 48), generator=generator))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0].shape == (3, 40, 48)
    assert not torch.equal(*runs[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_target_of_a_flat_picture_is_that_colour(seed):
    colour = torch.tensor([0.2, 0.55, 0.9]).view(3, 1, 1)
    capture = replace(draw_capture(seeded(seed), samples=2), screen_gamma=2.2)
    _, target = simulate(
        colour.expand(3, 64, 64), capture, size=(32, 32), generator=seeded(), tone="screen"
    )
    torch.testing.assert_close(target, colour.expand(3, 32, 32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("panel", ["rgb", "bgr", "diamond"])
def test_panels_keep_the_mean_light(panel):
    capture = Capture(
        pose=Pose(scale=2.3), panel=panel, gap_x=0.8, gap_y=0.6, exposure=0.6, demosaic="bilinear"
    )
    photo, target = simulate(grey(level=0.5), capture, size=(128, 128), generator=seeded())
    expected = 0.6 * filters.to_linear(torch.tensor(0.5))
    assert abs(float(filters.to_linear(photo).mean()) / float(expected) - 1) < 0.02
    # The target in the tone of the capture has the same light, and none of the bands.
    assert abs(float(filters.to_linear(target).mean()) / float(expected) - 1) < 1e-3
    assert float(target.std()) < 1e-5 < float(photo.std())


def test_moire_fades_with_blur():
    energies = []
    for blur in (0.2, 0.5, 1.0):
        capture = Capture(pose=Pose(scale=2.2), blur=blur)
        photo, target = simulate(grey(), capture, size=(96, 96), generator=seeded())
        energies.append(float((photo - target).std()))
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < 0.3 * energies[0]


def test_a_picture_and_its_target_are_aligned():
    y, x = torch.meshgrid(torch.linspace(0, 9, 160), torch.linspace(0, 7, 160), indexing="ij")
    picture = ((x + y).sin() * 0.2 + 0.5).expand(3, -1, -1)
    pose = Pose(scale=2.0, yaw=8.0, pitch=-6.0, roll=4.0, centre_x=0.3)
    capture = Capture(pose=pose, blur=1.0)
    photo, target = simulate(picture, capture, size=(128, 128), generator=seeded())
    photo, target = (filters.gaussian_blur(each, 3.0).mean(0) for each in (photo, target))
    inner = (slice(20, -20), slice(20, -20))

    def apart(dy, dx):
        shifted = target.roll((dy, dx), (0, 1))
        return float((photo - shifted)[inner].square().mean())

    here = apart(0, 0)
    assert all(apart(dy, dx) > 2 * here for dy, dx in ((1, 0), (-1, 0), (0, 1), (0, -1)))


def test_reducing_gives_the_size_asked_for():
    capture = Capture(pose=Pose(scale=2.0), resize_x=0.4, resize_y=0.7, quality=85, quad=True)
    photo, target = simulate(grey(), capture, size=(30, 50), generator=seeded())
    assert photo.shape == target.shape == (3, 30, 50)
    assert bool(photo.isfinite().all())


def test_every_device_takes_the_same_photograph(device):
    picture = torch.rand(3, 80, 80, generator=seeded(7))
    capture = replace(draw_capture(seeded(2), samples=2), noise_gain=0.0, noise_floor=0.0)
    here = simulate(picture, capture, size=(40, 48), generator=seeded())
    there = simulate(picture.to(device), capture, size=(40, 48), generator=seeded())
    for one, other in zip(here, there, strict=True):
        assert other.device.type == device.type
        # A value between two levels of 8 bits may fall to either.
        assert float((one - other.cpu()).abs().mean()) < 1e-3
