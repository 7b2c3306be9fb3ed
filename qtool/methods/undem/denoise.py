"""Painted pairs, and the test that throws the damaged ones away.

A fake whose edges differ much from those of its clean source has lost content. In each group the
worst share is cut off, at a threshold that belongs to one generator and is measured anew for it.

Reference: UnDeM (arXiv 2401.02719), section "adaptive denoise".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import CheckpointError
from qtool.methods.undem.batches import Batch, cropped
from qtool.methods.undem.capture import Draw
from qtool.methods.undem.complexity import edges
from qtool.methods.undem.generator import FeatureEncoder, MoireGenerator, Variant

CUT_SHARES = (0.5, 0.4, 0.3, 0.2)
"""Share of fakes cut off in each of four groups, the least complex one first."""


def damage(clean: Tensor, fake: Tensor) -> Tensor:
    """Mean difference of edge strength, in 8-bit steps: two (B, 3, H, W) in 0..1 to (B,)."""
    return (edges(clean) - edges(fake)).abs().mean((1, 2, 3))


def cut_share(group: int, groups: int) -> float:
    """Share cut off in a group when there are `groups` of them: fewer groups take mean shares."""
    per = len(CUT_SHARES) // groups
    return sum(CUT_SHARES[group * per : (group + 1) * per]) / per


def threshold(scores: Tensor, share: float) -> float:
    """The score (N,) above which the worst `share` lies."""
    return float(torch.quantile(scores.float(), 1 - share))


@dataclass(frozen=True, kw_only=True)
class Painter:
    """A trained encoder and generator of one group.

    Attributes:
        encoder: E^m.
        generator: G^m.
        threshold: Largest damage that is let through.
    """

    encoder: FeatureEncoder
    generator: MoireGenerator
    threshold: float = float("inf")

    @torch.no_grad()
    def paint(self, moire: Tensor, clean: Tensor) -> Tensor:
        """Bands of moire crops on clean crops, both (B, 3, S, S): (B, 3, S, S) in 0..1."""
        device = next(self.encoder.parameters()).device
        fakes: Tensor = self.generator(self.encoder(moire.to(device)), clean.to(device))
        return fakes.clamp(0, 1).to(clean.device)


def painter_from(
    weights: Mapping[str, Tensor], *, variant: Variant, threshold: float, device: torch.device | str
) -> Painter:
    """Rebuild a painter from `MoireSynthesizer.painter`; its width is read from the weights.

    Raises:
        CheckpointError: The weights are not a painter's.
    """
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "generator": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value.float()
    try:
        width = len(parts["generator"]["conv1_b.1.weight"])
        encoder = FeatureEncoder()
        generator = MoireGenerator(width=width, variant=variant)
        encoder.load_state_dict(parts["encoder"])
        generator.load_state_dict(parts["generator"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            "the weights are not those of a moire generator",
            remedy="give a file written with --save-generator",
        ) from error
    return Painter(
        encoder=encoder.to(device).eval(),
        generator=generator.to(device).eval(),
        threshold=threshold,
    )


class PaintedBatches:
    """Pseudo pairs on the fly: each batch is painted by one group, chosen at random.

    Args:
        painters: One per group.
        moire: The moire patches of each group.
        clean: Clean patches, a pool for all groups.
        crop: Side of the crops.
        denoise: Whether damaged fakes are marked as not kept.
    """

    def __init__(
        self,
        painters: Sequence[Painter],
        moire: Sequence[Sequence[Tensor]],
        clean: Sequence[Tensor],
        *,
        crop: int,
        denoise: bool = True,
    ) -> None:
        self.painters = painters
        self.moire = moire
        self.clean = clean
        self.crop = crop
        self.denoise = denoise

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Draw `count` pseudo pairs."""
        draw = Draw(generator)
        return self.draw_group(draw.index(len(self.painters)), count, draw)

    def draw_group(self, group: int, count: int, draw: Draw) -> Batch:
        """Draw `count` pseudo pairs of one group."""
        patches = self.moire[group]
        moire, clean = [], []
        for _ in range(count):
            moire.append(cropped(patches[draw.index(len(patches))], self.crop, draw))
            clean.append(cropped(self.clean[draw.index(len(self.clean))], self.crop, draw))
        target = torch.stack(clean)
        painter = self.painters[group]
        fake = painter.paint(torch.stack(moire), target)
        kept = torch.ones(count)
        if self.denoise:
            kept = (damage(target, fake) <= painter.threshold).float()
        return Batch(moire=fake, clean=target, kept=kept)

    def measured_threshold(self, group: int, *, samples: int, seed: int) -> float:
        """The threshold that cuts off a group's share, from `samples` fresh fakes."""
        draw = Draw(torch.Generator().manual_seed(seed))
        scores: list[Tensor] = []
        for start in range(0, samples, 16):
            batch = self.draw_group(group, min(16, samples - start), draw)
            scores.append(damage(batch.clean, batch.moire))
        return threshold(torch.cat(scores), cut_share(group, len(self.painters)))
