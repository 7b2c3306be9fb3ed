"""RGB profiles of three primaries and curves: to sRGB, which networks know, and back.

Values stay floating point and are not cut at the borders of sRGB, so that colours outside of it
come back unharmed.

Reference: ICC.1:2022, sections 8.3.3 (three-component matrix profiles), 10.6, 10.18.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_POINTS = 4096
_SAME = 0.5 / 255
# The primaries of sRGB adapted to the profile connection space (D50).
_SRGB_TO_XYZ = np.array(
    [
        [0.436065674, 0.385147095, 0.143066406],
        [0.222488403, 0.716873169, 0.060607910],
        [0.013916016, 0.097076416, 0.714096069],
    ]
)


@dataclass(frozen=True, eq=False)
class ColourSpace:
    """An RGB space that is not sRGB.

    Attributes:
        curves: (3, 4096): linear light of equally spaced values of each channel.
        to_linear_srgb: (3, 3): from its linear light to that of sRGB.
    """

    curves: NDArray[np.float64]
    to_linear_srgb: NDArray[np.float64]

    def to_srgb(self, values: Floats) -> Floats:
        """Turn values (..., 3) of this space into values of sRGB, which may lie outside 0..1."""
        position = np.linspace(0, 1, _POINTS)
        light = np.stack(
            [np.interp(values[..., c], position, self.curves[c]) for c in range(3)], axis=-1
        )
        return _encoded(light @ self.to_linear_srgb.T).astype(np.float32)

    def from_srgb(self, values: Floats) -> Floats:
        """Turn values (..., 3) of sRGB into values of this space, 0..1."""
        light = _linear(values) @ np.linalg.inv(self.to_linear_srgb).T
        position = np.linspace(0, 1, _POINTS)
        return np.stack(
            [np.interp(light[..., c], self.curves[c], position) for c in range(3)], axis=-1
        ).astype(np.float32)


class ProfileError(ValueError):
    """A profile that is no matrix profile for RGB, or damaged."""


@lru_cache(maxsize=16)
def colour_space(profile: bytes) -> ColourSpace | None:
    """The colour space of an ICC profile; None if it is sRGB for all that can be seen.

    Args:
        profile: The profile; empty for none, which means sRGB.

    Raises:
        ProfileError: It is built in another way, for example on tables.
    """
    if not profile:
        return None
    try:
        space = _parsed(profile)
    except (struct.error, IndexError, KeyError, ValueError, np.linalg.LinAlgError) as error:
        raise ProfileError(str(error) or "the profile cannot be read") from error
    steps = np.linspace(0, 1, 9, dtype=np.float32)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    if np.abs(space.to_srgb(colours) - colours).max() < _SAME:
        return None
    return space


def _parsed(profile: bytes) -> ColourSpace:
    if profile[16:20] != b"RGB " or profile[20:24] != b"XYZ ":
        raise ProfileError("it is not a matrix profile for RGB")
    (count,) = struct.unpack_from(">I", profile, 128)
    if count > 200:
        raise ProfileError("it has too many tags")
    tags = {}
    for index in range(count):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        tags[name] = profile[offset : offset + size]
    if b"A2B0" in tags:
        raise ProfileError("it is built on tables")
    columns = [
        np.array(struct.unpack_from(">3i", tags[name], 8)) / 65536
        for name in (b"rXYZ", b"gXYZ", b"bXYZ")
    ]
    matrix = np.linalg.inv(_SRGB_TO_XYZ) @ np.stack(columns, axis=1)
    curves = np.stack([_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")])
    if abs(np.linalg.det(matrix)) < 1e-3 or not (np.diff(curves) >= 0).all():
        raise ProfileError("it cannot be turned round")
    return ColourSpace(curves, matrix)


def _curve(tag: bytes) -> NDArray[np.float64]:
    x = np.linspace(0, 1, _POINTS)
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count == 0:
            return x
        if count == 1:
            return np.asarray(x ** (struct.unpack_from(">H", tag, 12)[0] / 256))
        points = np.frombuffer(tag, ">u2", count, 12) / 65535
        return np.interp(x, np.linspace(0, 1, count), points)
    if tag[:4] != b"para":
        raise ProfileError("it has a curve of an unknown kind")
    kind = struct.unpack_from(">H", tag, 8)[0]
    number = (1, 3, 4, 5, 7)[kind]
    given = [value / 65536 for value in struct.unpack_from(f">{number}i", tag, 12)]
    absent = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    g, a, b, c, d, e, f = given + absent[number - 1 :]
    if kind in (1, 2):
        # Below -b/a the curve is a constant: that of the third kind is called c.
        d, f, e, c = -b / a, c, c, 0.0
    bent = np.clip(a * x + b, 0, None) ** g + e
    return np.asarray(np.where(x >= d, bent, c * x + f).clip(0, 1))


def _encoded(light: NDArray[np.float64]) -> NDArray[np.float64]:
    size = np.abs(light)
    bent = 1.055 * np.maximum(size, 0.0031308) ** (1 / 2.4) - 0.055
    return np.asarray(np.copysign(np.where(size <= 0.0031308, 12.92 * size, bent), light))


def _linear(values: Floats) -> NDArray[np.float64]:
    size = np.abs(values.astype(np.float64))
    bent = ((np.maximum(size, 0.04045) + 0.055) / 1.055) ** 2.4
    return np.asarray(np.copysign(np.where(size <= 0.04045, size / 12.92, bent), values))
