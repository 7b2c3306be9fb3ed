"""Matrix profiles to sRGB and back, checked against Little CMS."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from qtool.io.colour import ProfileError, colour_space


def test_srgb_and_no_profile_need_nothing(photo_files):
    assert colour_space(b"") is None
    assert colour_space(photo_files.srgb_profile()) is None


def test_display_p3_is_what_little_cms_says(photo_files):
    space = colour_space(photo_files.display_p3())
    colours = np.random.default_rng(0).integers(90, 165, (16, 16, 3)).astype(np.uint8)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(photo_files.display_p3()))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    expected = np.asarray(
        ImageCms.profileToProfile(
            Image.fromarray(colours),
            profile,
            srgb,
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    )
    measured = space.to_srgb(colours.astype(np.float32) / 255) * 255
    assert np.abs(measured - expected).max() < 1.5


def test_colours_outside_srgb_come_back(photo_files):
    space = colour_space(photo_files.display_p3())
    steps = np.linspace(0, 1, 12, dtype=np.float32)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 12, 3)
    srgb = space.to_srgb(colours)
    assert srgb.min() < -0.1
    assert srgb.max() > 1.05
    assert np.abs(space.from_srgb(srgb) - colours).max() < 1e-3


@pytest.mark.parametrize("cut", [10, 130, 200, 390])
def test_damaged_profiles_are_an_error(photo_files, cut):
    with pytest.raises(ProfileError):
        colour_space(photo_files.display_p3()[:cut])


def test_grey_profiles_are_an_error(photo_files):
    profile = bytearray(photo_files.display_p3())
    profile[16:20] = b"GRAY"
    with pytest.raises(ProfileError, match="not a matrix profile"):
        colour_space(bytes(profile))
