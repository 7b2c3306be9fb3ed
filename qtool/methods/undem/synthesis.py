"""Training of one moire synthesis network: an adversarial game over one group of patches.

A real moire patch gives the style of the bands, an unrelated clean patch the content. Generator and
both encoders are trained together, then the discriminator, on a buffer of older fakes as well.

Reference: UnDeM (arXiv 2401.02719), section "moire synthesis", equations 3 to 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.methods.training_state import load_optimizer_state, optimizer_state, under
from qtool.methods.undem.batches import cropped
from qtool.methods.undem.capture import Draw
from qtool.methods.undem.generator import (
    FeatureEncoder,
    MoireDiscriminator,
    MoireGenerator,
    Variant,
)

COLLAPSED = 1e-3
"""Variance over space of the moire features below which the encoder says nothing any more."""

_STEP, _BUFFER, _RANDOM, _PROBE = "step", "buffer", "generator", "probe"
_BALANCED = (0.3, 0.7)


@dataclass(frozen=True, kw_only=True)
class SynthesisConfig:
    """How a moire synthesis network is trained.

    Attributes:
        steps: Steps in all; the learning rate is constant for half of them, then falls to zero.
        batch_size: Patches a step.
        crop: Side of the crops, a multiple of 4.
        learning_rate: Of both optimisers.
        width: Channels of the generator.
        variant: Form of the generator's output.
        buffer: Fakes kept for the discriminator.
        seed: Of weights and crops.
    """

    steps: int
    crop: int
    batch_size: int = 1
    learning_rate: float = 2e-4
    width: int = 128
    variant: Variant = "own"
    buffer: int = 200
    seed: int = 628

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """How a state of the game does on crops that stay the same.

    Attributes:
        feature: Moire feature loss.
        content: Content feature loss.
        belief: What the discriminator says about fakes, on average.
        variance: Mean variance over space of the moire features of real moire.
    """

    feature: float
    content: float
    belief: float
    variance: float

    @property
    def balanced(self) -> bool:
        """Whether neither side has won."""
        return _BALANCED[0] <= self.belief <= _BALANCED[1]

    @property
    def loss(self) -> float:
        """What checkpoints are compared by."""
        return self.feature + self.content


def best_probe(probes: Sequence[Probe]) -> int:
    """Index of the lowest loss among balanced probes; the last one when none is balanced."""
    balanced = [index for index, probe in enumerate(probes) if probe.balanced]
    return min(balanced, key=lambda index: probes[index].loss, default=len(probes) - 1)


class ReplayBuffer:
    """Fakes of earlier steps: filled first, then every second fake is swapped for a stored one.

    Args:
        size: Fakes kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.stored: list[Tensor] = []

    def exchange(self, fakes: Tensor, draw: Draw) -> Tensor:
        """Hand in fakes (B, 3, S, S), get as many back."""
        handed: list[Tensor] = []
        for fake in fakes.detach():
            if len(self.stored) < self.size:
                self.stored.append(fake)
                handed.append(fake)
            elif draw.chance(0.5):
                index = draw.index(self.size)
                handed.append(self.stored[index])
                self.stored[index] = fake
            else:
                handed.append(fake)
        return torch.stack(handed)


