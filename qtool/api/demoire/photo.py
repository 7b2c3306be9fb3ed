"""One photograph: read, looked at, restored, written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qtool.api.demoire.network import memory_for_network
from qtool.errors import ImageError, QtoolError
from qtool.io import photo_write, photos
from qtool.io.colour import ColourSpace, ProfileError, colour_space
from qtool.io.photos import Kind, Photo
from qtool.methods.undem import detection
from qtool.methods.undem.restoration import (
    BadOutputError,
    Restorer,
    apply_change,
    colour_fit,
)
from qtool.settings.demoire import DemoireSettings

_STRIP_ROWS = 256
_FIT_SIDE = 640

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A photograph and its colours.

    Attributes:
        content: The bytes of its file.
        photo: What they hold.
        space: Its colour space; None for sRGB, or for one treated as sRGB.
        notes: What could not be kept, in words for people.
    """

    content: bytes
    photo: Photo
    space: ColourSpace | None
    notes: tuple[str, ...]

    @property
    def height(self) -> int:
        """Stored height."""
        return int(self.photo.pixels.shape[0])

    @property
    def width(self) -> int:
        """Stored width."""
        return int(self.photo.pixels.shape[1])

    def read(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The pixels of these rows and columns in sRGB, (3, rows, columns), float32."""
        values = _taken(self.photo.pixels, rows.numpy(), columns.numpy())
        return torch.from_numpy(self.in_srgb(values)).permute(2, 0, 1)

    def in_srgb(self, values: photos.Pixels) -> Floats:
        """Stored values (H, W, 1 or 3) as sRGB (H, W, 3), float32."""
        scaled = values.astype(np.float32) / np.float32(self.photo.top)
        if scaled.shape[2] == 1:
            scaled = np.broadcast_to(scaled, (*scaled.shape[:2], 3)).copy()
        return scaled if self.space is None else self.space.to_srgb(scaled)


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What became of a photograph.

    Attributes:
        pixels: The stored values of the result.
        tile: Side of the tiles, 0 when it went through whole.
        seam: Mean difference of tiles where they overlap, in steps of 8 bits.
        change: Mean absolute change, in steps of 8 bits.
    """

    pixels: photos.Pixels
    tile: int
    seam: float
    change: float


def decode(content: bytes, name: str, settings: DemoireSettings) -> Decoded:
    """Decode a photograph and find its colour space.

    Raises:
        ImageError: It cannot be read.
        MissingError: It needs the `photo` extra.
    """
    photo = photos.read_photo(
        content, name, bit_depth=settings.bit_depth, first_frame=settings.first_frame
    )
    if settings.bit_depth == "16":
        photo = photos.deepened(photo)
    notes, space = list(photo.notes), None
    if photo.pixels.shape[2] == 3:
        try:
            space = colour_space(photo.metadata.icc)
        except ProfileError as error:
            notes.append(f"its profile is kept but not used, as if it were sRGB: {error}")
    return Decoded(content=content, photo=photo, space=space, notes=tuple(notes))


def moire_score(decoded: Decoded) -> float:
    """How sure it is that a photograph shows moire, 0..1; transparent parts count as white."""
    photo = decoded.photo
    factor = detection.reduction(decoded.height, decoded.width)
    values = photo.pixels if photo.pixels.dtype == np.uint8 else (photo.pixels >> 8)
    values = values.astype(np.uint8, copy=False)
    if photo.alpha is not None:
        values = np.where(photo.alpha[..., None] > 0, values, np.uint8(255))
    image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    reduced = np.asarray(image.reduce(factor))
    reduced = reduced.reshape(*reduced.shape[:2], values.shape[2]).astype(np.float32) / 255
    if reduced.shape[2] == 1:
        reduced = np.repeat(reduced, 3, axis=2)
    colours: Floats = np.asarray(reduced, np.float32)
    srgb = colours if decoded.space is None else decoded.space.to_srgb(colours)
    return detection.score(torch.from_numpy(srgb).permute(2, 0, 1))


def restore(
    decoded: Decoded,
    restorer: Restorer,
    settings: DemoireSettings,
    mask: photos.Pixels | None,
    progress: Callable[[int, int], None] | None = None,
) -> Restored:
    """Restore a decoded photograph.

    Args:
        decoded: What to restore.
        restorer: The network.
        settings: The request.
        mask: (H, W) of 8 bits, white where the photograph is restored; None for everywhere.
        progress: Told how many of how many tiles are done.

    Raises:
        ImageError: The mask does not fit, or the network fails.
        QtoolError: It does not fit into memory.
    """
    if mask is not None and mask.shape != (decoded.height, decoded.width):
        raise ImageError(
            f"the mask is {mask.shape[1]} x {mask.shape[0]}, the photograph "
            f"{decoded.width} x {decoded.height}",
            remedy="give a mask of the photograph's size, as it is stored",
        )
    filled = _with_filled_holes(decoded)
    pixels = decoded.height * decoded.width
    try:
        change = restorer.change(
            filled.read,
            decoded.height,
            decoded.width,
            tile=settings.tile,
            overlap=settings.overlap,
            memory=memory_for_network(settings, restorer.device, pixels),
            progress=progress,
        )
    except BadOutputError as error:
        raise ImageError(f"nothing was written: {error}", remedy="try other weights") from error
    except MemoryError as error:
        raise QtoolError(
            f"{decoded.width} x {decoded.height} pixels do not fit into memory",
            remedy="give a smaller --tile, or leave it out",
        ) from error
    matrix = _matrix(filled, change.values) if settings.keep_colour else None
    result, total = _finished(filled, decoded, change.values, matrix, settings.strength, mask)
    return Restored(
        pixels=result, tile=change.tile, seam=255 * change.seam, change=255 * total / pixels
    )


def encode(
    decoded: Decoded, pixels: photos.Pixels, *, kind: Kind | None, settings: DemoireSettings
) -> tuple[bytes, list[str]]:
    """Write the result in the form that was asked for.

    Returns:
        The file and what could not be kept.

    Raises:
        ImageError: The format cannot hold it.
    """
    photo = decoded.photo
    metadata = photos.kept_metadata(photo.metadata, settings.metadata)
    result = replace(photo, pixels=pixels, metadata=metadata)
    return photo_write.encode(result, kind=kind or photo.kind, quality=settings.quality)


def _matrix(decoded: Decoded, change: Tensor) -> Tensor:
    down, across = max(1, decoded.height // _FIT_SIDE), max(1, decoded.width // _FIT_SIDE)
    picture = decoded.read(
        torch.arange(0, decoded.height, down), torch.arange(0, decoded.width, across)
    )
    sample = change[:, ::down, ::across]
    return colour_fit(picture.flatten(1), sample.flatten(1))


def _finished(
    filled: Decoded,
    decoded: Decoded,
    change: Tensor,
    matrix: Tensor | None,
    strength: float,
    mask: photos.Pixels | None,
) -> tuple[photos.Pixels, float]:
    """Stored values of the result, and the sum of absolute changes over pixels."""
    photo = decoded.photo
    result = np.empty_like(photo.pixels)
    columns = torch.arange(decoded.width)
    total = 0.0
    for top in range(0, decoded.height, _STRIP_ROWS):
        strip = slice(top, min(top + _STRIP_ROWS, decoded.height))
        picture = filled.read(torch.arange(strip.start, strip.stop), columns)
        step = apply_change(picture, change[:, strip], matrix=matrix, strength=strength)
        if mask is not None:
            step = step * torch.from_numpy(mask[strip].astype(np.float32) / 255)
        if photo.alpha is not None:
            step = step * torch.from_numpy(photo.alpha[strip] > 0)
        total += float(step.abs().mean(dim=0).sum())
        delta = _in_own_space(filled, picture, step)
        if photo.pixels.shape[2] == 1:
            delta = delta.mean(axis=2, keepdims=True)
        values = photo.pixels[strip].astype(np.float32) + delta * np.float32(photo.top)
        result[strip] = np.rint(values).clip(0, photo.top)
    return result, total


def _in_own_space(decoded: Decoded, picture: Tensor, step: Tensor) -> Floats:
    """The change (3, H, W) in sRGB as a change (H, W, 3) of stored values."""
    change = step.permute(1, 2, 0).numpy()
    if decoded.space is None:
        return change
    before = picture.permute(1, 2, 0).numpy()
    after = decoded.space.from_srgb(before + change)
    return np.asarray(after - decoded.space.from_srgb(before))


def _taken(
    pixels: photos.Pixels, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> photos.Pixels:
    """Rows and columns of an array; neighbours are taken without looking each one up."""
    return _along(_along(pixels, rows, 0), columns, 1)


def _along(pixels: photos.Pixels, index: NDArray[np.int64], axis: int) -> photos.Pixels:
    start, stop = int(index[0]), int(index[-1]) + 1
    if stop - start == len(index) and (len(index) < 2 or index[1] > index[0]):
        return pixels[start:stop] if axis == 0 else pixels[:, start:stop]
    return np.take(pixels, index, axis=axis)  # type: ignore[return-value]


def _with_filled_holes(decoded: Decoded) -> Decoded:
    """The photograph with colours under full transparency taken from around it."""
    photo = decoded.photo
    if photo.alpha is None or photo.alpha.all():
        return decoded
    filled = photo.pixels.copy()
    holes = photo.alpha == 0
    visible = torch.from_numpy(~holes).float()[None, None]
    colours = torch.from_numpy(photo.pixels.astype(np.float32)).permute(2, 0, 1)[None] * visible
    for side in (4, 16, 64, 256, max(holes.shape)):
        if not holes.any():
            break
        weight = torch.nn.functional.avg_pool2d(visible, side, ceil_mode=True)
        colour = torch.nn.functional.avg_pool2d(colours, side, ceil_mode=True)
        around = (colour / weight.clamp(min=1e-6))[0].permute(1, 2, 0).numpy()
        known = (weight[0, 0] > 0).numpy()
        y, x = np.nonzero(holes)
        found = known[y // side, x // side]
        y, x = y[found], x[found]
        filled[y, x] = around[y // side, x // side].astype(filled.dtype)
        holes = holes.copy()
        holes[y, x] = False
    return replace(decoded, photo=replace(photo, pixels=filled))
