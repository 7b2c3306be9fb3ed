"""Photographs read so that nothing is lost: depth, transparency, profile, metadata, coding.

Pixels stay as they are stored. The orientation is a tag that is carried over, never applied, and
colours stay in the encoding of their profile.
"""

from __future__ import annotations

import importlib
import io
import struct
import warnings
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, JpegImagePlugin, UnidentifiedImageError

from qtool.errors import ImageError, MissingError
from qtool.io import exif, segments
from qtool.io.images import MAX_PIXELS, unlimited_pixels
from qtool.io.segments import Segment

Kind = Literal["jpeg", "png", "tiff", "webp", "bmp", "heif", "avif"]
BitDepth = Literal["keep", "8", "16"]
Pixels = NDArray[np.uint8] | NDArray[np.uint16]

SUFFIXES: Final[dict[str, Kind]] = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jfif": "jpeg",
    ".png": "png",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".webp": "webp",
    ".bmp": "bmp",
    ".heic": "heif",
    ".heif": "heif",
    ".avif": "avif",
}
"""The files that are photographs, by suffix."""

DEEP: Final = ("png", "tiff")
"""Kinds that can hold 16 bits."""

_FORMATS: Final[dict[str, Kind]] = {
    "JPEG": "jpeg",
    "MPO": "jpeg",
    "PNG": "png",
    "TIFF": "tiff",
    "WEBP": "webp",
    "BMP": "bmp",
    "HEIF": "heif",
    "AVIF": "avif",
}
TIFF_CODING_TAGS: Final = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323}
    | {324, 325, 330, 338, 339, 340, 341, 347, 529, 530, 531, 532, *range(512, 522)}
)
"""TIFF tags that say how pixels are stored, which a writer decides anew."""

_TURNED_BACK: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_PHOTO_EXTRA = "pip install 'qtool[photo]'"
_BITS_TAG, _SAMPLE_FORMAT_TAG, _EXIF_TAG, _GPS_TAG, _ICC_TAG = 258, 339, 34665, 34853, 34675
_ORIENTATION_TAG = 274
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


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How the source was compressed, so that the result can be alike.

    Attributes:
        tables: A JPEG's quantisation tables by number, each of 64 in zigzag order.
        subsampling: A JPEG's chroma subsampling as Pillow numbers it; -1 for an unusual one.
        progressive: Whether a JPEG is progressive.
        lossless: Whether a WebP is lossless.
        compressed: Whether a TIFF is compressed.
    """

    tables: dict[int, list[int]] = field(default_factory=dict)
    subsampling: int = -1
    progressive: bool = False
    lossless: bool = False
    compressed: bool = True


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph as it is stored.

    Attributes:
        pixels: (H, W, 1) grey or (H, W, 3) RGB, uint8 or uint16.
        alpha: (H, W) of the same type, or None.
        kind: The format of its file.
        metadata: What the file says about it.
        coding: How it was compressed.
        notes: What could not be kept, in words for people.
    """

    pixels: Pixels
    alpha: Pixels | None
    kind: Kind
    metadata: Metadata
    coding: Coding
    notes: tuple[str, ...] = ()

    @property
    def top(self) -> int:
        """The largest value, 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What can be told before any pixel is decoded.

    Attributes:
        kind: The format.
        width: Stored width.
        height: Stored height.
        deep: Whether its colours have more than 8 bits each.
    """

    kind: Kind
    width: int
    height: int
    deep: bool


def read_header(content: bytes, name: str) -> Header:
    """Look at a file without decoding it.

    Args:
        content: The bytes of the file.
        name: What to call it in errors.

    Raises:
        ImageError: It is no picture of a kind in `SUFFIXES`, or above the limit of pixels.
        MissingError: It needs the `photo` extra.
    """
    image = _open(content, name)
    deep = _bits(image, content) > 8
    return Header(
        kind=_FORMATS[image.format or ""], width=image.width, height=image.height, deep=deep
    )


