"""Parts of JPEG and PNG files travel byte for byte."""

import io
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qtool.io import segments


def test_jpeg_segments_come_back_as_they_were(photo_files):
    content = photo_files.jpeg(icc=photo_files.display_p3())
    own = segments.jpeg_segments(content)
    assert [s.kind for s in own] == [b"\xe1", b"\xe1", b"\xed", b"\xfe", b"\xe2"]
    assert segments.with_jpeg_segments(content, own) == content
    plain = segments.with_jpeg_segments(content, ())
    assert segments.jpeg_segments(plain) == ()
    with Image.open(io.BytesIO(content)) as first, Image.open(io.BytesIO(plain)) as second:
        assert first.tobytes() == second.tobytes()


def test_the_index_of_several_pictures_is_left_out(photo_files):
    index = segments.Segment(b"\xe2", b"MPF\x00index")
    content = segments.with_jpeg_segments(photo_files.jpeg(), [index])
    assert segments.jpeg_segments(content) == ()


def test_png_chunks_come_back_as_they_were(photo_files):
    content = photo_files.png()
    own = segments.png_chunks(content)
    assert {b"eXIf", b"prVt", b"pHYs", b"tEXt", b"iTXt"} == {chunk.kind for chunk in own}
    plain = photo_files.saved(photo_files.scene(), "PNG")
    both = segments.with_png_chunks(plain, own)
    assert segments.png_chunks(both) == own
    Image.open(io.BytesIO(both)).verify()


@pytest.mark.parametrize(
    ("kind", "change"),
    [(b"IENB", 0), (b"prVt", 1), (b"9rVt", 0), (b"pr\x00t", 0)],
    ids=["critical", "wrong checksum", "no letter", "zero byte"],
)
def test_png_chunks_that_would_spoil_a_file_stay_behind(photo_files, kind, change):
    plain = photo_files.saved(photo_files.scene(), "PNG")
    checksum = (zlib.crc32(kind + b"data") ^ change).to_bytes(4, "big")
    odd = b"\x00\x00\x00\x04" + kind + b"data" + checksum
    assert segments.png_chunks(plain[:33] + odd + plain[33:]) == segments.png_chunks(plain)


def test_profiles_are_cut_into_numbered_pieces():
    profile = bytes(range(256)) * 600
    pieces = segments.split_icc(profile)
    assert len(pieces) == 3
    assert b"".join(piece.data[14:] for piece in pieces) == profile
    assert [piece.data[12:14] for piece in pieces] == [b"\x01\x03", b"\x02\x03", b"\x03\x03"]


def test_the_place_leaves_xmp(photo_files):
    cleaned = segments.xmp_without_gps(photo_files.XMP)
    assert b"GPS" not in cleaned
    assert b"52,30" not in cleaned
    assert b'dc:title="bridge"' in cleaned


@given(st.binary(max_size=200))
def test_any_bytes_can_be_walked(content):
    segments.jpeg_segments(b"\xff\xd8" + content)
    segments.png_chunks(b"\x89PNG\r\n\x1a\n" + content)
