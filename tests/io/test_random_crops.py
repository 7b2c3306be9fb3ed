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
    source = torch.zeros(60, 3, 9, 9, dtype=torch.uint8)
    source[:, :, 4, 4] = 7
    moved = shifted(source, reach=2, generator=seeded(0))
    assert moved.shape == source.shape
    assert moved.dtype == torch.uint8
    assert torch.equal(moved.sum((1, 2, 3)), torch.full((60,), 21))
    places = moved[:, 0].nonzero()[:, 1:] - 4
    assert int(places.abs().max()) == 2
    assert len(places.unique(dim=0)) > 15


def test_small_pictures_move_as_a_whole():
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(1, 256, (8, 3, 6, 7), generator=generator, dtype=torch.uint8)
    for picture, moved in zip(source, shifted(source, reach=1, generator=seeded(1)), strict=True):
        padded = torch.nn.functional.pad(picture, (1, 1, 1, 1))
        windows = [padded[:, d : d + 6, r : r + 7] for d in range(3) for r in range(3)]
        found = [torch.equal(w, moved) or torch.equal(w.flip(2), moved) for w in windows]
        assert sum(found) == 1


def test_some_small_pictures_are_mirrored():
    source = torch.arange(9, dtype=torch.uint8).expand(40, 3, 9, 9)
    moved = shifted(source, reach=1, generator=seeded(0))
    assert torch.equal(moved, shifted(source, reach=1, generator=seeded(0)))
    mirrored = int((moved[:, 0, 4, 3] > moved[:, 0, 4, 4]).sum())
    assert 10 <= mirrored <= 30
