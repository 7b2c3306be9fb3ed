"""What files say about their photographs, and how much of it goes on into results."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from PIL import Image

from qtool.io import exif, segments
from qtool.io.segments import Segment

TIFF_CODING_TAGS: Final = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323}
    | {324, 325, 330, 338, 339, 340, 341, 347, 529, 530, 531, 532, *range(512, 522)}
)
"""TIFF tags that say how pixels are stored, which a writer decides anew."""

_EXIF_TAG, _GPS_TAG, _ICC_TAG = 34665, 34853, 34675
# XMP, IPTC, Photoshop's own and the profile have places of their own in other formats.
_TAGS_APART = (700, 33723, 34377, _ICC_TAG)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a file says about its picture.

    Attributes:
        exif: EXIF data, without a name in front.
        xmp: The XMP packet.
        icc: The ICC profile.
        segments: For JPEG and PNG, all of it as it lies in the file, the three above included.
        tags: For TIFF, type and value of the tags that do not say how pixels are stored.
    """

    exif: bytes = b""
    xmp: bytes = b""
    icc: bytes = b""
    segments: tuple[Segment, ...] = ()
    tags: dict[int, Any] = field(default_factory=dict)


def read_metadata(image: Image.Image, content: bytes, kind: str) -> Metadata:
    """What an opened file says, before its pixels are decoded.

    Args:
        image: The file as Pillow opened it.
        content: Its bytes.
        kind: Its format, as `photos` names it.
    """
    info = image.info
    data = info.get("exif", b"")
    data = data if isinstance(data, bytes) else b""
    xmp = info.get("xmp", b"") or info.get("XML:com.adobe.xmp", b"")
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    own: tuple[Segment, ...] = ()
    tags: dict[int, Any] = {}
    if kind == "jpeg":
        own = segments.jpeg_segments(content)
    elif kind == "png":
        own = segments.png_chunks(content)
    elif kind == "tiff":
        tags = _tiff_tags(image)
        data = _exif_of_tiff(image)
    return Metadata(
        exif=data.removeprefix(segments.EXIF),
        xmp=xmp,
        icc=info.get("icc_profile") or b"",
        segments=own,
        tags=tags,
    )


def _exif_of_tiff(image: Image.Image) -> bytes:
    """The tags of a TIFF that other formats keep as EXIF data."""
    with warnings.catch_warnings(action="ignore"):
        own = Image.Exif()
        own.load(image.getexif().tobytes())
        for tag in (*TIFF_CODING_TAGS, *_TAGS_APART):
            own.pop(tag, None)
        return own.tobytes()


def _tiff_tags(image: Image.Image) -> dict[int, Any]:
    """Tags as Pillow reads them; directories below the first one as mappings of their own."""
    directory = getattr(image, "tag_v2")  # noqa: B009
    tags = {tag: value for tag, value in directory.items() if tag not in TIFF_CODING_TAGS}
    with warnings.catch_warnings(action="ignore"):
        found = image.getexif()
        for pointer in (_EXIF_TAG, _GPS_TAG):
            if pointer in tags:
                tags[pointer] = dict(found.get_ifd(pointer))
    return {tag: (directory.tagtype.get(tag), value) for tag, value in tags.items()}


def kept_metadata(metadata: Metadata, policy: Literal["keep", "strip", "no-gps"]) -> Metadata:
    """What of a file's metadata goes into the result.

    Args:
        metadata: What the source has.
        policy: `keep` for everything; `strip` for the profile and the orientation, without which
            the picture would look different; `no-gps` for everything but the place.
    """
    if policy == "keep":
        return metadata
    if policy == "strip":
        turn = exif.orientation(metadata.exif)
        return Metadata(exif=exif.orientation_only(turn) if turn != 1 else b"", icc=metadata.icc)
    try:
        data = exif.without_gps(metadata.exif) if metadata.exif else b""
    except exif.ExifError:
        # What cannot be read cannot be cleaned.
        data = b""
    return replace(
        metadata,
        exif=data,
        xmp=segments.xmp_without_gps(metadata.xmp),
        segments=tuple(filter(None, (_placeless(s, data) for s in metadata.segments))),
        tags={tag: value for tag, value in metadata.tags.items() if tag != _GPS_TAG},
    )


def _placeless(segment: Segment, data: bytes) -> Segment | None:
    if segment.data.startswith(segments.EXIF) or segment.kind == b"eXIf":
        head = b"" if segment.kind == b"eXIf" else segments.EXIF
        return Segment(segment.kind, head + data) if data else None
    if segment.data.startswith(segments.EXTENDED_XMP):
        # Its parts carry a checksum of the whole; cleaning one would break it.
        return None
    if segment.data.startswith(segments.XMP) or segment.kind in (b"iTXt", b"zTXt"):
        cleaned = segments.xmp_without_gps(segment.data)
        compressed = segment.kind == b"zTXt" or segment.data[22:23] == b"\x01"
        about_xmp = segment.data.startswith((b"XML:com.adobe.xmp", b"Raw profile type"))
        return None if compressed and about_xmp else Segment(segment.kind, cleaned)
    return segment


def without_profile(metadata: Metadata) -> Metadata:
    """Drop the profile from the parts kept as they lie in the file; `icc` stays."""
    kept = tuple(
        segment
        for segment in metadata.segments
        if not segment.data.startswith(segments.ICC)
        and segment.kind not in (b"iCCP", b"sRGB", b"cHRM", b"gAMA", b"cICP")
    )
    tags = {tag: value for tag, value in metadata.tags.items() if tag != _ICC_TAG}
    return replace(metadata, segments=kept, tags=tags)