class MoireSynthesizer:
    """The game over one group of moire patches.

    Args:
        moire: Real moire patches (3, H, W) in 0..1, at least `crop` on each side.
        clean: Clean patches, from a pool that all groups share.
        config: How to train.
        device: Where to compute.
    """

    def __init__(
        self,
        moire: Sequence[Tensor],
        clean: Sequence[Tensor],
        config: SynthesisConfig,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.moire, self.clean, self.config = moire, clean, config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            networks = (
                FeatureEncoder(),
                FeatureEncoder(),
                MoireGenerator(width=config.width, variant=config.variant),
                MoireDiscriminator(),
            )
        self.encoder, self.content, self.generator, self.discriminator = (
            network.to(device) for network in networks
        )
        self.device = torch.device(device)
        self.random = torch.Generator().manual_seed(config.seed)
        self.buffer = ReplayBuffer(config.buffer)
        self.step_index = 0
        self.probes: list[Probe] = []
        painters = (self.encoder, self.content, self.generator)
        self.painting, self.judging = (
            torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.5, 0.999))
            for parameters in (
                [parameter for network in painters for parameter in network.parameters()],
                list(self.discriminator.parameters()),
            )
        )
        probe_random = torch.Generator().manual_seed(config.seed + 1)
        self._probe_crops = self._crops(Draw(probe_random), count=4)

    def _crops(self, draw: Draw, *, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Two crops of a moire patch and one of a clean one, each (count, 3, S, S)."""
        side = self.config.crop
        first, second, clean = [], [], []
        for _ in range(count):
            patch = self.moire[draw.index(len(self.moire))]
            first.append(cropped(patch, side, draw))
            second.append(cropped(patch, side, draw))
            clean.append(cropped(self.clean[draw.index(len(self.clean))], side, draw))
        return (
            torch.stack(first).to(self.device),
            torch.stack(second).to(self.device),
            torch.stack(clean).to(self.device),
        )

    def step(self, done: float | None = None) -> dict[str, float]:
        """Update the painters, then the judge; return the losses.

        Args:
            done: Share of the work that is done, 0..1; by default that of the steps.
        """
        config = self.config
        share = min(1.0, 2 * (1 - (self.step_index / config.steps if done is None else done)))
        for optimizer in (self.painting, self.judging):
            optimizer.param_groups[0]["lr"] = config.learning_rate * share
        draw = Draw(self.random)
        moire, other, clean = self._crops(draw, count=config.batch_size)
        self.step_index += 1

        self.discriminator.requires_grad_(False)
        style = self.encoder(moire)
        fake = self.generator(style, clean)
        adversarial = (self.discriminator(fake) - 1).square().mean()
        feature = (style - self.encoder(fake)).abs().mean()
        content = (self.content(clean) - self.content(fake)).abs().mean()
        _update(self.painting, adversarial + feature + content)

        self.discriminator.requires_grad_(True)
        old = self.buffer.exchange(fake, draw)
        judged = (
            (self.discriminator(moire) - 1).square().mean()
            + (self.discriminator(other) - 1).square().mean()
            + self.discriminator(old).square().mean()
        ) / 3
        _update(self.judging, judged)
        losses = {
            "adversarial": adversarial,
            "feature": feature,
            "content": content,
            "discriminator": judged,
        }
        values = torch.stack([value.detach() for value in losses.values()]).tolist()
        return dict(zip(losses, values, strict=True))

    @torch.no_grad()
    def probe(self) -> Probe:
        """Judge the present state on crops that never change, and remember the result.

        Raises:
            QtoolError: The moire features have collapsed to a constant.
        """
        moire, _, clean = self._probe_crops
        style = self.encoder(moire)
        fake = self.generator(style, clean)
        probe = Probe(
            feature=float((style - self.encoder(fake)).abs().mean()),
            content=float((self.content(clean) - self.content(fake)).abs().mean()),
            belief=float(self.discriminator(fake).mean()),
            variance=float(style.var((2, 3)).mean()),
        )
        if not probe.variance >= COLLAPSED:
            raise QtoolError(
                f"training collapsed: the moire features vary by {probe.variance:.1e} only",
                remedy="train with another --seed, or with more moire photographs",
            )
        self.probes.append(probe)
        return probe

    @torch.no_grad()
    def sheet(self) -> list[Tensor]:
        """The probe's real moire, clean pictures and fakes, in rows of one kind."""
        moire, _, clean = self._probe_crops
        return [*moire, *clean, *self.generator(self.encoder(moire), clean).clamp(0, 1)]

    def painter(self) -> dict[str, Tensor]:
        """Weights of encoder and generator: all that painting needs."""
        parts = {"encoder": self.encoder, "generator": self.generator}
        return {
            f"{part}.{name}": value.detach().cpu().clone()
            for part, network in parts.items()
            for name, value in network.state_dict().items()
        }

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on as if never stopped."""
        tensors = {
            f"{part}/{name}": value
            for part, network in self._networks().items()
            for name, value in network.state_dict().items()
        }
        for part, optimizer in (("painting", self.painting), ("judging", self.judging)):
            tensors |= optimizer_state(optimizer, f"{part}/")
        if self.buffer.stored:
            tensors[_BUFFER] = torch.stack(self.buffer.stored)
        tensors[_RANDOM] = self.random.get_state()
        tensors[_STEP] = torch.tensor([self.step_index])
        tensors[_PROBE] = torch.tensor(
            [[p.feature, p.content, p.belief, p.variance] for p in self.probes],
            dtype=torch.float64,
        ).view(-1, 4)
        return {name: value.detach().cpu() for name, value in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned, for the same patches and configuration."""
        for part, network in self._networks().items():
            network.load_state_dict(under(f"{part}/", state))
        for part, optimizer in (("painting", self.painting), ("judging", self.judging)):
            load_optimizer_state(optimizer, f"{part}/", state)
        self.buffer.stored = list(state[_BUFFER].to(self.device)) if _BUFFER in state else []
        self.random.set_state(state[_RANDOM])
        self.step_index = int(state[_STEP])
        self.probes = [
            Probe(feature=row[0], content=row[1], belief=row[2], variance=row[3])
            for row in state[_PROBE].tolist()
        ]

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "encoder": self.encoder,
            "content": self.content,
            "generator": self.generator,
            "discriminator": self.discriminator,
        }


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
