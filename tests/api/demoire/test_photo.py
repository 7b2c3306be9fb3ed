"""One photograph: colours for the network, and values back without loss."""

import numpy as np
import pytest
import torch

from qtool.api.demoire import photo as work
from qtool.settings.demoire import DemoireSettings


def decoded(content, **settings):
    return work.decode(content, "in", DemoireSettings(out="x", **settings))


def test_rows_and_columns_in_any_order(photo_files):
    photo = decoded(photo_files.png())
    rows, columns = torch.tensor([3, 4, 5, 4]), torch.arange(10, 20)
    expected = photo_files.scene()[rows][:, columns] / 255
    read = photo.read(rows, columns).permute(1, 2, 0)
    assert np.allclose(read.numpy(), expected, atol=1e-6)


def test_grey_is_read_as_three_equal_channels(photo_files):
    photo = decoded(photo_files.jpeg(photo_files.scene(channels=1)[..., 0]))
    read = photo.read(torch.arange(48), torch.arange(64))
    assert torch.equal(read[0], read[1])
    assert read.shape == (3, 48, 64)


def test_profiles_that_cannot_be_used_are_kept_with_a_note(photo_files):
    photo = decoded(photo_files.jpeg(icc=b"no profile" * 20))
    assert photo.space is None
    assert "profile is kept but not used" in photo.notes[0]
    assert decoded(photo_files.jpeg(icc=photo_files.display_p3())).space is not None


def test_holes_are_filled_from_around_them(photo_files):
    pixels = np.full((90, 120, 4), (200, 100, 50, 255), np.uint8)
    pixels[30:60, 40:80] = (0, 255, 0, 0)
    photo = decoded(photo_files.png(pixels))
    filled = work._with_filled_holes(photo)
    inside = filled.photo.pixels[30:60, 40:80].astype(int)
    assert np.abs(inside - (200, 100, 50)).max() <= 1
    nothing = np.zeros((20, 20, 4), np.uint8)
    assert work._with_filled_holes(decoded(photo_files.png(nothing))).height == 20


@pytest.mark.parametrize("seed", [0, 1])
def test_detection_reads_transparent_parts_as_white(photo_files, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (200, 200, 4)).astype(np.uint8)
    pixels[..., 3] = 0
    assert work.moire_score(decoded(photo_files.png(pixels))) < 0.05
