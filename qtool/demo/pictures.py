"""Labelled pictures drawn by formula: a data set of any size that needs no files.

A picture shows one large shape filled with a pattern, and its class is the pair, such as
"striped star". Position, size, rotation, stretch and colours vary; small shapes and lines lie
behind and before it; light, blur and noise come last. Everything is drawn from signed distances
in picture-relative units, so that one picture keeps its content at every resolution.

Every random number is a hash of (stream, index, slot). Picture `index` of a stream is thus the
same whatever batch it is drawn in, up to the last bit of the float functions. Streams
0..2^31-1 are open to callers as seeds; the held-out stream lies outside that range, and the hash
is a bijection of the pair, so no seed can draw a held-out picture again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qtool.demo.shapes import PATTERNS, SHAPES, pattern_weight, signed_distance
from qtool.errors import UsageError

MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Difficulty:
    """How much stands between a viewer and the class of a picture.

    Attributes:
        behind: Small shapes that may lie behind the subject; one may always lie before it.
        lines: Chance of a line behind the subject; one before it is a little rarer.
        noise: Largest standard deviation of the noise.
        radius: Smallest radius of the subject, in half pictures.
        margin: Smallest difference in light between subject and ground.
        contrast: Smallest difference in light between the two colours of a pattern.
    """

    behind: int = 2
    lines: float = 0.6
    noise: float = 0.09
    radius: float = 0.55
    margin: float = 0.12
    contrast: float = 0.22


FULL = Difficulty()
"""What held-out pictures have."""

EASY = Difficulty(behind=1, lines=0.4, noise=0.07, radius=0.62, margin=0.16, contrast=0.3)
"""What a small model learns from several times faster."""

_HELD_OUT_STREAM = MAX_SEED + 1
_MAX_INDEX = 2**31 - 1
_SLOTS = 96
_CHUNK_PIXELS = 24 * 4096
_TAU = 2 * math.pi


def class_names() -> list[str]:
    """Return the class names in label order: shape-major, pattern-minor."""
    return [f"{pattern} {shape}" for shape in SHAPES for pattern in PATTERNS]


def draw(
    count: int,
    *,
    size: int = 64,
    seed: int = 0,
    start: int = 0,
    labels: Tensor | None = None,
    difficulty: Difficulty = FULL,
) -> tuple[Tensor, Tensor]:
    """Draw pictures `start` to `start + count - 1` of the stream `seed`.

    Args:
        count: Number of pictures.
        size: Height and width in pixels, at least 8.
        seed: Stream of pictures, 0..2^31-1.
        start: Index of the first picture in its stream.
        labels: Classes to draw, shape (count,); drawn at random when absent.
        difficulty: Clutter, noise and contrast.

    Returns:
        Pictures (count, 3, size, size), float32 multiples of 1/255 in 0..1, and labels (count,),
        int64.

    Raises:
        UsageError: A number is out of range, or labels do not fit.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(
            f"the seed {seed} is outside 0..{MAX_SEED}", remedy="choose a seed in that range"
        )
    return _draw(count, size=size, stream=seed, start=start, labels=labels, difficulty=difficulty)


def held_out(count: int, size: int = 64, *, start: int = 0) -> tuple[Tensor, Tensor]:
    """Draw pictures that no seed of `draw` can produce, with balanced labels.

    Picture i has label i modulo the number of classes.

    Args:
        count: Number of pictures.
        size: Height and width in pixels.
        start: Index of the first picture, to draw a large set in batches.

    Returns:
        Pictures (count, 3, size, size) in 0..1 and labels (count,).

    Raises:
        UsageError: A number is out of range.
    """
    labels = (torch.arange(start, start + max(count, 0)) % len(class_names())).long()
    return _draw(
        count, size=size, stream=_HELD_OUT_STREAM, start=start, labels=labels, difficulty=FULL
    )


