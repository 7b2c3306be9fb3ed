"""One run of `qtool train demoire`: by steps or by the clock, measured, and resumable."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from torch import Tensor, nn

from qtool.api.runtime import bfloat16_is_faster, notice
from qtool.api.synthesize import read_tensor_file
from qtool.errors import CheckpointError, Progress
from qtool.io import container
from qtool.methods.processes import agreed, processes, rank
from qtool.methods.undem.batches import BatchSource
from qtool.methods.undem.training import (
    RestorationTrainer,
    TrainingConfig,
    held_out_psnr,
)
from qtool.settings.train import TrainDemoireSettings

_HELD_OUT_SAMPLES = 64
_TRIAL_STEPS = 3
_READ_EVERY = 20
"""Steps between two looks at the loss, each of which a GPU has to wait for."""

_SAVE_SECONDS = 60.0
_BEST = "best/"
_FACTS = "facts"


class _Untouched(nn.Module):
    """The network that does nothing, to compare with."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class TrainRun:
    """One training with measurements, a state file and the best weights so far.

    Args:
        settings: What was asked for.
        network: The network, where it is to be trained.
        train: Batches to train on.
        held_out: Batches to measure on.
        identity: What a run must have in common with the one whose state it takes up.
        started: When the work began, on the monotonic clock; a budget counts from there.
    """

    def __init__(
        self,
        settings: TrainDemoireSettings,
        network: nn.Module,
        train: BatchSource,
        held_out: BatchSource,
        *,
        identity: list[Any],
        started: float,
    ) -> None:
        self.started = started
        self.settings, self.held_out = settings, held_out
        self.state_path = settings.out.with_name(f".{settings.out.name}.resume")
        self.device = next(network.parameters()).device
        self.config = self._configured(settings.steps)
        self.source = train
        self.network = network
        self.scores = {
            "untouched": self._score(_Untouched()),
            "before": self._score(network.eval()),
        }
        self.scores["after"] = self.scores["before"]
        self.best = _copied(network)
        self.best_step = 0
        self.seconds = 0.0
        chosen = (settings.batch_size, settings.crop, settings.learning_rate, settings.init)
        self.identity = json.dumps([*identity, *chosen, settings.seed], sort_keys=True)
        saved = self._read() if settings.resume and self.state_path.exists() else None
        if saved is not None:
            self.config = self._configured(saved[0]["steps"])
        elif settings.budget is not None:
            self.config = self._configured(self._affordable(settings.budget))
        notice.info(
            "plan: %d steps of %d samples of %d pixels",
            self.config.steps,
            settings.batch_size * processes(),
            settings.crop,
        )
        self.trainer = RestorationTrainer(network, train, self.config)
        if saved is not None:
            self._take_up(*saved)

    def _configured(self, steps: int) -> TrainingConfig:
        return TrainingConfig(
            steps=steps,
            batch_size=self.settings.batch_size,
            learning_rate=self.settings.learning_rate,
            warmup=min(200, max(1, steps // 10)),
            seed=self.settings.seed,
            bfloat16=bfloat16_is_faster(self.device),
        )

    def _score(self, network: nn.Module) -> float:
        if rank() != 0:  # the first process measures and writes
            return 0.0
        psnr = held_out_psnr(
            network.to(self.device), self.held_out, count=_HELD_OUT_SAMPLES, seed=self.settings.seed
        )
        return round(psnr, 3)

    def _affordable(self, minutes: float) -> int:
        """Steps that should fit into a budget, by a few trial steps whose result is thrown away.

        A forecast for people and for the warm-up: it is the clock that ends the training.
        """
        before = {key: value.clone() for key, value in self.network.state_dict().items()}
        trial = RestorationTrainer(self.network, self.source, self.config)
        trial.step()
        self._wait()
        started = time.monotonic()
        for _ in range(_TRIAL_STEPS):
            trial.step()
        self._wait()
        seconds = (time.monotonic() - started) / _TRIAL_STEPS
        self.network.load_state_dict(before)
        # A measurement costs about as much as its samples in training, forward only.
        measuring = _HELD_OUT_SAMPLES / self.settings.batch_size / 3 / self.settings.save_every
        left = max(0.0, 60 * minutes - (time.monotonic() - self.started))
        steps = int(agreed(max(1, int(left / (seconds * (1 + measuring)))), self.device))
        notice.info("plan: %.2f s a step, %d steps in %g minutes", seconds, steps, minutes)
        return steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        metadata, tensors = read_tensor_file(self.state_path)
        if metadata.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.state_path} was left by a run with other settings or pictures",
                remedy="repeat the settings of that run, or delete the file to start again",
            )
        return container.strict_json(metadata[_FACTS]), tensors

    def _take_up(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.scores, self.best_step = facts["scores"], facts["best_step"]
        self.seconds = facts["seconds"]
        self.best = {k[len(_BEST) :]: v for k, v in tensors.items() if k.startswith(_BEST)}
        self.trainer.load_state({k: v for k, v in tensors.items() if not k.startswith(_BEST)})

    def _save(self) -> None:
        if rank() != 0:
            return
        facts = {
            "steps": self.config.steps,
            "scores": self.scores,
            "best_step": self.best_step,
            "seconds": self.seconds,
        }
        tensors = self.trainer.state() | {f"{_BEST}{k}": v for k, v in self.best.items()}
        metadata = {"identity": self.identity, _FACTS: json.dumps(facts)}
        container.write_container(self.state_path, metadata, tensors, overwrite=True)

    def train(self, progress: Progress | None) -> None:
        """Train to the end, keeping the weights that did best on held-out samples."""
        steps, limit = self.config.steps, 60 * (self.settings.budget or 0)
        before, started, saved = self.seconds, self.started, time.monotonic()
        loss, measuring = 0.0, 0.0
        ended = self.seconds >= limit if limit else self.trainer.step_index >= steps
        while not ended:
            found = self.trainer.step(self.seconds / limit if limit else None)
            step = self.trainer.step_index
            if found is not None and step % _READ_EVERY == 1:
                loss = float(found)
            self.seconds = before + time.monotonic() - started
            if limit:
                self.seconds = agreed(self.seconds, self.device)
            ended = self.seconds + measuring >= limit if limit else step >= steps
            measured = ended or step % self.settings.save_every == 0
            if measured:
                self._measure(step)
                measuring = before + time.monotonic() - started - self.seconds
                measuring = agreed(measuring, self.device)
                self.seconds += measuring
            if progress is not None:
                done, total = (round(self.seconds), round(limit)) if limit else (step, steps)
                note = f"loss {loss:.3f}, held out {self.scores['after']:.2f} dB"
                progress("train", min(done, total), total, note)
            if measured or time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                self._save()

    def _measure(self, step: int) -> None:
        score = self._score(self.trainer.average)
        if score > self.scores["after"]:
            self.best = _copied(self.trainer.average)
            self.scores["after"], self.best_step = score, step


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.cpu().contiguous().clone() for key, value in network.state_dict().items()}
