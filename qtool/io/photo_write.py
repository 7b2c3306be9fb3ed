"""Photographs written the way their source was: same coding, same metadata, same depth."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from qtool.errors import ImageError
from qtool.io import exif, segments
from qtool.io.photos import (
    DEEP,
    TIFF_CODING_TAGS,
    Coding,
    Kind,
    Metadata,
    Photo,
    Pixels,
    import_extra,
)
from qtool.io.segments import Segment

LEAST_QUALITY = 90
"""A JPEG whose source was coded with less is written with this."""

# A lossy WebP, AVIF or HEIC does not say how it was coded.
_WEBP_QUALITY, _AVIF_QUALITY, _HEIF_QUALITY = 95, 90, 90
_ZLIB_LEVEL = 4
_STRIP_BYTES = 1 << 20
_LONG, _SHORT, _BYTE, _UNDEFINED = 4, 3, 1, 7
_XMP_TAG, _ICC_TAG = 700, 34675


def encode(photo: Photo, *, kind: Kind, quality: int | None = None) -> tuple[bytes, list[str]]:
    """Write a photograph into bytes.

    Args:
        photo: What to write; its metadata are those the file gets, its `kind` and `coding` those
            of its source.
        kind: The format to write.
        quality: 1 to 100 for lossy formats; None keeps the source's tables and subsampling, or
            takes 90 where the source had less.

    Returns:
        The file, and what could not be kept, in words for people.

    Raises:
        ImageError: The encoder refuses the picture.
        MissingError: A package of the `photo` extra is needed.
    """
    notes: list[str] = []
    if photo.pixels.dtype == np.uint16 and kind not in DEEP:
        raise ImageError(
            f"{kind} files hold 8 bits per colour, and this picture has 16",
            remedy="write png or tiff with --format, or accept 8 with --bit-depth 8",
        )
    try:
        if kind == "jpeg":
            return _jpeg(photo, quality, notes), notes
        if kind == "png":
            return _png(photo, notes), notes
        if kind == "tiff":
            return _tiff(photo, notes), notes
        return _simple(photo, kind, quality, notes), notes
    except (OSError, ValueError) as error:
        raise ImageError(f"the result cannot be written as {kind}: {error}") from error


class _WholeExif(Image.Exif):
    """EXIF data that the AVIF encoder may look into, and gets back byte for byte."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._whole = data
        self.load(data)

    def tobytes(self, offset: int = 8) -> bytes:
        """The data as they were."""
        return segments.EXIF + self._whole


def _image(pixels: Pixels, alpha: Pixels | None) -> Image.Image:
    bands = pixels if alpha is None else np.concatenate((pixels, alpha[..., None]), axis=2)
    return Image.fromarray(bands[..., 0] if bands.shape[2] == 1 else np.ascontiguousarray(bands))


def _jpeg(photo: Photo, quality: int | None, notes: list[str]) -> bytes:
    pixels = photo.pixels
    if photo.alpha is not None:
        share = photo.alpha[..., None].astype(np.float32) / 255
        pixels = np.rint(pixels * share + 255 * (1 - share)).astype(np.uint8)
        notes.append("transparent parts were put on white")
    buffer = io.BytesIO()
    settings = _jpeg_settings(photo.coding, quality)
    if pixels.shape[2] == 1:
        settings.pop("subsampling", None)
        tables = settings.get("qtables")
        if tables:
            settings["qtables"] = tables[:1]
    _image(pixels, None).save(buffer, "JPEG", **settings)
    metadata = _with_new_thumbnail(photo.metadata, pixels)
    return segments.with_jpeg_segments(
        buffer.getvalue(), jpeg_segments(metadata, native=photo.kind == "jpeg", notes=notes)
    )


def _jpeg_settings(coding: Coding, quality: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"progressive": True} if coding.progressive else {}
    if quality is not None:
        return {**settings, "quality": quality}
    if coding.subsampling >= 0:
        settings["subsampling"] = coding.subsampling
    tables = [coding.tables[number] for number in sorted(coding.tables)]
    if not tables or not _is_fine(tables):
        return {**settings, "quality": LEAST_QUALITY if tables else 95}
    return {**settings, "qtables": tables}