def read_photo(
    content: bytes, name: str, *, bit_depth: BitDepth = "keep", first_frame: bool = False
) -> Photo:
    """Decode a photograph.

    Args:
        content: The bytes of the file.
        name: What to call it in errors.
        bit_depth: `8` cuts deeper pictures down; anything else keeps what is there.
        first_frame: Whether the first of several frames or pages will do.

    Raises:
        ImageError: It is no picture, damaged, too large, or holds several frames.
        MissingError: It has more than 8 bits or is a HEIC file, and the `photo` extra is absent.
    """
    image = _open(content, name)
    kind = _FORMATS[image.format or ""]
    notes: list[str] = []
    try:
        _check_frames(image, name, first_frame=first_frame, notes=notes)
        _check_depth(image, content, kind, name, bit_depth)
        metadata = _metadata(image, content, kind)
        coding = _coding(image, content, kind)
        if _bits(image, content) > 8 and bit_depth != "8" and not image.mode.startswith("I"):
            pixels, alpha = _read_deep(content, name)
        else:
            pixels, alpha, metadata = _pixels(_loaded(image), metadata, name, notes)
            if bit_depth == "8" and pixels.dtype == np.uint16:
                pixels = _eight_bits(pixels)
                notes.append("cut down to 8 bits")
            elif bit_depth == "8" and _bits(image, content) > 8:
                notes.append("cut down to 8 bits")
    except (ImageError, MissingError):
        raise
    # Decoders answer a damaged file with almost any exception.
    except Exception as error:
        raise _unreadable(name, error) from error
    return Photo(
        pixels=pixels,
        alpha=alpha,
        kind=kind,
        metadata=metadata,
        coding=coding,
        notes=tuple(notes),
    )


def deepened(photo: Photo) -> Photo:
    """The same photograph with 16 bits."""
    if photo.pixels.dtype == np.uint16:
        return photo
    alpha = None if photo.alpha is None else photo.alpha.astype(np.uint16) * np.uint16(257)
    return replace(photo, pixels=photo.pixels.astype(np.uint16) * np.uint16(257), alpha=alpha)


def import_extra(module: str, why: str, otherwise: str = "") -> ModuleType:
    """Import a package of the `photo` extra.

    Raises:
        MissingError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise MissingError(
            f"{why} needs the extra qtool[photo] ({module.partition('.')[0]} is not installed)",
            remedy=f"install it with `{_PHOTO_EXTRA}`{otherwise}",
        ) from error


def _open(content: bytes, name: str) -> Image.Image:
    if content[4:8] == b"ftyp" and content[8:12] not in (b"avif", b"avis"):
        import_extra("pillow_heif", f"{name} is a HEIC picture and").register_heif_opener()
    try:
        with unlimited_pixels():
            image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not a picture that can be read", remedy="convert it to PNG or JPEG"
        ) from error
    except Exception as error:
        raise _unreadable(name, error) from error
    if image.format not in _FORMATS:
        raise ImageError(
            f"{name} is a {image.format} file, which is not restored",
            remedy="convert it to PNG or JPEG",
        )
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {image.width * image.height / 1e6:.0f} megapixels; "
            f"the limit is {MAX_PIXELS / 1e6:.0f}",
            remedy="make it smaller first",
        )
    return image


def _unreadable(name: str, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{name} cannot be read: {reason[:120]}", remedy="the file may be damaged")


def _check_frames(image: Image.Image, name: str, *, first_frame: bool, notes: list[str]) -> None:
    frames = int(getattr(image, "n_frames", 1))
    if frames <= 1:
        return
    # Telephones write MPO: one photograph, then a preview, a depth or a gain map.
    if image.format == "MPO":
        notes.append("further pictures in the file (preview, depth or gain map) are not kept")
    elif first_frame:
        notes.append(f"the first of {frames} frames")
    else:
        raise ImageError(
            f"{name} holds {frames} frames or pages",
            remedy="take the first of each with --first-frame",
        )


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of one sample as the file has them, which may be more than Pillow gives."""
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return int(max(getattr(image, "tag_v2").get(_BITS_TAG, (1,))))  # noqa: B009
    if image.format in ("HEIF", "AVIF"):
        # The box that lists the depth of each channel, in the file's own header.
        place = content.find(b"pixi", 0, 65536)
        return content[place + 9] if 0 <= place < len(content) - 9 else 8
    return 8


