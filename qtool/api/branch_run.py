"""One training of a network of branches: epochs, measurements, a state that survives a kill."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from torch import Tensor

from qtool.api import branch_data
from qtool.api.branch_data import Pictures
from qtool.api.runtime import bfloat16_is_faster, notice
from qtool.api.synthesize import read_tensor_file
from qtool.errors import CheckpointError, ImageError, Progress
from qtool.io import container
from qtool.methods.multiquant.branch_training import (
    BranchTrainer,
    BranchTraining,
    accuracy,
)
from qtool.methods.multiquant.branches import BranchedClassifier, observe
from qtool.methods.processes import processes, rank
from qtool.settings.quantize import QuantizeSettings

_SAVE_SECONDS = 60.0
_OBSERVED = 64
_SHOWN = 10
_FACTS = "facts"


class BranchRun:
    """A training that can be stopped at any moment and taken up again with `--resume`.

    Args:
        settings: Epochs, batch size, learning rate, seed, and the output the state lies beside.
        network: Trained in place.
        train: Pictures to train on.
        held_out: Pictures to measure on.
        identity: What has to be the same for a state to be taken up.

    Attributes:
        epochs: One record per finished epoch: loss, and top-1 of every width on held-out pictures.
        seconds: Time spent, over all runs.

    Raises:
        CheckpointError: The state on disk belongs to other settings.
        ImageError: No picture can be read.
    """

    def __init__(
        self,
        settings: QuantizeSettings,
        network: BranchedClassifier,
        train: Pictures,
        held_out: Pictures,
        *,
        identity: list[Any],
    ) -> None:
        self.settings, self.network = settings, network
        self.train_pictures, self.held_out = train, held_out
        self.state_path = settings.state
        self.per_epoch = branch_data.batches_in(len(train), settings.batch_size)
        device = next(network.parameters()).device
        self.config = BranchTraining(
            steps=settings.epochs * self.per_epoch,
            learning_rate=settings.learning_rate,
            distill="no-distillation" not in settings.ablate,
            bfloat16=bfloat16_is_faster(device),
        )
        self.trainer = BranchTrainer(network, self.config)
        self.epochs: list[dict[str, Any]] = []
        self.seconds = 0.0
        shape = [self.config.to_dict(), settings.batch_size, settings.seed, len(train)]
        self.identity = json.dumps([*identity, *shape], sort_keys=True)
        if settings.resume and self.state_path.exists():
            self._take_up()
        else:
            first = branch_data.training_batches(
                train,
                batch_size=min(_OBSERVED, settings.batch_size),
                epoch=0,
                seed=settings.seed,
            )
            for images, _ in first:
                observe(network, images.to(device))
                break
            else:
                raise ImageError("no picture could be read", remedy="check the files of the folder")

    def train(self, progress: Progress | None) -> None:
        """Train to the end, measuring after every epoch and saving now and then."""
        started = saved = time.monotonic()
        before = self.seconds
        settings, steps = self.settings, self.config.steps
        words = note = ""
        while len(self.epochs) < settings.epochs:
            epoch = len(self.epochs)
            losses: list[Tensor] = []
            batches = branch_data.training_batches(
                self.train_pictures,
                batch_size=settings.batch_size,
                epoch=epoch,
                seed=settings.seed,
                first=max(0, self.trainer.step_index - epoch * self.per_epoch),
                share=(rank(), processes()),
                workers=settings.workers,
            )
            for images, labels in batches:
                found = self.trainer.step(images, labels)
                losses.append(torch.stack(list(found.values())).mean())
                if progress is not None:
                    # A loss that is read waits for the device: now and then is enough.
                    if not words or self.trainer.step_index % _SHOWN == 0:
                        words = f"loss {float(losses[-1]):.3f}"
                    progress("train", self.trainer.step_index, steps, words + note)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    saved = time.monotonic()
                    self.seconds = before + saved - started
                    self._save()
            self.trainer.share_statistics()
            self._measure(losses)
            note = f", held out {_words(self.epochs[-1]['top1'])}"
            notice.info("epoch %d: held out %s", epoch + 1, _words(self.epochs[-1]["top1"]))
            saved = time.monotonic()
            self.seconds = before + saved - started
            self._save()

    def _measure(self, losses: list[Tensor]) -> None:
        """Add the record of an epoch; other processes than the first measure nothing."""
        batches = branch_data.measuring_batches(
            self.held_out, batch_size=self.settings.batch_size, workers=self.settings.workers
        )
        found = accuracy(self.network, batches) if rank() == 0 else {}
        top1 = {f"w{width}a{width}": round(100 * share, 2) for width, share in found.items()}
        loss = float(torch.stack(losses).mean()) if losses else None
        self.epochs.append({"epoch": len(self.epochs) + 1, "loss": loss, "top1": top1})

    def _save(self) -> None:
        if rank() != 0:
            return
        facts = {"epochs": self.epochs, "seconds": self.seconds}
        metadata = {"identity": self.identity, _FACTS: json.dumps(facts)}
        container.write_container(self.state_path, metadata, self.trainer.state(), overwrite=True)

    def _take_up(self) -> None:
        metadata, tensors = read_tensor_file(self.state_path)
        if metadata.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.state_path} was left by a run with other settings or pictures",
                remedy="repeat the settings of that run, or delete the file to start again",
            )
        facts = container.strict_json(metadata[_FACTS])
        self.epochs, self.seconds = facts["epochs"], facts["seconds"]
        self.trainer.load_state(tensors)
        notice.info("going on at step %d of %d", self.trainer.step_index, self.config.steps)

    def forget(self) -> None:
        """Remove the state: the work is done."""
        self.state_path.unlink(missing_ok=True)


@torch.no_grad()
def float_accuracy(model: torch.nn.Module, pictures: Pictures, *, batch_size: int) -> float:
    """Top-1 of a float model in percent."""
    device = next(model.parameters()).device
    right = seen = 0
    images: Tensor
    for images, labels in branch_data.measuring_batches(pictures, batch_size=batch_size):
        choice = model(images.to(device)).argmax(dim=1)
        right += int((choice == labels.to(device)).sum())
        seen += len(labels)
    return round(100 * right / max(1, seen), 2)


def _words(top1: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.1f}" for name, value in top1.items())
