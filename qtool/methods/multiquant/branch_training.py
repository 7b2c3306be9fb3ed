"""Training of a network of branches, step by step and resumable.

In a step every width computes the batch, the widest first, and gradients add up. Weights and
BatchNorms move by SGD with momentum, scales by Adam; both learning rates fall by half a cosine.

Reference: MBQuant, arXiv 2305.08117; sections 2.10 and 2.11 of this project's notes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.methods.multiquant.branches import BranchedClassifier
from qtool.methods.multiquant.distillation import loss_weight, teacher_of, width_loss
from qtool.methods.processes import average, average_gradients
from qtool.methods.recording import Recorded
from qtool.methods.training_state import load_optimizer_state, optimizer_state, under
from qtool.quant.branch_sharing import SharedLevels
from qtool.quant.branch_simulation import SimulatedUnit

_NETWORK, _STEP = "network/", "step"
_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class BranchTraining:
    """How a network of branches is trained.

    Attributes:
        steps: Optimiser steps in all.
        learning_rate: The highest, of weights and BatchNorms.
        scale_rate: The highest of the logarithms of scales.
        weight_decay: Of weights and BatchNorms.
        distill: Whether the widest setting teaches the others.
        bfloat16: Whether convolutions run in bfloat16.
        channels_last: Whether channels lie next to each other in memory.
        replay: Whether a GPU records the gradients of a step and replays them.
    """

    steps: int
    learning_rate: float
    scale_rate: float = 1e-3
    weight_decay: float = 1e-4
    distill: bool = True
    bfloat16: bool = False
    channels_last: bool = True
    replay: bool = True

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return asdict(self)


def rate_at(step: int, steps: int) -> float:
    """Share of the highest learning rate: half a cosine down to zero."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


class BranchTrainer:
    """A network of branches in training; one process of several if torch.distributed runs.

    Args:
        network: Trained in place.
        config: How to train.
    """

    def __init__(self, network: BranchedClassifier, config: BranchTraining) -> None:
        self.network, self.config = network, config
        self.device = next(network.parameters()).device
        self.step_index = 0
        units = [m for m in network.modules() if isinstance(m, SimulatedUnit)]
        self.levels = SharedLevels(units, channels_last=config.channels_last)
        on_gpu = self.device.type == "cuda"
        self._gradients = Recorded(self._compute, active=on_gpu and config.replay)
        scales = [p for name, p in network.named_parameters() if _is_scale(name)]
        others = [p for name, p in network.named_parameters() if not _is_scale(name)]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "weights": torch.optim.SGD(
                others,
                lr=config.learning_rate,
                momentum=_MOMENTUM,
                weight_decay=config.weight_decay,
            ),
            "scales": torch.optim.Adam(scales, lr=config.scale_rate),
        }

    @property
    def replays(self) -> bool:
        """Whether gradients are computed by replaying a CUDA graph by now."""
        return self._gradients.replays

    def step(self, images: Tensor, labels: Tensor) -> dict[int, Tensor]:
        """Take one step.

        Args:
            images: (B, 3, H, W), normalised.
            labels: (B,).

        Returns:
            Loss of every width, (), on the device, until the next step.
        """
        config = self.config
        rate = rate_at(self.step_index, config.steps)
        for name, highest in (("weights", config.learning_rate), ("scales", config.scale_rate)):
            self.optimizers[name].param_groups[0]["lr"] = highest * rate
        self.network.train()
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        images = images.to(self.device, memory_format=layout)
        losses: dict[int, Tensor] = self._gradients(images, labels.to(self.device))
        average_gradients(self.network.parameters())
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step_index += 1
        return losses

    def _compute(self, images: Tensor, labels: Tensor) -> dict[int, Tensor]:
        """Compute the gradients of all widths, added up, and the loss of each."""
        network, config = self.network, self.config
        network.zero_grad(set_to_none=True)
        factor = loss_weight(len(network.selection))
        teacher: Tensor | None = None
        losses = {}
        with self.levels.held():
            for width in sorted(network.selection, reverse=True):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bfloat16):
                    logits = network.at(images, width).float()
                loss = width_loss(logits, labels, teacher)
                (factor * loss).backward()
                losses[width] = loss.detach()
                if config.distill and teacher is None:
                    teacher = teacher_of(logits)
        return losses

    def share_statistics(self) -> None:
        """Take the mean of the BatchNorm statistics of all processes."""
        average([buffer for buffer in self.network.buffers() if buffer.is_floating_point()])

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on as if never stopped."""
        tensors = {f"{_NETWORK}{k}": v for k, v in self.network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= optimizer_state(optimizer, f"{name}/")
        tensors[_STEP] = torch.tensor([self.step_index])
        return {name: value.detach().cpu() for name, value in tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned, for the same network and configuration."""
        self.network.load_state_dict(under(_NETWORK, state))
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, f"{name}/", state)
        self.step_index = int(state[_STEP])


@torch.no_grad()
def accuracy(
    network: BranchedClassifier, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[int, float]:
    """Share of pictures that every width classifies right.

    Args:
        network: Simulated or frozen; its mode is kept.
        batches: Images (B, 3, H, W) and labels (B,).
    """
    device = next(network.head.parameters()).device
    training = network.training
    network.eval()
    right = dict.fromkeys(sorted(network.selection), 0)
    seen = 0
    for images, labels in batches:
        seen += len(labels)
        for width in right:
            choice = network.at(images.to(device), width).argmax(dim=1)
            right[width] += int((choice == labels.to(device)).sum())
    network.train(training)
    return {width: number / max(1, seen) for width, number in right.items()}


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in ("log_weight_scale", "log_input_scale")
