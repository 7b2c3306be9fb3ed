"""Photographs of every awkward kind are read and written whole."""

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from qtool.errors import ImageError, MissingError
from qtool.io import exif, photo_write, photos


def round_trip(content, kind=None, **settings):
    first = photos.read_photo(content, "in")
    written, notes = photo_write.encode(first, kind=kind or first.kind, **settings)
    return first, photos.read_photo(written, "out"), written, notes


@pytest.mark.parametrize("form", ["png", "tiff", "bmp", "lossless webp", "lzw tiff"])
def test_lossless_kinds_keep_every_bit(photo_files, form):
    content = {
        "png": photo_files.png(),
        "tiff": photo_files.saved(photo_files.scene(), "TIFF", exif=photo_files.exif(5)),
        "bmp": photo_files.saved(photo_files.scene(), "BMP"),
        "lossless webp": photo_files.saved(photo_files.scene(), "WEBP", lossless=True),
        "lzw tiff": photo_files.saved(photo_files.scene(), "TIFF", compression="tiff_lzw"),
    }[form]
    first, second, _, notes = round_trip(content)
    assert np.array_equal(first.pixels, photo_files.scene())
    assert np.array_equal(second.pixels, first.pixels)
    assert second.metadata == first.metadata
    assert notes == []


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "TIFF", "PNG", "WEBP"])
def test_orientation_is_carried_and_never_applied(photo_files, turn, form):
    settings = {"WEBP": {"lossless": True}}.get(form, {})
    content = photo_files.saved(
        photo_files.scene(), form, exif=b"Exif\x00\x00" + photo_files.exif(turn), **settings
    )
    first, second, written, _ = round_trip(content)
    assert first.pixels.shape == second.pixels.shape == (48, 64, 3)
    difference = np.abs(second.pixels.astype(int) - photo_files.scene())
    assert difference.mean() < 4
    assert exif.orientation(second.metadata.exif) == turn
    with Image.open(io.BytesIO(written)) as image:
        image.load()
        size = (48, 64) if form == "TIFF" and turn >= 5 else (64, 48)
        assert image.size == size


def test_a_jpeg_keeps_tables_subsampling_and_every_segment(photo_files):
    content = photo_files.jpeg(icc=photo_files.display_p3(), quality=96, subsampling=1)
    first, second, written, notes = round_trip(content)
    with Image.open(io.BytesIO(content)) as before, Image.open(io.BytesIO(written)) as after:
        assert before.quantization == after.quantization
        assert JpegImagePlugin.get_sampling(after) == 1
    own, kept = first.metadata.segments, second.metadata.segments
    assert own[1:] == kept[1:]
    assert len(own[0].data) == len(kept[0].data)
    assert photo_files.IPTC in kept
    assert second.metadata.icc == photo_files.display_p3()
    assert notes == []
    assert np.abs(second.pixels.astype(int) - first.pixels).mean() < 0.5


def test_the_thumbnail_shows_the_result(photo_files):
    first = photos.read_photo(photo_files.jpeg(), "in")
    black = photos.Photo(**{**vars(first), "pixels": np.zeros_like(first.pixels)})
    second = photos.read_photo(photo_write.encode(black, kind="jpeg")[0], "out")
    offset, length = exif.thumbnail(second.metadata.exif)
    with Image.open(io.BytesIO(second.metadata.exif[offset : offset + length])) as small:
        assert small.size == (16, 12)
        assert np.asarray(small).max() < 10
    assert photo_files.MAKER_NOTE in second.metadata.exif


def test_a_coarse_jpeg_is_written_with_at_least_90(photo_files):
    _, _, written, _ = round_trip(photo_files.jpeg(quality=40))
    reference = photo_files.saved(photo_files.scene(), "JPEG", quality=90)
    with Image.open(io.BytesIO(written)) as after, Image.open(io.BytesIO(reference)) as ninety:
        assert after.quantization == ninety.quantization
    _, _, written, _ = round_trip(photo_files.jpeg(quality=40), quality=60)
    with Image.open(io.BytesIO(written)) as after:
        assert after.quantization[0] != ninety.quantization[0]