def _is_fine(tables: list[list[int]]) -> bool:
    """Whether tables are no coarser on the whole than those of the least quality."""
    probe = io.BytesIO()
    Image.new("RGB", (8, 8)).save(probe, "JPEG", quality=LEAST_QUALITY)
    probe.seek(0)
    with Image.open(probe) as image:
        bounds = list(image.quantization.values())  # type: ignore[attr-defined]
    pairs = zip(tables, [bounds[0], *bounds[1:] * 3], strict=False)
    return all(sum(own) <= sum(bound) for own, bound in pairs)


def jpeg_segments(metadata: Metadata, *, native: bool, notes: list[str]) -> list[Segment]:
    """The segments of a JPEG file that hold metadata.

    Args:
        metadata: What the file gets.
        native: Whether they come from a JPEG file, so that its segments are taken as they are.
        notes: Gets a line for what does not fit.
    """
    kept = list(metadata.segments) if native else []
    if metadata.exif and not any(s.data.startswith(segments.EXIF) for s in kept):
        own = segments.split(b"\xe1", segments.EXIF, metadata.exif)
        if not own:
            notes.append("EXIF data are too long for a JPEG file")
        kept = own + kept
    if metadata.xmp and not any(s.data.startswith(segments.XMP) for s in kept):
        own = segments.split(b"\xe1", segments.XMP, metadata.xmp)
        if not own:
            notes.append("XMP data are too long for a JPEG file")
        kept += own
    if metadata.icc and not any(s.data.startswith(segments.ICC) for s in kept):
        kept += segments.split_icc(metadata.icc)
    return kept


