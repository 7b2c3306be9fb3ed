"""Random parts of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from qtool.io.random_crops import random_crop, shifted


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def picture(width=60, height=40):
    down, across = np.mgrid[:height, :width]
    pixels = np.stack([across * 4, down * 4, np.full_like(down, 9)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_crops_have_the_size_and_repeat(size):
    crops = [random_crop(picture(), size=size, generator=seeded(seed)) for seed in range(20)]
    assert all(crop.shape == (3, *size) and crop.dtype == torch.uint8 for crop in crops)
    again = random_crop(picture(), size=size, generator=seeded(3))
    assert torch.equal(crops[3], again)
    assert len({crop.float().mean().item() for crop in crops}) > 10
    # Some are mirrored: their red rises to the left.
    rising = [bool(crop[0, 0, -1] > crop[0, 0, 0]) for crop in crops]
    assert 4 <= sum(rising) <= 16


def test_very_narrow_pictures_give_their_middle():
    crop = random_crop(picture(200, 4), size=(8, 8), generator=seeded(0))
    assert crop.shape == (3, 8, 8)


def test_small_pictures_move_by_a_few_pixels():
    source = torch.zeros(3, 9, 9, dtype=torch.uint8)
    source[:, 4, 4] = 7
    places = set()
    for seed in range(60):
        moved = shifted(source, reach=2, generator=seeded(seed))
        assert moved.shape == source.shape
        ((_, down, right), *_) = moved.nonzero().tolist()
        places.add((down - 4, right - 4))
        assert int(moved.sum()) == 21
    assert all(abs(down) <= 2 and abs(right) <= 2 for down, right in places)
    assert len(places) > 15


def test_some_small_pictures_are_mirrored():
    source = torch.arange(9, dtype=torch.uint8).expand(3, 9, 9)
    moved = [shifted(source, reach=1, generator=seeded(seed)) for seed in range(40)]
    mirrored = sum(bool(m[0, 4, 3] > m[0, 4, 4]) for m in moved)
    assert 10 <= mirrored <= 30
