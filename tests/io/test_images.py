from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from timm.data import create_transform

from qtool.errors import ImageError, OutputExistsError
from qtool.io.images import contact_sheet, load_rgb, save_png, to_tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def _noise(height, width, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _smooth(height, width):
    """A picture with structure at every scale, as photographs have."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + 5 * c)) + np.cos(y / (7 - c)) + np.sin((x + y) / 40) for c in range(3)]
    noise = np.random.default_rng(1).normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, -1) * 40 + 128 + noise, 0, 255).astype(np.uint8))


def _png(width, height, depth, colour, rows, extra=b""):
    """A PNG by hand, because Pillow writes no 16-bit colour."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(b"\0" + row for row in rows)
    start = b"\x89PNG\r\n\x1a\n"
    return (
        start
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = (255, 0, 0)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = undo[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(np.asarray(load_rgb(path)), upright)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(_noise(9, 7)).convert(mode).save(path)
    image = load_rgb(path)
    assert image.mode == "RGB"
    assert image.size == (7, 9)


def test_grey_is_three_equal_channels(tmp_path):
    grey = _noise(9, 7, 1)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(
        np.asarray(load_rgb(tmp_path / "grey.png")), grey[..., None].repeat(3, -1)
    )


def test_transparent_parts_are_white(tmp_path):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    seen = np.asarray(load_rgb(tmp_path / "alpha.png"))
    assert seen[0, 0].tolist() == [10, 20, 30]
    assert seen[1, 1].tolist() == [255, 255, 255]

    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    seen = np.asarray(load_rgb(tmp_path / "palette.png"))
    assert seen[0].tolist() == [[200, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    path = tmp_path / f"ramp.{suffix}"
    Image.fromarray(ramp).save(path)
    seen = np.asarray(load_rgb(path))[..., 0]
    assert np.array_equal(seen, np.round(ramp / 257).astype(np.uint8))


def test_sixteen_bit_colour_is_scaled_not_clipped(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    rows = [row.astype(">u2").tobytes() for row in values]
    (tmp_path / "deep.png").write_bytes(_png(8, 8, 16, 2, rows))
    seen = np.asarray(load_rgb(tmp_path / "deep.png"))
    assert np.abs(seen - values / 257).max() <= 1


def test_profile_and_text_do_not_matter(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = _noise(5, 5)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(load_rgb(tmp_path / "a.png")), pixels)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animation_is_refused(tmp_path, suffix):
    frames = [Image.fromarray(_noise(8, 8, seed=seed)) for seed in range(3)]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="3 frames"):
        load_rgb(path)


def test_photograph_with_a_preview_is_one_picture(tmp_path):
    photo = Image.fromarray(_noise(16, 16))
    photo.save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photo.resize((4, 4))]
    )
    assert load_rgb(tmp_path / "a.jpg").size == (16, 16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_truncated_file(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    Image.fromarray(_noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"half"):
        load_rgb(path)


def test_what_is_no_picture(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png", "absent.png", "."):
        with pytest.raises(ImageError) as caught:
            load_rgb(tmp_path / name)
        assert caught.value.remedy
        assert "\n" not in caught.value.message


def test_pixel_limit_is_300_megapixels_and_pillow_keeps_its_own(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    (tmp_path / "bomb.png").write_bytes(_png(20_000, 20_000, 8, 2, []))
    with pytest.raises(ImageError, match="400 megapixels; the limit is 300"):
        load_rgb(tmp_path / "bomb.png")
    # 200 megapixels are above Pillow's own limit; this one fails only because it has no pixels.
    (tmp_path / "large.png").write_bytes(_png(20_000, 10_000, 1, 0, []))
    with pytest.raises(ImageError, match=r"truncated|cannot be read"):
        load_rgb(tmp_path / "large.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_floating_point_and_32_bit_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="floating-point"):
        load_rgb(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(ImageError, match="32-bit"):
        load_rgb(tmp_path / "int.tif")


@given(data=st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    suffix = data.draw(st.sampled_from(["png", "jpg", "gif", "webp", "tif", "bmp"]))
    path = folder / f"picture.{suffix}"
    Image.fromarray(_noise(24, 20)).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ImageError):
        assert load_rgb(path).mode == "RGB"


@pytest.mark.parametrize("shape", [(300, 400), (401, 299), (64, 64), (37, 500), (224, 224)])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (224, 0.875), (64, 1.0), (32, 0.95)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_timm(shape, size, crop_pct, interpolation):
    image = _smooth(*shape)
    transform = create_transform(
        input_size=(3, size, size),
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
    )
    ours = to_tensor(
        image, size=size, crop_pct=crop_pct, interpolation=interpolation, mean=MEAN, std=STD
    )
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, transform(image), rtol=0, atol=1e-6)


def test_equals_timm_for_an_oblong_input():
    image = _smooth(211, 307)
    transform = create_transform(
        input_size=(3, 96, 160), crop_pct=0.9, interpolation="bicubic", mean=MEAN, std=STD
    )
    ours = to_tensor(
        image, size=(96, 160), crop_pct=0.9, interpolation="bicubic", mean=MEAN, std=STD
    )
    torch.testing.assert_close(ours, transform(image), rtol=0, atol=1e-6)


def test_transform_refuses_what_makes_no_sense():
    usual = {"size": 32, "crop_pct": 0.9, "interpolation": "bicubic", "mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match="interpolation"):
        to_tensor(_smooth(40, 40), **{**usual, "interpolation": "magic"})
    with pytest.raises(ValueError, match="crop_pct"):
        to_tensor(_smooth(40, 40), **{**usual, "crop_pct": 0.0})
    with pytest.raises(ImageError, match="too narrow"):
        to_tensor(Image.new("RGB", (1, 60_000)), **{**usual, "size": 224})


def test_png_round_trip(tmp_path):
    pixels = _noise(12, 10)
    path = tmp_path / "new" / "picture.png"
    save_png(path, torch.from_numpy(pixels).permute(2, 0, 1) / 255)
    assert np.array_equal(np.asarray(load_rgb(path)), pixels)
    with pytest.raises(OutputExistsError):
        save_png(path, torch.zeros(3, 4, 4))
    first = path.read_bytes()
    save_png(path, torch.from_numpy(pixels).permute(2, 0, 1) / 255, overwrite=True)
    assert path.read_bytes() == first


def test_png_clips_and_refuses_nan(tmp_path):
    save_png(tmp_path / "a.png", torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1))
    assert load_rgb(tmp_path / "a.png").getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ImageError, match="not numbers"):
        save_png(tmp_path / "b.png", torch.full((3, 2, 2), float("nan")))
    assert not (tmp_path / "b.png").exists()


def test_contact_sheet_places_pictures_and_captions():
    images = [torch.full((3, 32, 32), value) for value in (0.0, 0.5, 1.0)]
    plain = contact_sheet(images, columns=2)
    captioned = contact_sheet(images, columns=2, captions=["zero", "half", "a caption " * 20])
    assert plain.mode == "RGB"
    assert plain.size == (16 * 2 + 192 * 2 + 10, 16 * 2 + 192 * 2 + 10)
    assert plain.getpixel((16 + 96, 16 + 96)) == (0, 0, 0)
    assert plain.getpixel((16 + 202 + 96, 16 + 96)) == (128, 128, 128)
    assert captioned.width == plain.width
    assert captioned.height == plain.height + 2 * 26
    below = captioned.crop((16, 16 + 192, 16 + 192, 16 + 192 + 26))
    assert min(low for low, _ in below.getextrema()) < 100


def test_contact_sheet_fits_any_size():
    page = contact_sheet([torch.rand(3, 500, 250), torch.rand(3, 5, 7)], columns=8)
    assert page.size == (16 * 2 + 192 * 2 + 10, 16 * 2 + 192)


def test_contact_sheet_refuses_wrong_numbers():
    with pytest.raises(ValueError, match="captions"):
        contact_sheet([torch.zeros(3, 4, 4)], captions=["a", "b"])
    with pytest.raises(ValueError, match="pictures"):
        contact_sheet([])