def _with_new_thumbnail(metadata: Metadata, pixels: Pixels) -> Metadata:
    """Draw the thumbnail in EXIF data anew if there is one and the new one fits in its place."""
    place = exif.thumbnail(metadata.exif)
    if place is None:
        return metadata
    offset, length = place
    with Image.open(io.BytesIO(metadata.exif[offset : offset + length])) as old:
        size = old.size
    step = max(1, min(pixels.shape[0] // (2 * size[1]), pixels.shape[1] // (2 * size[0])))
    small = _image(pixels[::step, ::step], None)
    small = small.convert("RGB").resize(size, Image.Resampling.BOX)
    for quality in (85, 70, 50, 30, 10):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= length:
            changed = exif.with_thumbnail(metadata.exif, buffer.getvalue())
            own = tuple(
                Segment(s.kind, segments.EXIF + changed)
                if s.data == segments.EXIF + metadata.exif
                else s
                for s in metadata.segments
            )
            return replace(metadata, exif=changed, segments=own)
    return metadata


def _png(photo: Photo, notes: list[str]) -> bytes:
    if photo.pixels.dtype == np.uint16:
        content = _deep_png(photo)
    else:
        buffer = io.BytesIO()
        _image(photo.pixels, photo.alpha).save(buffer, "PNG", compress_level=_ZLIB_LEVEL)
        content = buffer.getvalue()
    metadata = photo.metadata
    kept = list(metadata.segments) if photo.kind == "png" else []
    kinds = {chunk.kind for chunk in kept}
    if metadata.icc and not kinds & {b"iCCP"}:
        kept.insert(0, Segment(b"iCCP", b"ICC\x00\x00" + zlib.compress(metadata.icc)))
    if metadata.exif and b"eXIf" not in kinds:
        kept.append(Segment(b"eXIf", metadata.exif))
    if metadata.xmp and not any(s.data.startswith(b"XML:com.adobe.xmp") for s in kept):
        kept.append(Segment(b"iTXt", b"XML:com.adobe.xmp\x00\x00\x00\x00\x00" + metadata.xmp))
    return segments.with_png_chunks(content, kept)


def _deep_png(photo: Photo) -> bytes:
    """A PNG of 16 bits; every row holds differences to the sample on its left."""
    alpha = () if photo.alpha is None else (photo.alpha[..., None],)
    bands = np.concatenate((photo.pixels, *alpha), axis=2).astype(">u2")
    height, width, channels = bands.shape
    raw = np.ascontiguousarray(bands).view(np.uint8).reshape(height, -1)
    rows = np.empty((height, raw.shape[1] + 1), np.uint8)
    rows[:, 0] = 1
    rows[:, 1:] = raw
    rows[:, 1 + 2 * channels :] -= raw[:, : -2 * channels]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = b"".join((width.to_bytes(4, "big"), height.to_bytes(4, "big"), bytes((16, colour))))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", header + bytes(3)),
        (b"IDAT", zlib.compress(rows.tobytes(), _ZLIB_LEVEL)),
        (b"IEND", b""),
    ):
        body = kind + data
        content += len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return content


def _tiff(photo: Photo, notes: list[str]) -> bytes:
    """A TIFF of strips, plain or with Deflate, with all tags of a TIFF source."""
    alpha = () if photo.alpha is None else (photo.alpha[..., None],)
    bands = np.concatenate((photo.pixels, *alpha), axis=2)
    height, width, channels = bands.shape
    compressed = photo.kind != "tiff" or photo.coding.compressed
    if compressed:
        bands[:, 1:] -= bands[:, :-1].copy()
    rows = max(1, _STRIP_BYTES // bands[0].nbytes)
    little = bands.astype(bands.dtype.newbyteorder("<"))
    strips = [little[top : top + rows].tobytes() for top in range(0, height, rows)]
    if compressed:
        strips = [zlib.compress(strip, _ZLIB_LEVEL) for strip in strips]
    sizes = [len(strip) for strip in strips]
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    fields: dict[int, tuple[int, Any]] = {
        256: (_LONG, width),
        257: (_LONG, height),
        258: (_SHORT, (8 * bands.dtype.itemsize,) * channels),
        259: (_SHORT, 8 if compressed else 1),
        262: (_SHORT, 2 if channels >= 3 else 1),
        273: (_LONG, tuple(int(n) for n in np.cumsum([0, *sizes[:-1]]))),
        277: (_SHORT, channels),
        278: (_LONG, rows),
        279: (_LONG, tuple(sizes)),
        284: (_SHORT, 1),
        317: (_SHORT, 2 if compressed else 1),
        339: (_SHORT, (1,) * channels),
    }
    if photo.alpha is not None:
        fields[338] = (_SHORT, 2)
    for tag, (field, value) in {**_tiff_metadata(photo.metadata, notes), **fields}.items():
        directory.tagtype[tag] = field
        directory[tag] = value
    buffer = io.BytesIO()
    directory.save(buffer)
    for strip in strips:
        buffer.write(strip)
    return buffer.getvalue()


def _tiff_metadata(metadata: Metadata, notes: list[str]) -> dict[int, tuple[int, Any]]:
    fields = {
        tag: (_LONG if isinstance(value, dict) else field, value)
        for tag, (field, value) in metadata.tags.items()
        if field is not None
    }
    if not fields and metadata.exif:
        own = Image.Exif()
        own.load(metadata.exif)
        for tag, value in own.items():
            if tag not in TIFF_CODING_TAGS and tag not in (34665, 34853):
                fields[tag] = (_SHORT if isinstance(value, int) else 2, value)
        for pointer in (34665, 34853):
            inner = own.get_ifd(pointer)
            if inner:
                fields[pointer] = (_LONG, dict(inner))
    if metadata.xmp:
        fields[_XMP_TAG] = (_BYTE, metadata.xmp)
    if metadata.icc:
        fields[_ICC_TAG] = (_UNDEFINED, metadata.icc)
    return fields


def _simple(photo: Photo, kind: Kind, quality: int | None, notes: list[str]) -> bytes:
    """WebP, AVIF, HEIC and BMP, whose encoders take metadata as they are."""
    metadata = photo.metadata
    settings: dict[str, Any] = {}
    for name, value in (
        ("exif", metadata.exif),
        ("xmp", metadata.xmp),
        ("icc_profile", metadata.icc),
    ):
        if value and kind != "bmp":
            settings[name] = value
    if kind == "bmp" and (metadata.exif or metadata.xmp or metadata.icc) and photo.kind != "bmp":
        notes.append("BMP files hold no metadata and no profile")
    if kind == "webp":
        lossless = photo.kind == "webp" and photo.coding.lossless and quality is None
        settings |= {"lossless": True} if lossless else {"quality": quality or _WEBP_QUALITY}
    elif kind == "avif":
        settings["quality"] = quality or _AVIF_QUALITY
        if metadata.exif:
            settings["exif"] = _WholeExif(metadata.exif)
    elif kind == "heif":
        import_extra("pillow_heif", "writing HEIC").register_heif_opener()
        settings["quality"] = quality or _HEIF_QUALITY
    buffer = io.BytesIO()
    image = _image(photo.pixels, photo.alpha)
    if kind in ("webp", "heif") and image.mode == "LA":
        image = image.convert("RGBA")
    image.save(buffer, kind.upper(), **settings)
    return buffer.getvalue()