def _check_depth(
    image: Image.Image, content: bytes, kind: Kind, name: str, bit_depth: BitDepth
) -> None:
    bits = _bits(image, content)
    if bits <= 8 or bit_depth == "8":
        return
    if kind in ("heif", "avif"):
        raise ImageError(
            f"{name} has {bits} bits per colour, which cannot be written back",
            remedy="accept 8 with --bit-depth 8",
        )
    if kind == "tiff" and (
        bits != 16 or set(getattr(image, "tag_v2").get(_SAMPLE_FORMAT_TAG, (1,))) != {1}  # noqa: B009
    ):
        raise ImageError(
            f"{name} has pixels of {bits} bits of another kind than whole numbers of 16",
            remedy="convert it to a 16-bit TIFF or PNG",
        )
    if not image.mode.startswith("I"):
        import_extra(
            "pyvips", f"{name} has 16 bits per colour and", ", or accept 8 with --bit-depth 8"
        )


def _metadata(image: Image.Image, content: bytes, kind: Kind) -> Metadata:
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


def _coding(image: Image.Image, content: bytes, kind: Kind) -> Coding:
    if kind == "jpeg":
        return Coding(
            tables={n: list(t) for n, t in getattr(image, "quantization").items()},  # noqa: B009
            subsampling=JpegImagePlugin.get_sampling(image),
            progressive=bool(image.info.get("progressive")),
        )
    if kind == "webp":
        return Coding(lossless=b"VP8L" in (content[12:16], *_webp_chunks(content)))
    return Coding(compressed=image.info.get("compression", "raw") != "raw")


def _webp_chunks(content: bytes) -> list[bytes]:
    found, position = [], 12
    while position + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, position)
        found.append(kind)
        position += 8 + size + size % 2
    return found


def _read_deep(content: bytes, name: str) -> tuple[Pixels, Pixels | None]:
    vips = import_extra("pyvips", f"{name} has 16 bits per colour and")
    image = vips.Image.new_from_buffer(content, "", access="sequential")
    if image.format != "ushort":
        image = image.cast("ushort")
    pixels: NDArray[np.uint16] = image.numpy().reshape(image.height, image.width, -1)
    bands = pixels.shape[2]
    if bands not in (1, 2, 3, 4):
        raise ImageError(f"{name} has {bands} channels", remedy="convert it to RGB")
    if bands == 4 and image.interpretation == "cmyk":
        raise ImageError(f"{name} has CMYK colours of 16 bits", remedy="convert it to RGB")
    colours = 3 if bands >= 3 else 1
    alpha = np.ascontiguousarray(pixels[..., -1]) if bands in (2, 4) else None
    return np.ascontiguousarray(pixels[..., :colours]), alpha


def _loaded(image: Image.Image) -> Image.Image:
    """Decode, undoing the turn that Pillow gives TIFF files and no others."""
    turn = int(getattr(image, "tag_v2", {}).get(_ORIENTATION_TAG, 1))
    image.load()
    back = _TURNED_BACK.get(turn)
    return image if back is None else image.transpose(back)


def _pixels(
    image: Image.Image, metadata: Metadata, name: str, notes: list[str]
) -> tuple[Pixels, Pixels | None, Metadata]:
    """Pixels and transparency as Pillow decodes them; CMYK and palettes become RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has 32-bit pixels", remedy="convert it to a 16-bit PNG")
        return values.astype(np.uint16)[..., None], None, metadata
    if image.mode == "F":
        raise ImageError(
            f"{name} has floating-point pixels of unknown range", remedy="convert it to PNG"
        )
    if image.mode in ("CMYK", "LAB", "YCbCr"):
        image, metadata = _as_srgb(image, metadata, notes)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("L", "LA", "1") else "RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    values = np.asarray(image)
    if image.mode in ("LA", "RGBA"):
        return values[..., :-1], values[..., -1], metadata
    return values.reshape(image.height, image.width, -1), None, metadata


def _as_srgb(
    image: Image.Image, metadata: Metadata, notes: list[str]
) -> tuple[Image.Image, Metadata]:
    """Convert CMYK or Lab by its profile, which then no longer fits and is replaced."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    mode = image.mode
    if mode == "CMYK" and metadata.icc:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(metadata.icc))
            converted = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
            image = converted if converted is not None else image
        except (ImageCms.PyCMSError, OSError):
            image = image.convert("RGB")
    elif mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        image = converted if converted is not None else image
    else:
        image = image.convert("RGB")
    notes.append(f"{mode} colours became RGB")
    profile = srgb.tobytes()
    # Without the time it was made at, so that the same picture gives the same file.
    profile = profile[:24] + bytes(12) + profile[36:]
    return image, without_profile(replace(metadata, icc=profile))


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


def _eight_bits(values: Pixels) -> NDArray[np.uint8]:
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


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
