"""Training of a demoire network on batches from anywhere, step by step and resumable.

AdamW with a short warm-up and half a cosine; a running average of the weights is what is measured
and kept, because a short training ends far from rest.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.methods.processes import average_gradients, processes, rank
from qtool.methods.training_state import load_optimizer_state, optimizer_state, under
from qtool.methods.undem.batches import BatchSource
from qtool.methods.undem.losses import EDGE_WEIGHT, mean_of_kept, restoration_loss

_NETWORK, _AVERAGE, _OPTIMIZER, _GENERATOR = "network/", "average/", "optimizer/", "generator"
_STEP = "step"
_SEED_STRIDE = 1_000_003
_GOOD_ENOUGH = 1e-4
"""Squared error, 40 dB, below which a sample is as good as it needs to be: without such a cap,
clean samples that come back exactly would outweigh all others."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a demoire network is trained.

    Attributes:
        steps: Optimiser steps in all.
        batch_size: Samples a step.
        learning_rate: The highest.
        warmup: Steps until then.
        average: Decay of the running average of the weights.
        edge_weight: Weight of the edge loss.
        harmless: Loss of a sample below which it counts little how much lower it is. The logarithm
            of loss plus this is minimised: a clean picture that is spoilt a little then weighs as
            much as strong moire that is left standing.
        clip: Largest norm of the gradient.
        seed: Of the batches.
        bfloat16: Whether the network runs in bfloat16.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 50
    average: float = 0.995
    edge_weight: float = EDGE_WEIGHT
    harmless: float = 0.15
    clip: float = 1.0
    seed: int = 0
    bfloat16: bool = False

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return asdict(self)


def rate_at(step: int, *, steps: int, warmup: int, done: float | None = None) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine down to a hundredth.

    Args:
        step: Steps taken so far.
        steps: Steps in all.
        warmup: Steps of the rise.
        done: Share of the work that is done, 0..1, where something else than steps decides on it.
    """
    if step < warmup:
        return (step + 1) / warmup
    position = (step - warmup) / max(1, steps - warmup) if done is None else done
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, position)))


class RestorationTrainer:
    """A demoire network in training, by one process or by several that average their gradients.

    Args:
        network: Takes (B, 3, S, S), returns pictures of several scales; trained in place.
        source: Where batches come from.
        config: How to train.
    """

    def __init__(self, network: nn.Module, source: BatchSource, config: TrainingConfig) -> None:
        self.device = next(network.parameters()).device
        if self.device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        self.network = network
        self.average = copy.deepcopy(network).eval().requires_grad_(False)
        self.source = source
        self.config = config
        self.step_index = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
        )

    def step(self, done: float | None = None) -> Tensor | None:
        """Take one step.

        Args:
            done: Share of the work that is done, see `rate_at`.

        Returns:
            Mean loss of the samples that were kept, or None when there was none. It stays on the
            device: reading it at every step would make a GPU wait.
        """
        config = self.config
        rate = rate_at(self.step_index, steps=config.steps, warmup=config.warmup, done=done)
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * rate
        if processes() > 1:
            # Each process draws its own samples, and the first one's state serves all of them.
            place = self.step_index * processes() + rank()
            self.generator.manual_seed((config.seed * _SEED_STRIDE + place) % 2**63)
        batch = self.source.draw(config.batch_size, self.generator)
        self.step_index += 1
        empty = not bool(batch.kept.any())
        if empty and processes() == 1:
            return None
        self.network.train()
        moire, clean, kept = (
            part.to(self.device, non_blocking=True)
            for part in (batch.moire, batch.clean, batch.kept)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bfloat16):
            outputs = self.network(moire)
        losses = restoration_loss(
            [output.float() for output in outputs], clean, edge_weight=config.edge_weight
        )
        logarithms = (losses + config.harmless).log()
        # The others wait for gradients, of whatever size.
        loss = 0.0 * logarithms.sum() if empty else mean_of_kept(logarithms, kept)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.network.parameters())
        nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimizer.step()
        self._update_average()
        return None if empty else mean_of_kept(losses.detach(), kept)

    def _update_average(self) -> None:
        # Early on the average must not remember the untrained weights.
        decay = min(self.config.average, (1 + self.step_index) / (10 + self.step_index))
        average: list[Tensor] = list(self.average.parameters())
        network: list[Tensor] = list(self.network.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(average, network, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on as if never stopped."""
        tensors = {f"{_NETWORK}{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"{_AVERAGE}{k}": v for k, v in self.average.state_dict().items()}
        tensors |= optimizer_state(self.optimizer, _OPTIMIZER)
        tensors[_GENERATOR] = self.generator.get_state()
        tensors[_STEP] = torch.tensor([self.step_index])
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` returned, for the same network and configuration."""
        self.network.load_state_dict(under(_NETWORK, state))
        self.average.load_state_dict(under(_AVERAGE, state))
        load_optimizer_state(self.optimizer, _OPTIMIZER, state)
        self.generator.set_state(state[_GENERATOR])
        self.step_index = int(state[_STEP])


@torch.inference_mode()
def held_out_psnr(
    network: nn.Module, source: BatchSource, *, count: int, seed: int, batch_size: int = 8
) -> float:
    """Mean PSNR in decibels, at most 40, of restored samples that were never trained on.

    Args:
        network: In evaluation mode.
        source: Draws the samples.
        count: Number of samples.
        seed: Chooses them; equal seeds choose equal samples.
        batch_size: Samples run together.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    values: list[Tensor] = []
    for start in range(0, count, batch_size):
        batch = source.draw(min(batch_size, count - start), generator)
        clean = batch.clean.to(device)
        output = result_of(network(batch.moire.to(device)), clean).clamp(0, 1)
        error = (output - clean).square().mean((1, 2, 3)).clamp_min(_GOOD_ENOUGH)
        values.append((-10 * error.log10()).cpu())
    return float(torch.cat(values).mean())


def result_of(outputs: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """The picture among a network's outputs that has the size of the input."""
    return next(output for output in outputs if output.shape == like.shape)
