"""The loss of JPEG, against a real encoder."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from qtool.methods.undem.jpeg import compressed


def smooth_picture():
    y, x = torch.meshgrid(torch.linspace(0, 6, 48), torch.linspace(0, 5, 64), indexing="ij")
    return torch.stack([(x + y).sin(), (x * 2).cos(), (y * 3).sin()]) * 0.35 + 0.5


@pytest.mark.parametrize("quality", [60, 80, 95])
def test_it_loses_what_a_real_encoder_loses(quality):
    picture = smooth_picture()
    ours = compressed(picture, quality=quality, subsampled=False)
    file = io.BytesIO()
    pixels = picture.mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    real = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
    assert float((ours - real).abs().mean()) < 1 / 255


def test_lower_quality_loses_more_and_sizes_are_free():
    picture = torch.rand(3, 37, 21, generator=torch.Generator().manual_seed(0))
    errors = [
        float((compressed(picture, quality=q, subsampled=True) - picture).abs().mean())
        for q in (95, 75, 30)
    ]
    assert errors == sorted(errors)
    assert compressed(picture, quality=80, subsampled=True).shape == picture.shape


def test_a_flat_picture_stays_flat():
    flat = torch.full((3, 32, 32), 128 / 255)
    torch.testing.assert_close(compressed(flat, quality=75, subsampled=True), flat)
