"""Pictures: decoding, timm's evaluation transform, PNG files and contact sheets."""

from __future__ import annotations

import io
import math
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from qtool.errors import ImageError
from qtool.io.atomic import write_file

MAX_PIXELS = 300_000_000

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_WHITE = (255, 255, 255)
_PAPER = (250, 250, 248)
_INK = (52, 52, 50)
_MARGIN = 16
_GAP = 10
_FONT_SIZE = 14
_TILE = 192
_pixel_limit = threading.Lock()


def load_rgb(path: Path) -> Image.Image:
    """Read a picture as a viewer shows it: upright, RGB, 8 bits.

    The EXIF orientation is applied, 16 bits are scaled to 8, transparent parts are put on white.

    Args:
        path: The picture; any format that Pillow reads.

    Returns:
        The picture in mode RGB.

    Raises:
        ImageError: The file is absent, no picture, damaged, animated or above 300 megapixels.
    """
    try:
        with unlimited_pixels():
            image = Image.open(path)
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist", remedy="check the path") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is not a picture that can be read", remedy="convert it to PNG or JPEG"
        ) from error
    # Pillow's decoders answer a damaged file with almost any exception.
    except Exception as error:
        raise _unreadable(path, error) from error
    with image:
        _check_limits(image, path)
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), path)
        except ImageError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error


def to_tensor(
    image: Image.Image,
    *,
    size: int | tuple[int, int],
    crop_pct: float,
    interpolation: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Make a network's input the way timm does for evaluation.

    The shorter side is resized to floor(size / crop_pct), the centre is cropped, the pixels are
    normalised.

    Args:
        image: A picture in mode RGB.
        size: Side of the input, or (height, width).
        crop_pct: Share of the resized picture that the crop keeps, above 0, at most 1.
        interpolation: nearest, bilinear, bicubic or lanczos.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel.

    Returns:
        (3, H, W), float32.

    Raises:
        ValueError: A setting is out of range.
        ImageError: The picture is so narrow that resizing would pass the limit.
    """
    if interpolation not in _RESAMPLING:
        raise ValueError(f"interpolation is one of {', '.join(_RESAMPLING)}, got {interpolation!r}")
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"crop_pct is above 0 and at most 1, got {crop_pct}")
    height, width = (size, size) if isinstance(size, int) else size
    resized = _resized_size(
        image.height, image.width, math.floor(height / crop_pct), math.floor(width / crop_pct)
    )
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ImageError(
            f"a picture of {image.width} x {image.height} is too narrow for this model",
            remedy="crop it to a more usual shape",
        )
    if resized != (image.height, image.width):
        image = image.resize((resized[1], resized[0]), _RESAMPLING[interpolation])
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    scaled = pixels.contiguous().to(torch.float32).div(255)
    return (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def save_png(path: Path, image: Tensor, *, overwrite: bool = False) -> None:
    """Write a picture as a PNG that appears whole or not at all.

    Args:
        path: Where it goes.
        image: (3, H, W) with values in 0..1; what lies outside is clipped.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ImageError: The picture has values that are not numbers.
        OutputExistsError: The file exists and `overwrite` is false.
    """
    if not bool(image.isfinite().all()):
        raise ImageError(f"{path} would hold values that are not numbers; it is not written")
    buffer = io.BytesIO()
    # Half the time of the default level, for a twentieth more bytes.
    _to_pil(image).save(buffer, format="PNG", compress_level=3)
    write_file(path, buffer.getvalue(), overwrite=overwrite)


def contact_sheet(
    images: Sequence[Tensor], *, columns: int = 8, captions: Sequence[str] = ()
) -> Image.Image:
    """Lay pictures out on one page, each with its caption below it.

    Args:
        images: Pictures (3, H, W) with values in 0..1; sizes may differ.
        columns: Pictures in a row.
        captions: One line each, reduced to ASCII and cut to the width of its picture; empty for
            none.

    Returns:
        The page, in mode RGB. Tiles are 192 pixels wide; small pictures are enlarged without
        smoothing by whole factors.

    Raises:
        ValueError: There are no pictures, or captions of another number.
    """
    if not images or columns < 1 or (captions and len(captions) != len(images)):
        raise ValueError(
            f"needs pictures, columns and as many captions; got {len(images)}, {columns}, "
            f"{len(captions)}"
        )
    font = ImageFont.load_default(size=_FONT_SIZE)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    line = _FONT_SIZE + 12 if captions else 0
    page = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * _TILE + (columns - 1) * _GAP,
            2 * _MARGIN + rows * (_TILE + line) + (rows - 1) * _GAP,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(page)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left = _MARGIN + column * (_TILE + _GAP)
        top = _MARGIN + row * (_TILE + line + _GAP)
        tile = _fit(_to_pil(image))
        page.paste(tile, (left + (_TILE - tile.width) // 2, top + (_TILE - tile.height) // 2))
        if captions:
            text = _shorten(captions[index], font)
            middle = (left + _TILE / 2, top + _TILE + line / 2)
            draw.text(middle, text, fill=_INK, font=font, anchor="mm")
    return page


@contextmanager
def unlimited_pixels() -> Iterator[None]:
    """Lift Pillow's own limit, a global of 179 megapixels, while a file's header is read."""
    with _pixel_limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _unreadable(path: Path, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"{path} cannot be read: {reason[:120]}", remedy="the file may be damaged")


def _check_limits(image: Image.Image, path: Path) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            f"{path} has {image.width * image.height / 1e6:.0f} megapixels; "
            f"the limit is {MAX_PIXELS / 1e6:.0f}",
            remedy="make it smaller first",
        )
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:
        raise _unreadable(path, error) from error
    # Telephones write MPO: one photograph, then a preview or a depth map.
    if frames > 1 and image.format != "MPO":
        raise ImageError(f"{path} holds {frames} frames", remedy="save the one you want by itself")


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise ImageError(
            f"{path} has floating-point pixels of unknown range", remedy="convert it to PNG"
        )
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path} has 32-bit pixels", remedy="convert it to a 16-bit PNG")
        scaled = (values.astype(np.uint32) * 255 + 32767) // 65535
        image = Image.fromarray(scaled.astype(np.uint8))
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        page = Image.new("RGBA", picture.size, (*_WHITE, 255))
        image = Image.alpha_composite(page, picture)
    return image if image.mode == "RGB" else image.convert("RGB")


def _resized_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    if to_height == to_width:
        if width <= height:
            return int(to_width * height / width), to_width
        return to_height, int(to_height * width / height)
    ratio = min(height / to_height, width / to_width)
    return round(height / ratio), round(width / ratio)


def _to_pil(image: Tensor) -> Image.Image:
    pixels = image.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _fit(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest > _TILE:
        size = [max(1, round(side * _TILE / longest)) for side in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = _TILE // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    # Pillow's own font has no letters beyond ASCII and would draw boxes.
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = " ".join(text.split())
    if font.getlength(text) <= _TILE:
        return text
    while text and font.getlength(text + "...") > _TILE:
        text = text[:-1]
    return text.rstrip() + "..."