def _draw(
    count: int,
    *,
    size: int,
    stream: int,
    start: int,
    labels: Tensor | None,
    difficulty: Difficulty,
) -> tuple[Tensor, Tensor]:
    classes = len(class_names())
    if count < 0 or start < 0 or start + count > _MAX_INDEX:
        raise UsageError(
            f"cannot draw {count} pictures from index {start}",
            remedy="both must be at least 0, and their sum below 2^31",
        )
    if size < 8:
        raise UsageError(f"a picture of {size} pixels shows nothing", remedy="use a size from 8 up")
    if labels is not None and (
        labels.shape != (count,) or bool(((labels < 0) | (labels >= classes)).any())
    ):
        raise UsageError(
            f"labels must have shape ({count},) and lie in 0..{classes - 1}",
            remedy="give one class index per picture",
        )
    index = torch.arange(start, start + count, dtype=torch.int64)
    keys = _mix((torch.tensor(stream, dtype=torch.int64) << 31) + index)
    if labels is None:
        labels = (_uniform(keys, 1, offset=_SLOTS)[:, 0] * classes).long().clamp_(max=classes - 1)
    pictures = torch.empty(count, 3, size, size)
    step = max(1, _CHUNK_PIXELS // (size * size))
    for first in range(0, count, step):
        part = slice(first, first + step)
        pictures[part] = _render(keys[part], labels[part], size, difficulty)
    return pictures, labels.long()


def _mix(value: Tensor) -> Tensor:
    """Hash int64 to int64 by the bijective finaliser of SplitMix64."""
    value = value + -7046029254386353131
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def _uniform(keys: Tensor, slots: int, *, offset: int = 0) -> Tensor:
    """Return (B, slots) numbers in 0..1 from keys (B,)."""
    slot = torch.arange(offset, offset + slots, dtype=torch.int64)
    return ((_mix(keys[:, None] + slot * 0x632BE59BD9B4E019) >> 40) & 0xFFFFFF).float() / 2**24


class _Dice:
    """Hands out the uniform numbers of a batch, one slot after another."""

    def __init__(self, keys: Tensor) -> None:
        self._numbers = _uniform(keys, _SLOTS)
        self._next = 0

    def range(self, low: float, high: float, number: int = 1) -> Tensor:
        """Return (B, number) numbers in low..high."""
        taken = self._numbers[:, self._next : self._next + number]
        self._next += number
        return taken * (high - low) + low

    def chance(self, probability: float) -> Tensor:
        """Return (B, 1) ones with `probability`, else zeros."""
        return (self.range(0, 1) < probability).float()


def _colour(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return (..., 3) colours from hue, saturation and value in 0..1, each (..., 1)."""
    wheel = 0.5 + 0.5 * torch.cos(_TAU * (hue + torch.tensor([0.0, 1 / 3, 2 / 3])))
    return value * (1 - saturation * wheel)


def _render(keys: Tensor, labels: Tensor, size: int, difficulty: Difficulty) -> Tensor:
    """Draw one chunk: keys (B,), labels (B,) -> (B, 3, size, size)."""
    dice = _Dice(keys)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
    y, x = axis[:, None].expand(size, size).reshape(1, -1), axis.repeat(size).reshape(1, -1)
    pixel = 2 / size

    light = dice.range(0.12, 0.95)
    hue = dice.range(0, 1)
    picture = _background(dice, x, y, hue, light)
    for _ in range(difficulty.behind):
        _add_small_shape(dice, picture, x, y, pixel, reach=1.0)
    _add_line(dice, picture, x, y, pixel, present=difficulty.lines)
    _add_subject(dice, picture, labels, x, y, pixel, light, difficulty)
    _add_small_shape(dice, picture, x, y, pixel, reach=0.7)
    _add_line(dice, picture, x, y, pixel, present=difficulty.lines - 0.1)

    angle = dice.range(0, _TAU)
    slope = dice.range(0, 0.35)
    shade = 1 + slope * (torch.cos(angle) * x + torch.sin(angle) * y)
    picture = (picture * shade[:, None]).view(-1, 3, size, size)

    picture.lerp_(_blurred(picture, max(1, round(size / 64))), dice.range(0, 0.8)[:, :, None, None])
    strength = dice.range(0, 1).square() * difficulty.noise
    picture += _noise(keys, size) * strength[:, :, None, None]
    return picture.mul_(255).round_().clamp_(0, 255).div_(255)


def _background(dice: _Dice, x: Tensor, y: Tensor, hue: Tensor, light: Tensor) -> Tensor:
    """Return (B, 3, P): a gradient of two related colours, warped by waves."""
    near = _colour(hue, dice.range(0, 0.8), light)
    far = _colour(
        hue + dice.range(-0.2, 0.2), dice.range(0, 0.8), (light + dice.range(-0.3, 0.3)).clamp(0, 1)
    )
    angle, turn = dice.range(0, _TAU), dice.range(0, _TAU)
    frequency = dice.range(4, 22)
    wave = torch.sin(frequency * (torch.cos(turn) * x + torch.sin(turn) * y))
    wave *= torch.sin(dice.range(0.5, 6) * (torch.sin(turn) * x - torch.cos(turn) * y))
    mixture = 0.5 + 0.4 * (torch.cos(angle) * x + torch.sin(angle) * y)
    mixture = (mixture + wave * dice.range(0, 0.5)).clamp_(0, 1)
    return torch.lerp(near[:, :, None], far[:, :, None], mixture[:, None])


def _paint(picture: Tensor, colour: Tensor, cover: Tensor) -> None:
    """Lay colour (B, 3, 1) or (B, 3, P) over `picture` where cover (B, P) is 1."""
    picture.lerp_(colour, cover[:, None])


def _add_small_shape(
    dice: _Dice, picture: Tensor, x: Tensor, y: Tensor, pixel: float, *, reach: float
) -> None:
    kind = (dice.range(0, len(SHAPES))[:, 0]).long().clamp_(max=len(SHAPES) - 1)
    radius = dice.range(0.08, 0.24)
    angle = dice.range(0, _TAU)
    centre_x, centre_y = dice.range(-reach, reach), dice.range(-reach, reach)
    colour = _colour(dice.range(0, 1), dice.range(0, 0.9), dice.range(0.05, 1))
    present = dice.chance(0.7)
    cosine, sine = torch.cos(angle) / radius, torch.sin(angle) / radius
    u = cosine * (x - centre_x) + sine * (y - centre_y)
    v = cosine * (y - centre_y) - sine * (x - centre_x)
    distance = signed_distance(kind, u, v) * (radius / pixel)
    _paint(picture, colour[:, :, None], (0.5 - distance).clamp_(0, 1) * present)


def _add_line(
    dice: _Dice, picture: Tensor, x: Tensor, y: Tensor, pixel: float, *, present: float
) -> None:
    angle, offset = dice.range(0, _TAU), dice.range(-0.8, 0.8)
    width = dice.range(0.01, 0.07)
    colour = _colour(dice.range(0, 1), dice.range(0, 0.9), dice.range(0.05, 1))
    distance = ((torch.cos(angle) * x + torch.sin(angle) * y - offset).abs() - width) / pixel
    _paint(picture, colour[:, :, None], (0.5 - distance).clamp_(0, 1) * dice.chance(present))


def _add_subject(
    dice: _Dice,
    picture: Tensor,
    labels: Tensor,
    x: Tensor,
    y: Tensor,
    pixel: float,
    light: Tensor,
    difficulty: Difficulty,
) -> None:
    shape, pattern = labels // len(PATTERNS), labels % len(PATTERNS)
    radius, stretch = dice.range(difficulty.radius, 0.95), torch.exp(dice.range(-0.15, 0.15))
    room = 1.1 - radius
    centre_x, centre_y = dice.range(-1, 1) * room, dice.range(-1, 1) * room
    angle = dice.range(0, _TAU)
    cosine, sine = torch.cos(angle) / radius, torch.sin(angle) / radius
    u = (cosine * (x - centre_x) + sine * (y - centre_y)) * stretch
    v = (cosine * (y - centre_y) - sine * (x - centre_x)) / stretch
    distance = signed_distance(shape, u, v) * (radius / pixel)

    turn = dice.range(0, _TAU)
    period = dice.range(0.2, 0.34)
    phase_u, phase_v = dice.range(0, 1), dice.range(0, 1)
    cosine, sine = torch.cos(turn) / period, torch.sin(turn) / period
    p = cosine * (x - centre_x) + sine * (y - centre_y) + phase_u
    q = cosine * (y - centre_y) - sine * (x - centre_x) + phase_v
    weight = pattern_weight(pattern, p, q, period / pixel)

    # Both paints keep away from the light of the ground, and from each other, by a margin that
    # varies: this margin, with the noise, is what makes some pictures hard.
    margin = dice.range(difficulty.margin, 0.5)
    value = torch.where(light + dice.range(-0.3, 0.3) > 0.5, light - margin, light + margin)
    contrast = dice.range(difficulty.contrast, 0.65)
    other = torch.where(value > 0.5, value - contrast, value + contrast)
    hue = dice.range(0, 1)
    first = _colour(hue, dice.range(0, 0.7), value.clamp(0.03, 1))
    second = _colour(hue + dice.range(-0.5, 0.5), dice.range(0, 0.7), other.clamp(0.03, 1))
    colour = torch.lerp(first[:, :, None], second[:, :, None], weight[:, None])
    _paint(picture, colour, (0.5 - distance).clamp_(0, 1))


def _blurred(picture: Tensor, radius: int) -> Tensor:
    """Average over squares of 2 * radius + 1 pixels; sums of slices beat pooling twice over."""
    size, width = picture.shape[-1], 2 * radius + 1
    padded = functional.pad(picture, (radius, radius, radius, radius), mode="replicate")
    rows = padded[:, :, :size].clone()
    for shift in range(1, width):
        rows += padded[:, :, shift : shift + size]
    total = rows[..., :size].clone()
    for shift in range(1, width):
        total += rows[..., shift : shift + size]
    return total.mul_(1 / width**2)


def _noise(keys: Tensor, size: int) -> Tensor:
    """Return (B, 3, size, size) noise of unit variance, near normal."""
    pixels = torch.arange(_SLOTS + 1, _SLOTS + 1 + size * size, dtype=torch.int64)
    bits = _mix(keys[:, None] + pixels * 0x632BE59BD9B4E019)
    # Four 16-bit fields of a hash; the sum of two uniforms is triangular, which is near enough.
    fields = [((bits >> shift) & 0xFFFF).float() for shift in (0, 16, 32, 48)]
    channels = [(fields[i] + fields[i + 1] - 65535) * (math.sqrt(6) / 65536) for i in range(3)]
    return torch.stack(channels, 1).view(-1, 3, size, size)
