"""The parts of JPEG and PNG files that are not pixels, carried over byte for byte.

Pillow drops some of them on the way (IPTC, extended XMP, private chunks) and rewrites others, so
files are written without any and get those of their source put in.

Reference: ITU-T T.81, annex B; PNG specification (third edition), section 5.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

EXIF = b"Exif\x00\x00"
XMP = b"http://ns.adobe.com/xap/1.0/\x00"
EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\x00"
ICC = b"ICC_PROFILE\x00"
PHOTOSHOP = b"Photoshop 3.0\x00"
_MULTI_PICTURE = b"MPF\x00"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# These say how pixels are stored, which the encoder decides anew, or belong to an animation.
_PNG_PIXELS = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"bKGD", b"hIST", b"sBIT", b"sPLT"}
    | {b"acTL", b"fcTL", b"fdAT"}
)
_LARGEST_SEGMENT = 65_533
_GPS_IN_XMP = re.compile(
    rb"""\s+exif:GPS\w+\s*=\s*("[^"]*"|'[^']*')|<exif:(GPS\w+)\b[^>]*?(/>|>.*?</exif:\2\s*>)""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Segment:
    """A JPEG segment with a payload, or a PNG chunk.

    Attributes:
        kind: The JPEG marker byte as one byte, such as APP1's 0xE1, or the PNG chunk's type.
        data: What it holds.
    """

    kind: bytes
    data: bytes


def jpeg_segments(content: bytes) -> tuple[Segment, ...]:
    """Application data and comments of a JPEG file, in order.

    Left out are what describes the coding (JFIF's own and Adobe's segment) and the index of a file
    of several pictures, whose offsets would point nowhere.
    """
    return tuple(
        segment
        for segment, _ in _walk_jpeg(content)
        if _is_metadata(segment) and not segment.data.startswith(_MULTI_PICTURE)
    )


def with_jpeg_segments(content: bytes, segments: Iterable[Segment]) -> bytes:
    """A JPEG file with its application data and comments replaced."""
    own, end = [], 2
    for segment, after in _walk_jpeg(content):
        if not (_is_metadata(segment) or segment.kind in (b"\xe0", b"\xee")):
            break
        if not _is_metadata(segment):
            own.append(segment)
        end = after
    parts = [b"\xff\xd8"]
    for segment in (*own, *segments):
        size = len(segment.data) + 2
        parts += [b"\xff" + segment.kind, size.to_bytes(2, "big"), segment.data]
    return b"".join((*parts, content[end:]))


def split(kind: bytes, head: bytes, data: bytes) -> list[Segment]:
    """Segments for data with a name in front, such as EXIF; empty if they do not fit into one."""
    if not data or len(head) + len(data) > _LARGEST_SEGMENT:
        return []
    return [Segment(kind, head + data)]


def split_icc(profile: bytes) -> list[Segment]:
    """The numbered segments that hold an ICC profile."""
    room = _LARGEST_SEGMENT - len(ICC) - 2
    pieces = [profile[start : start + room] for start in range(0, len(profile), room)]
    return [
        Segment(b"\xe2", ICC + bytes((index, len(pieces))) + piece)
        for index, piece in enumerate(pieces, start=1)
    ]


def png_chunks(content: bytes) -> tuple[Segment, ...]:
    """Chunks of a PNG file that say something about the picture, in order.

    Damaged ones are left out, and so is what only its own decoder could understand: a critical
    chunk that is put where it does not belong makes a file unreadable.
    """
    found = []
    position = len(_PNG_SIGNATURE)
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        data = content[position + 8 : position + 8 + length]
        checksum = content[position + 8 + length : position + 12 + length]
        position += 12 + length
        whole = zlib.crc32(kind + data).to_bytes(4, "big") == checksum
        if whole and kind not in _PNG_PIXELS and kind.isalpha() and kind[:1].islower():
            found.append(Segment(kind, data))
    return tuple(found)


def with_png_chunks(content: bytes, chunks: Iterable[Segment]) -> bytes:
    """A PNG file with chunks put in behind its header."""
    after_header = len(_PNG_SIGNATURE) + 25
    parts = [content[:after_header]]
    for chunk in chunks:
        body = chunk.kind + chunk.data
        checksum = zlib.crc32(body).to_bytes(4, "big")
        parts += [len(chunk.data).to_bytes(4, "big"), body, checksum]
    return b"".join((*parts, content[after_header:]))


def xmp_without_gps(xmp: bytes) -> bytes:
    """XMP without the properties that say where a picture was taken."""
    return _GPS_IN_XMP.sub(b"", xmp)


def _is_metadata(segment: Segment) -> bool:
    marker = segment.kind[0]
    return (0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE


def _walk_jpeg(content: bytes) -> Iterable[tuple[Segment, int]]:
    """Segments up to the first scan, each with the position behind it."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in (0xDA, 0xD9):
            return
        size = int.from_bytes(content[position + 2 : position + 4], "big")
        if size < 2 or position + 2 + size > len(content):
            return
        data = content[position + 4 : position + 2 + size]
        position += 2 + size
        yield Segment(bytes((marker,)), data), position
