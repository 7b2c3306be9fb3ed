"""What people photograph on screens, drawn: pages of text, windows, plots, gradients, greys.

Text is made of random words in Latin, Greek and Cyrillic letters, in the DejaVu fonts where the
system has them; elsewhere in Pillow's own font, which knows Latin alone. The same seed draws the
same picture on machines with the same fonts.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qtool.methods.undem.capture import Draw

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_Colour = tuple[int, int, int]

_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")
_LATIN = "aaabcdeeeefghiiijklmnnoooprrssstttuuvwxyz"
_SCRIPTS = (_LATIN, "αβγδεζηθικλμνξοπρστυφχψω", "абвгдежзийклмнопрстуфхцчшщыьэюя")


def page(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw one picture of a screen.

    Args:
        height: In pixels, at least 32.
        width: In pixels, at least 32.
        generator: Source of all randomness, on the CPU.

    Returns:
        (3, height, width), multiples of 1/255.
    """
    draw = Draw(generator)
    kinds = (_document, _window, _plot, _gradient, _flat)
    kind = draw.pick(kinds, (0.4, 0.25, 0.15, 0.1, 0.1))
    image = kind(height, width, draw)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _document(height: int, width: int, draw: Draw) -> Image.Image:
    dark = draw.chance(0.25)
    paper, ink = _colours(draw, dark=dark)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    top = draw.index(12)
    while top < height:
        size = draw.pick((9, 11, 13, 16, 20, 28, 44), (2, 4, 4, 3, 2, 1, 0.5))
        script, font = _type(draw, size)
        left = 4 + draw.index(max(1, width // 6))
        colour = ink if draw.chance(0.8) else _vivid(draw, dark=dark)
        for _ in range(1 + draw.index(6)):
            line = _words(draw, script, 1 + draw.index(2 + 2 * width // size))
            pen.text((left, top), line, fill=colour, font=font)
            top += round(size * 1.35)
        top += size
    return image


def _window(height: int, width: int, draw: Draw) -> Image.Image:
    dark = draw.chance(0.4)
    paper, _ = _colours(draw, dark=not dark)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    for _ in range(2 + draw.index(4)):
        face, ink = _colours(draw, dark=dark)
        left, top = draw.index(max(1, width - 24)), draw.index(max(1, height - 24))
        right = left + 24 + draw.index(width)
        bottom = top + 24 + draw.index(height)
        pen.rectangle((left, top, right, bottom), fill=face, outline=ink)
        pen.rectangle((left, top, right, top + 14), fill=_vivid(draw, dark=dark))
        script, font = _type(draw, 11)
        pen.text((left + 4, top), _words(draw, script, 2), fill=face, font=font)
        for row in range(top + 22, min(bottom, height), 20):
            if draw.chance(0.3):
                box = (left + 6, row, left + 50, row + 14)
                pen.rounded_rectangle(box, 4, fill=_vivid(draw, dark=dark), outline=ink)
            else:
                pen.text((left + 6, row), _words(draw, script, 4), fill=ink, font=font)
            if draw.chance(0.3):
                pen.line((left + 2, row + 17, right, row + 17), fill=ink)
    return image


def _plot(height: int, width: int, draw: Draw) -> Image.Image:
    dark = draw.chance(0.25)
    paper, ink = _colours(draw, dark=dark)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    step = 16 + draw.index(24)
    faint = _between(paper, ink, 0.2)
    for x in range(step, width, step):
        pen.line((x, 0, x, height), fill=faint)
    for y in range(step, height, step):
        pen.line((0, y, width, y), fill=faint)
    for _ in range(1 + draw.index(4)):
        colour = _vivid(draw, dark=dark)
        if draw.chance(0.35):
            bar = 4 + draw.index(12)
            for x in range(draw.index(bar + 1), width, 2 * bar):
                pen.rectangle((x, height - draw.index(height), x + bar, height), fill=colour)
            continue
        phase, turns = draw.uniform(0, 6), draw.uniform(1, 6)
        swing, level = draw.uniform(0.05, 0.4) * height, draw.uniform(0.2, 0.8) * height
        points = [
            (x, level + swing * math.sin(phase + turns * x / width * 6)) for x in range(0, width, 3)
        ]
        pen.line(points, fill=colour, width=1 + draw.index(3))
    _, font = _type(draw, 10)
    for x in range(step, width, 2 * step):
        pen.text((x, height - 14), str(draw.index(1000)), fill=ink, font=font)
    return image


def _gradient(height: int, width: int, draw: Draw) -> Image.Image:
    corners = np.array([[draw.index(256) for _ in range(3)] for _ in range(4)], dtype=np.uint8)
    small = Image.fromarray(corners.reshape(2, 2, 3))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _flat(height: int, width: int, draw: Draw) -> Image.Image:
    grey = draw.index(256)
    colour = (grey, grey, grey)
    if draw.chance(0.4):
        colour = (draw.index(256), draw.index(256), draw.index(256))
    return Image.new("RGB", (width, height), colour)


@functools.cache
def _font(name: str, size: int) -> _Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _type(draw: Draw, size: int) -> tuple[str, _Font]:
    """An alphabet and a font that has it."""
    name = _FONTS[draw.index(len(_FONTS))]
    script = draw.pick(_SCRIPTS, (0.7, 0.12, 0.18))
    found = _font(name, size)
    return (_LATIN, ImageFont.load_default(size)) if found is None else (script, found)


def _words(draw: Draw, alphabet: str, count: int) -> str:
    words = []
    for _ in range(count):
        length = 1 + draw.index(9)
        word = "".join(alphabet[draw.index(len(alphabet))] for _ in range(length))
        if draw.chance(0.12):
            word = word.capitalize()
        words.append(str(draw.index(10000)) if draw.chance(0.06) else word)
    return " ".join(words)


def _colours(draw: Draw, *, dark: bool) -> tuple[_Colour, _Colour]:
    """A ground and an ink that can be read on it."""
    light_grey, dark_grey = 200 + draw.index(56), draw.index(70)
    light = (light_grey, min(255, light_grey + draw.index(8)), max(0, light_grey - draw.index(8)))
    deep = (dark_grey, dark_grey, min(255, dark_grey + draw.index(20)))
    return (deep, light) if dark else (light, deep)


def _vivid(draw: Draw, *, dark: bool) -> _Colour:
    base = 90 if dark else 0
    red, green, blue = (base + draw.index(165) for _ in range(3))
    return red, green, blue


def _between(first: _Colour, second: _Colour, share: float) -> _Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
