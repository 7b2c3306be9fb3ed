"""EXIF data are changed in place, and every other byte stays."""

import contextlib
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qtool.io import exif


def test_orientation_is_read_and_made(photo_files):
    for value in range(1, 9):
        assert exif.orientation(photo_files.exif(value)) == value
        assert exif.orientation(exif.orientation_only(value)) == value
    made = Image.Exif()
    made.load(exif.orientation_only(6))
    assert dict(made) == {0x0112: 6}


def test_the_place_is_gone_and_nothing_else(photo_files):
    before = photo_files.exif(6)
    after = exif.without_gps(before)
    assert len(after) == len(before)
    assert struct.pack(">6I", 52, 1, 30, 1, 5, 1) in before
    assert struct.pack(">6I", 52, 1, 30, 1, 5, 1) not in after
    read = Image.Exif()
    read.load(after)
    assert dict(read.get_ifd(0x8825)) == {}
    assert read.get_ifd(0x8769)[0x927C] == photo_files.MAKER_NOTE
    changed = [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    assert changed[-1] - changed[0] < 2 + 2 * 12 + 4 + 24


def test_a_thumbnail_is_found_and_replaced_in_its_place(photo_files):
    before = photo_files.exif(1)
    offset, length = exif.thumbnail(before)
    assert Image.open(io.BytesIO(before[offset : offset + length])).size == (16, 12)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (9, 9, 9)).save(buffer, "JPEG")
    after = exif.with_thumbnail(before, buffer.getvalue())
    assert len(after) == len(before)
    assert exif.thumbnail(after) == (offset, buffer.tell())
    with pytest.raises(exif.ExifError):
        exif.with_thumbnail(before, bytes(length + 1))
    assert exif.thumbnail(photo_files.exif(1, thumbnail=False)) is None


@given(
    st.binary(max_size=80) | st.binary(max_size=40).map(lambda tail: b"II*\x00\x08\0\0\0" + tail)
)
def test_what_cannot_be_followed_is_an_error(data):
    assert 1 <= exif.orientation(data) <= 8
    exif.thumbnail(data)
    with contextlib.suppress(exif.ExifError):
        assert len(exif.without_gps(data)) == len(data)


@given(st.data())
def test_damaged_data_never_lose_their_length(photo_files, data):
    content = bytearray(photo_files.exif(3))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 200))] = data.draw(st.integers(0, 255))
    exif.thumbnail(bytes(content))
    with contextlib.suppress(exif.ExifError):
        assert len(exif.without_gps(bytes(content))) == len(content)