def test_progressive_stays_progressive(photo_files):
    _, _, written, _ = round_trip(photo_files.jpeg(progressive=True))
    with Image.open(io.BytesIO(written)) as image:
        assert image.info["progressive"]


@pytest.mark.parametrize(
    ("mode", "channels", "alpha"),
    [("L", 1, False), ("LA", 1, True), ("RGBA", 3, True), ("P", 3, False), ("1", 1, False)],
)
def test_modes_of_png(photo_files, mode, channels, alpha):
    image = Image.fromarray(photo_files.scene()).convert("RGBA")
    image.putalpha(Image.fromarray(photo_files.scene(channels=1)[..., 0]))
    image = image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)
    first, second, _, _ = round_trip(photo_files.png(image))
    assert first.pixels.shape[2] == channels
    assert (first.alpha is not None) == alpha
    assert np.array_equal(first.pixels, second.pixels)
    if alpha:
        assert np.array_equal(first.alpha, second.alpha)


def test_a_transparent_palette_becomes_rgba(photo_files):
    image = Image.fromarray(photo_files.scene()).quantize(8)
    content = photo_files.saved(image, "PNG", transparency=0)
    first, second, _, _ = round_trip(content)
    assert set(np.unique(first.alpha)) == {0, 255}
    assert np.array_equal(first.alpha, second.alpha)


def test_sixteen_bits_of_grey_need_no_extra(photo_files, monkeypatch):
    monkeypatch.setattr(photos, "import_extra", None)
    values = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    first, second, _, _ = round_trip(photo_files.saved(values, "PNG"))
    assert np.array_equal(first.pixels[..., 0], values)
    assert np.array_equal(second.pixels, first.pixels)


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bits_of_colour_keep_every_bit(photo_files, kind, alpha):
    pytest.importorskip("pyvips")
    content = photo_files.deep(kind, alpha=alpha)
    assert photos.read_header(content, "in").deep
    first, second, _, _ = round_trip(content)
    assert first.pixels.dtype == np.uint16
    assert np.array_equal(first.pixels, second.pixels)
    assert first.metadata == second.metadata
    assert first.metadata.icc == photo_files.display_p3()
    if alpha:
        assert (second.alpha == 40_000).all()


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_without_the_extra_depth_is_never_lost_in_silence(photo_files, monkeypatch, kind):
    monkeypatch.setitem(__import__("sys").modules, "pyvips", None)
    with pytest.raises(MissingError, match=r"qtool\[photo\]") as caught:
        photos.read_photo(photo_files.deep(kind), "deep")
    assert "--bit-depth 8" in caught.value.remedy
    photo = photos.read_photo(photo_files.deep(kind), "deep", bit_depth="8")
    assert photo.pixels.dtype == np.uint8
    assert photo.notes == ("cut down to 8 bits",)


def test_deepened_values_are_exact(photo_files):
    photo = photos.deepened(photos.read_photo(photo_files.png(), "in"))
    assert photo.pixels.dtype == np.uint16
    assert np.array_equal(photo.pixels // 257, photo_files.scene())
    with pytest.raises(ImageError, match="16"):
        photo_write.encode(photo, kind="jpeg")


def test_cmyk_becomes_rgb_with_a_note(photo_files):
    first, second, _, _ = round_trip(photo_files.cmyk_jpeg())
    assert first.notes == ("CMYK colours became RGB",)
    assert np.abs(second.pixels.astype(int) - photo_files.scene()).mean() < 6
    assert second.metadata.icc[16:20] == b"RGB "


def test_heic_comes_back_upright(photo_files):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    content = photo_files.saved(photo_files.scene(), "HEIF", exif=photo_files.exif(6), quality=95)
    first, second, _, _ = round_trip(content)
    assert first.pixels.shape == second.pixels.shape == (64, 48, 3)
    assert first.metadata.exif == second.metadata.exif
    assert exif.orientation(first.metadata.exif) == 1


def test_heic_without_the_extra_names_it(photo_files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(MissingError, match=r"qtool\[photo\]"):
        photos.read_photo(b"\x00\x00\x00\x18ftypheic" + bytes(64), "photo.heic")


def test_avif_keeps_exif_byte_for_byte(photo_files):
    first = photos.read_photo(photo_files.png(), "in")
    avif, _ = photo_write.encode(first, kind="avif")
    second = photos.read_photo(avif, "out")
    assert second.metadata.exif == photo_files.exif(3)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "tiff", "png", "avif"])
