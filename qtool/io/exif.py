"""Small changes inside EXIF data that leave every other byte where it is.

Maker notes hold offsets that count from the start of the data, so EXIF cannot be taken apart and
put together again without breaking them. What must go is overwritten in place.

EXIF data here are the TIFF structure alone, without the word Exif in front.

Reference: Exif 2.32, section 4.5.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_ORIENTATION, _GPS_IFD = 0x0112, 0x8825
_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH = 0x0201, 0x0202
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


class ExifError(ValueError):
    """The data are no EXIF, or their structure leads nowhere."""


@dataclass(frozen=True)
class _Entry:
    """One entry of a directory: its tag, where its four value bytes lie, where its data lie."""

    tag: int
    field: int
    data: int
    size: int


def orientation(data: bytes) -> int:
    """The orientation, 1 to 8; 1 if there is none or the data cannot be read."""
    try:
        order, first = _header(data)
        for entry in _entries(data, order, first):
            if entry.tag == _ORIENTATION:
                value = struct.unpack_from(f"{order}H", data, entry.field)[0]
                return int(value) if 1 <= value <= 8 else 1
    except ExifError:
        pass
    return 1


def orientation_only(value: int) -> bytes:
    """EXIF data that hold an orientation and nothing else."""
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, _ORIENTATION, 3, 1, value, 0, 0)


def without_gps(data: bytes) -> bytes:
    """The same data, of the same length, with an empty GPS directory whose values are zeroed.

    Raises:
        ExifError: The structure cannot be followed, so that nothing can be promised.
    """
    order, first = _header(data)
    changed = bytearray(data)
    for entry in _entries(data, order, first):
        if entry.tag != _GPS_IFD:
            continue
        (start,) = struct.unpack_from(f"{order}I", data, entry.field)
        inner = list(_entries(data, order, start))
        for value in inner:
            changed[value.data : value.data + value.size] = bytes(value.size)
        changed[start : start + 2 + 12 * len(inner)] = bytes(2 + 12 * len(inner))
    return bytes(changed)


def thumbnail(data: bytes) -> tuple[int, int] | None:
    """Where the JPEG thumbnail lies, as offset and length; None without one."""
    found = _thumbnail_fields(data)
    return None if found is None else (found[0], found[1])


def with_thumbnail(data: bytes, jpeg: bytes) -> bytes:
    """The same data, of the same length, with another thumbnail in the place of the old one.

    Raises:
        ExifError: There is no thumbnail, or the new one needs more room.
    """
    found = _thumbnail_fields(data)
    if found is None or len(jpeg) > found[1]:
        raise ExifError("no room for a thumbnail")
    offset, length, field, order = found
    changed = bytearray(data)
    changed[offset : offset + length] = jpeg + bytes(length - len(jpeg))
    struct.pack_into(f"{order}I", changed, field, len(jpeg))
    return bytes(changed)


def _thumbnail_fields(data: bytes) -> tuple[int, int, int, str] | None:
    try:
        order, first = _header(data)
        count = len(list(_entries(data, order, first)))
        (second,) = struct.unpack_from(f"{order}I", data, first + 2 + 12 * count)
        fields = {entry.tag: entry.field for entry in _entries(data, order, second)}
        offset, length = (
            int(struct.unpack_from(f"{order}I", data, fields[tag])[0])
            for tag in (_THUMBNAIL_OFFSET, _THUMBNAIL_LENGTH)
        )
    except (ExifError, KeyError, struct.error):
        return None
    if length < 4 or offset + length > len(data) or data[offset : offset + 2] != b"\xff\xd8":
        return None
    return offset, length, fields[_THUMBNAIL_LENGTH], order


def _header(data: bytes) -> tuple[str, int]:
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(bytes(data[:4]))
    if order is None or len(data) < 8:
        raise ExifError("no TIFF header")
    return order, int(struct.unpack_from(f"{order}I", data, 4)[0])


def _entries(data: bytes, order: str, start: int) -> Iterator[_Entry]:
    if not 8 <= start <= len(data) - 2:
        raise ExifError("a directory lies outside")
    (count,) = struct.unpack_from(f"{order}H", data, start)
    if start + 2 + 12 * count > len(data):
        raise ExifError("a directory is cut off")
    for index in range(count):
        place = start + 2 + 12 * index
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, place)
        size = _SIZES.get(kind, 0) * number
        where = place + 8
        if size > 4:
            (where,) = struct.unpack_from(f"{order}I", data, place + 8)
            if where + size > len(data):
                raise ExifError("a value lies outside")
        yield _Entry(tag, place + 8, where, size)
