"""Photographs with awkward traits, made on the spot."""

import io
import struct

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from qtool.io import photo_write, photos
from qtool.io.segments import Segment, with_jpeg_segments, with_png_chunks

XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:exif="http://ns.adobe.com/exif/1.0/" exif:GPSLatitude="52,30.5N" dc:title="bridge">'
    b"<exif:GPSLongitude>13,22.1E</exif:GPSLongitude></rdf:Description></rdf:RDF></x:xmpmeta>"
)
IPTC = Segment(
    b"\xed", b"Photoshop 3.0\x008BIM\x04\x04\x00\x00\x00\x00\x00\x08\x1c\x02x\x00\x03sea"
)
MAKER_NOTE = b"\x00\x01maker's own bytes\xff" * 3


def scene(height=48, width=64, *, seed=0, channels=3):
    """A picture with colour gradients and a little noise, 8 bits."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 200 / width, y * 200 / height, (x + y) * 200 / (height + width)]
    values = np.stack(planes[:channels], axis=-1) + 20 + rng.normal(0, 4, (height, width, channels))
    return values.clip(0, 255).astype(np.uint8)


def exif(orientation=1, *, thumbnail=True):
    """EXIF data in big-endian order: date, maker note, place, and a thumbnail, by hand."""
    entries = [
        (0x0112, 3, 1, struct.pack(">HH", orientation, 0)),
        (0x8769, 4, 1, None),
        (0x8825, 4, 1, None),
    ]
    start = 8 + 2 + 12 * len(entries) + 4
    date = b"2024:05:06 07:08:09\x00"
    inner = start + 2 + 12 * 2 + 4
    exif_ifd = struct.pack(">H", 2) + struct.pack(">HHII", 0x9003, 2, len(date), inner)
    exif_ifd += struct.pack(">HHII", 0x927C, 7, len(MAKER_NOTE), inner + len(date))
    exif_ifd += bytes(4) + date + MAKER_NOTE
    place = start + len(exif_ifd)
    latitude = struct.pack(">6I", 52, 1, 30, 1, 5, 1)
    gps_ifd = struct.pack(">H", 2) + struct.pack(">HHI4s", 1, 2, 2, b"N\x00\x00\x00")
    gps_ifd += struct.pack(">HHII", 2, 5, 3, place + 2 + 24 + 4) + bytes(4) + latitude
    pointers = iter((start, place))
    second = place + len(gps_ifd)
    body = b"MM\x00*" + struct.pack(">I", 8) + struct.pack(">H", len(entries))
    for tag, kind, count, value in entries:
        value = struct.pack(">I", next(pointers)) if value is None else value
        body += struct.pack(">HHI", tag, kind, count) + value
    body += struct.pack(">I", second if thumbnail else 0) + exif_ifd + gps_ifd
    if thumbnail:
        buffer = io.BytesIO()
        Image.fromarray(scene(12, 16)).save(buffer, "JPEG", quality=95)
        body += struct.pack(">H", 2) + struct.pack(">HHII", 0x0201, 4, 1, second + 30)
        body += struct.pack(">HHII", 0x0202, 4, 1, buffer.tell()) + bytes(4) + buffer.getvalue()
    return body


def display_p3():
    """A matrix profile with the primaries of Display P3 and the curve of sRGB."""

    def fixed(*values):
        return b"XYZ \x00\x00\x00\x00" + struct.pack(">3i", *(round(v * 65536) for v in values))

    curve = [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045]
    para = b"para\x00\x00\x00\x00" + struct.pack(">HH", 3, 0)
    para += struct.pack(">5i", *(round(v * 65536) for v in curve))
    tags = {
        b"rXYZ": fixed(0.515121, 0.241196, -0.001053),
        b"gXYZ": fixed(0.291977, 0.692245, 0.041885),
        b"bXYZ": fixed(0.157104, 0.066574, 0.784073),
        b"wtpt": fixed(0.9642, 1.0, 0.8249),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), para),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s12s4s28s3i",
        128 + len(table) + len(body),
        b"lcms",
        0x04000000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        bytes(12),
        b"acsp",
        bytes(28),
        *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)),
    )
    return header + bytes(128 - len(header)) + table + body


def jpeg(pixels=None, *, quality=93, subsampling=2, orientation=6, icc=b"", **settings):
    """A JPEG with EXIF, XMP, IPTC, a comment and a profile."""
    buffer = io.BytesIO()
    image = Image.fromarray(scene() if pixels is None else pixels)
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, **settings)
    own = [
        Segment(b"\xe1", b"Exif\x00\x00" + exif(orientation)),
        Segment(b"\xe1", b"http://ns.adobe.com/xap/1.0/\x00" + XMP),
        IPTC,
        Segment(b"\xfe", b"a comment"),
    ]
    if icc:
        own.append(Segment(b"\xe2", b"ICC_PROFILE\x00\x01\x01" + icc))
    return with_jpeg_segments(buffer.getvalue(), own)


def png(pixels=None, *, orientation=3, **settings):
    """A PNG with EXIF, XMP, text and a private chunk."""
    buffer = io.BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a bridge")
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    image = pixels if isinstance(pixels, Image.Image) else None
    image = image or Image.fromarray(scene() if pixels is None else pixels)
    image.save(buffer, "PNG", pnginfo=info, dpi=(300, 300), **settings)
    own = [Segment(b"eXIf", exif(orientation)), Segment(b"prVt", b"private")]
    return with_png_chunks(buffer.getvalue(), own)


def deep(kind, *, alpha=False, seed=0):
    """A 16-bit RGB picture as PNG or TIFF."""
    pixels = scene(seed=seed).astype(np.uint16) * 257
    pixels += np.random.default_rng(seed).integers(0, 200, pixels.shape).astype(np.uint16)
    layer = np.full(pixels.shape[:2], 40_000, np.uint16) if alpha else None
    photo = photos.Photo(
        pixels=pixels,
        alpha=layer,
        kind="png",
        metadata=photos.Metadata(exif=exif(8), xmp=XMP, icc=display_p3()),
        coding=photos.Coding(),
    )
    return photo_write.encode(photo, kind=kind)[0]


def saved(pixels, form, **settings):
    """Pixels, or an image, in any format of Pillow."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def cmyk_jpeg():
    """A CMYK picture without a profile."""
    return saved(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95)


def srgb_profile():
    """Little CMS's sRGB profile."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
