"""Training batches for the demoire network: pairs, real bands on clean pictures, and no moire.

A part of every batch has nothing to remove, or only noise and JPEG blocks: what the network learns
from it is to leave clean pictures alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem import jpeg
from qtool.methods.undem.capture import Draw
from qtool.methods.undem.mixer import mixed, spread, turned
from qtool.methods.undem.sensor import noisy

PairSequence = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step sees.

    Attributes:
        moire: (B, 3, S, S) in 0..1.
        clean: (B, 3, S, S) in 0..1.
        kept: Which samples count, (B,), ones and zeros.
    """

    moire: Tensor
    clean: Tensor
    kept: Tensor


class BatchSource(Protocol):
    """Anything that can draw training batches."""

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw `count` samples; equal states of the generator give equal samples."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of the kinds of samples; a kind that has no source passes its share on to pairs.

    Attributes:
        mixed: Bands of real photographs laid on clean pictures.
        identity: Clean pictures that are to stay as they are.
        noise: Clean pictures with noise and JPEG blocks.
        faint: Of the pairs, those whose moire is made weaker.
    """

    mixed: float = 0.3
    identity: float = 0.2
    noise: float = 0.08
    faint: float = 0.5


class MixedBatches:
    """Batches of several kinds of samples.

    Args:
        pairs: Moire and clean pictures of equal size, at least `crop` on each side.
        clean: Clean pictures, at least `crop` on each side; may be empty.
        patterns: Gains from `flat_patterns`, of any size; may be empty.
        crop: Side S of the samples.
        shares: How many of which kind.
        augment: Whether samples are turned, mirrored, and have red and blue swapped at times.
    """

    def __init__(
        self,
        pairs: PairSequence,
        *,
        clean: Sequence[Tensor] = (),
        patterns: Sequence[Tensor] = (),
        crop: int,
        shares: Shares,
        augment: bool = True,
    ) -> None:
        self.pairs = pairs
        self.clean = clean
        self.patterns = patterns
        self.crop = crop
        self.shares = shares
        self.augment = augment

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw `count` samples."""
        draw = Draw(generator)
        moire, clean = zip(*(self._sample(draw) for _ in range(count)), strict=True)
        return Batch(moire=torch.stack(moire), clean=torch.stack(clean), kept=torch.ones(count))

    def _sample(self, draw: Draw) -> tuple[Tensor, Tensor]:
        shares = self.shares
        with_bands = shares.mixed if self.patterns else 0.0
        rest = 1 - with_bands - shares.identity - shares.noise
        kind = draw.pick(
            (self._pair, self._mixed, self._identity, self._noise),
            (rest if self.pairs else 0.0, with_bands, shares.identity, shares.noise),
        )
        moire, clean = kind(draw)
        if not self.augment:
            return moire, clean
        both = turned(torch.cat([moire, clean]), draw)
        if draw.chance(0.5):
            both = both.unflatten(0, (2, 3)).flip(1).flatten(0, 1)
        return both[:3], both[3:]

    def _pair(self, draw: Draw) -> tuple[Tensor, Tensor]:
        moire, clean = self.pairs[draw.index(len(self.pairs))]
        both = cropped(torch.cat([moire, clean]), self.crop, draw)
        moire, clean = both[:3], both[3:]
        if draw.chance(self.shares.faint):
            moire = torch.lerp(clean, moire, draw.uniform(0.15, 1.0))
        return moire, clean

    def _clean(self, draw: Draw) -> Tensor:
        """A part of a clean picture, at times reduced, or of the clean side of a pair."""
        if not self.clean or (self.pairs and draw.chance(0.3)):
            return cropped(self.pairs[draw.index(len(self.pairs))][1], self.crop, draw)
        picture = self.clean[draw.index(len(self.clean))]
        smallest = self.crop / min(picture.shape[-2:])
        if draw.chance(0.5) and smallest < 1:
            factor = draw.uniform(max(0.35, smallest), 1.0)
            wide = min(round(self.crop / factor) + 1, *picture.shape[-2:])
            return F.interpolate(
                cropped(picture, wide, draw)[None],
                size=(self.crop, self.crop),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )[0].clamp(0, 1)
        return cropped(picture, self.crop, draw)

    def _mixed(self, draw: Draw) -> tuple[Tensor, Tensor]:
        clean = self._clean(draw)
        if draw.chance(0.5):
            clean = clean * draw.uniform(0.6, 1.0)
        pattern = self.patterns[draw.index(len(self.patterns))]
        zoom = draw.uniform(0.7, 2.0) if draw.chance(0.5) else 1.0
        bands = turned(cropped(spread(pattern, self.crop, zoom=zoom), self.crop, draw), draw)
        return mixed(clean, bands, strength=draw.uniform(0.5, 1.8)), clean

    def _identity(self, draw: Draw) -> tuple[Tensor, Tensor]:
        clean = self._clean(draw)
        return clean, clean

    def _noise(self, draw: Draw) -> tuple[Tensor, Tensor]:
        clean = self._clean(draw)
        level = draw.uniform(0, 1)
        grainy = noisy(
            clean, gain=4e-4 * level, floor=(3e-3 * level) ** 2, generator=draw.generator
        )
        quality = 75 + draw.index(23)
        return jpeg.compressed(grainy, quality=quality, subsampled=draw.chance(0.7)), clean


class InTurn:
    """Batches of several sources, one source a batch, chosen at random.

    Args:
        sources: The sources, all equally likely.
    """

    def __init__(self, sources: Sequence[BatchSource]) -> None:
        self.sources = sources

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw `count` samples of one source."""
        return self.sources[Draw(generator).index(len(self.sources))].draw(count, generator)


def cropped(picture: Tensor, side: int, draw: Draw) -> Tensor:
    """A random square (..., side, side) of a picture (..., H, W)."""
    top = draw.index(picture.shape[-2] - side + 1)
    left = draw.index(picture.shape[-1] - side + 1)
    return picture[..., top : top + side, left : left + side]
