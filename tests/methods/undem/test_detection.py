"""Moire is told from pictures without it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qtool.methods.undem import detection


def scene(seed, side=640):
    """Something like a photograph: noise whose spectrum falls off, and a few edges."""
    rng = np.random.default_rng(seed)
    rows = np.fft.fftfreq(side)[:, None]
    radius = np.hypot(rows, np.fft.rfftfreq(side)) + 1 / side
    phases = np.exp(2j * math.pi * rng.random((3, *radius.shape)))
    planes = np.fft.irfft2(phases / radius**1.6, s=(side, side))
    planes = 0.5 + 0.12 * planes / planes.std(axis=(1, 2), keepdims=True)
    planes[:, :, side // 3 :] += 0.1
    planes += rng.normal(0, 0.01, planes.shape)
    return torch.from_numpy(planes.clip(0, 1)).float()


def with_bands(picture, strength=0.06):
    side = picture.shape[1]
    y, x = np.mgrid[0:side, 0:side]
    phase = 2 * math.pi * (x / 9.5 + y / 23 + (x / 150) ** 2 / 5)
    bands = np.stack([np.sin(phase), np.sin(phase + 2), np.sin(phase + 4)])
    return (picture + strength * torch.from_numpy(bands).float()).clamp(0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_bands_are_seen(seed):
    picture = scene(seed)
    clean, banded = detection.score(picture), detection.score(with_bands(picture))
    assert clean < detection.THRESHOLD <= banded


def test_pictures_too_small_to_tell_count_as_clean():
    assert detection.score(torch.rand(3, 63, 500)) == 0


def test_a_flat_picture_is_clean():
    assert detection.score(torch.full((3, 200, 200), 0.5)) < 0.05


def test_large_photographs_are_reduced():
    assert detection.reduction(3000, 4000) == 5
    assert detection.reduction(700, 700) == 1
    assert detection.reduction(10, 10) == 1


def test_real_photographs_are_told_from_their_targets(shared_data):
    """Scenes that no weight was fitted on; every third, for time."""
    folder = shared_data / "moire_pairs" / "uhdm700"

    def share(pattern):
        found = []
        for path in sorted(folder.glob(pattern))[::3]:
            pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
            found.append(detection.score(pixels.permute(2, 0, 1) / 255) >= detection.THRESHOLD)
        return sum(found) / len(found)

    assert share("*_moire.jpg") > 0.7
    assert share("*_gt.jpg") < 0.2


def test_sharp_photographs_of_fences_and_roofs_are_clean(shared_data):
    found = 0
    for number in ("01", "07", "08", "19"):
        path = shared_data / "clean" / "kodak24" / f"kodim{number}.webp"
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        found += detection.score(pixels.permute(2, 0, 1) / 255) >= detection.THRESHOLD
    assert found <= 1


def test_colour_that_follows_luma_is_taken_out():
    generator = torch.Generator().manual_seed(0)
    light = detection._spectra(torch.rand(128, 192, generator=generator) * 255)
    left = detection._without_luma(0.3 * light, light)
    inside = detection._band((0.02, 0.71))
    assert left[..., inside].abs().max() < 1e-3 * light[..., inside].abs().max()


@given(
    height=st.integers(64, 150),
    width=st.integers(64, 150),
    seed=st.integers(0, 99),
    spread=st.floats(0, 1),
)
@settings(max_examples=15)
def test_any_picture_gets_the_same_finite_score_twice(height, width, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    picture = 0.5 + spread * (torch.rand(3, height, width, generator=generator) - 0.5)
    assert all(math.isfinite(number) for number in detection.features(picture))
    assert 0 <= detection.score(picture) <= 1
    assert detection.score(picture) == detection.score(picture)