def test_metadata_travel_between_kinds(photo_files, kind):
    content = photo_files.jpeg(icc=photo_files.display_p3(), orientation=8)
    _, second, _, _ = round_trip(content, kind=kind)
    assert second.metadata.icc == photo_files.display_p3()
    assert second.metadata.xmp.strip() == photo_files.XMP
    assert exif.orientation(second.metadata.exif) == 8
    read = Image.Exif()
    read.load(second.metadata.exif)
    assert read.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"


@pytest.mark.parametrize("form", ["jpeg", "png", "tiff", "webp"])
def test_the_place_can_be_taken_out(photo_files, form):
    content = {
        "jpeg": photo_files.jpeg(),
        "png": photo_files.png(),
        "tiff": photo_files.saved(photo_files.scene(), "TIFF", exif=photo_files.exif(2)),
        "webp": photo_files.saved(
            photo_files.scene(), "WEBP", exif=photo_files.exif(2), xmp=photo_files.XMP
        ),
    }[form]
    first = photos.read_photo(content, "in")
    cleaned = photos.kept_metadata(first.metadata, "no-gps")
    clean = photos.Photo(**{**vars(first), "metadata": cleaned})
    written, _ = photo_write.encode(clean, kind=first.kind)
    assert b"52,30" not in written
    second = photos.read_photo(written, "out")
    read = Image.Exif()
    read.load(second.metadata.exif)
    assert not any(read.get_ifd(0x8825).values())
    assert read.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_stripping_leaves_orientation_and_profile(photo_files, form):
    made = {"jpeg": photo_files.jpeg(icc=photo_files.display_p3()), "png": photo_files.png()}
    first = photos.read_photo(made[form], "in")
    bare = photos.Photo(
        **{**vars(first), "metadata": photos.kept_metadata(first.metadata, "strip")}
    )
    second = photos.read_photo(photo_write.encode(bare, kind=first.kind)[0], "out")
    assert exif.orientation(second.metadata.exif) == exif.orientation(first.metadata.exif)
    assert second.metadata.icc == first.metadata.icc
    assert second.metadata.xmp == b""
    assert b"Photoshop" not in b"".join(s.data for s in second.metadata.segments)


def test_transparency_in_a_jpeg_is_put_on_white(photo_files):
    image = Image.fromarray(photo_files.scene()).convert("RGBA")
    image.putalpha(0)
    _, second, _, notes = round_trip(photo_files.png(image), kind="jpeg")
    assert notes == ["transparent parts were put on white"]
    assert second.pixels.min() > 250


@pytest.mark.parametrize("form", ["TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused_unless_the_first_will_do(photo_files, form):
    frames = [Image.fromarray(photo_files.scene(seed=seed)) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="3 frames") as caught:
        photos.read_photo(buffer.getvalue(), "frames")
    assert "--first-frame" in caught.value.remedy
    photo = photos.read_photo(buffer.getvalue(), "frames", first_frame=True)
    assert photo.notes == ("the first of 3 frames",)


@pytest.mark.parametrize("content", [b"", b"text", b"GIF89a", b"\xff\xd8\xff\xe0"])
def test_what_is_no_photograph_is_an_error(content):
    with pytest.raises(ImageError):
        photos.read_photo(content, "x.jpg")


def test_a_truncated_file_is_an_error(photo_files):
    content = photo_files.jpeg(photo_files.scene(200, 300))
    with pytest.raises(ImageError, match="cannot be read"):
        photos.read_photo(content[: len(content) * 2 // 3], "cut.jpg")


def test_more_than_300_megapixels_are_an_error(photo_files):
    content = bytearray(photo_files.png())
    content[16:24] = (20_000).to_bytes(4, "big") * 2
    content[29:33] = __import__("zlib").crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(ImageError, match="400 megapixels"):
        photos.read_header(bytes(content), "huge.png")
