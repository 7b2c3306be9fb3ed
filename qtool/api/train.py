"""`qtool train demoire`: from pictures to a weight file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.api.moire_data import read_pairs, read_pictures
from qtool.api.moire_training import adopt
from qtool.api.runtime import bfloat16_is_faster, notice, planned_device, prepare
from qtool.api.synthesize import read_tensor_file
from qtool.errors import CheckpointError, Progress, UsageError
from qtool.io import container, folders
from qtool.io.atomic import sweep
from qtool.methods.undem.batches import BatchSource, InTurn, MixedBatches, Shares
from qtool.methods.undem.denoise import PaintedBatches
from qtool.methods.undem.mixer import flat_patterns
from qtool.methods.undem.training import (
    RestorationTrainer,
    TrainingConfig,
    held_out_psnr,
)
from qtool.models import demoire, demoire_weights
from qtool.report import Result, Table
from qtool.settings.train import TrainDemoireSettings

COMMAND = "train demoire"
BUNDLED, NONE = "bundled", "none"

HELD_OUT = 10
"""One of so many pictures is kept for measuring."""

_WIDTHS = {"bandgate": ("width",), "esdnet_s": ("encoder_width", "decoder_width")}
_HELD_OUT_SAMPLES = 64
_TRIAL_STEPS = 3
_SAVE_SECONDS = 60.0
_BEST = "best/"
_FACTS = "facts"


def plan_demoire(settings: TrainDemoireSettings) -> Result:
    """What `train_demoire` would do; reads no picture and no weights."""
    if not _check_output(settings):
        skipped = {"output": str(settings.out), "skipped": True}
        return Result(COMMAND, status="planned", summary=skipped)
    counts = {
        name: len(folders.find_images(folder))
        for name, folder in (
            ("pairs", settings.pairs and settings.pairs / "moire"),
            ("moire", settings.moire),
            ("clean", settings.clean),
        )
        if folder is not None
    }
    summary = {
        "model": settings.model,
        "init": settings.init,
        "pictures": counts,
        "steps": None if settings.budget else settings.steps,
        "budget_minutes": settings.budget,
        "batch_size": settings.batch_size,
        "crop": settings.crop,
        "device": planned_device(settings),
        "output": str(settings.out),
        "skipped": False,
    }
    return Result(COMMAND, status="planned", summary=summary)


def train_demoire(settings: TrainDemoireSettings, progress: Progress | None = None) -> Result:
    """Train a demoire network and write the weights that did best on held-out samples.

    Args:
        settings: What to train on, and for how long.
        progress: Told about every step.

    Returns:
        PSNR on held-out samples: untouched, before training and after it.

    Raises:
        QtoolError: One of its kinds, for wrong settings, unusable pictures or weights.
    """
    if not _check_output(settings):
        return Result(COMMAND, summary={"output": str(settings.out), "status": "skipped"})
    sweep(settings.out.parent)
    device = prepare(settings)
    name, arguments, network = _network(settings)
    train, held_out, facts = _sources(settings, device)
    run = _Run(settings, network.to(device), train, held_out, identity=[name, arguments, facts])
    run.train(progress)
    provenance = {
        "data": facts,
        "init": settings.init,
        "recipe": run.config.to_dict() | {"crop": settings.crop, "optimizer": "AdamW"},
        "steps_done": run.best_step,
        "seed": settings.seed,
        "held_out_psnr": run.scores,
    }
    halves = {key: value.half() for key, value in run.best.items()}
    metadata = demoire_weights.metadata(name, arguments, provenance)
    container.write_container(settings.out, metadata, halves, overwrite=True)
    run.state_path.unlink(missing_ok=True)
    summary = {
        "model": name,
        "steps": run.config.steps,
        "best_step": run.best_step,
        "held_out_psnr": run.scores,
        "gain": round(run.scores["after"] - run.scores["untouched"], 3),
        "seconds": round(run.seconds, 1),
        "output": str(settings.out),
    }
    table = Table(
        "PSNR on held-out samples, dB", ("pictures", "PSNR"), [list(x) for x in run.scores.items()]
    )
    item = {"path": str(settings.out), "output": str(settings.out), "status": "ok"}
    return Result(COMMAND, items=(item,), summary=summary, tables=(table,))


def _check_output(settings: TrainDemoireSettings) -> bool:
    return folders.check_output(
        settings.out,
        overwrite=settings.overwrite or settings.resume,
        skip_existing=settings.skip_existing,
    )


def _network(settings: TrainDemoireSettings) -> tuple[str, dict[str, Any], nn.Module]:
    """The network to start from, with its name and arguments."""
    wanted: dict[str, Any] = {}
    if settings.width is not None:
        if settings.model not in _WIDTHS:
            raise UsageError(
                f"{settings.model} has no free width", remedy=f"choose {' or '.join(_WIDTHS)}"
            )
        wanted = dict.fromkeys(_WIDTHS[settings.model], settings.width)
    if settings.init == NONE:
        arguments = {**demoire.find(settings.model).arguments, **wanted}
        return settings.model, arguments, demoire.build(settings.model, arguments)
    if wanted:
        raise UsageError(
            "--width is fixed by the weights to start from",
            remedy="leave it out, or start from --init none",
        )
    bundled = settings.init == BUNDLED
    path = demoire_weights.bundled_path() if bundled else Path(settings.init)
    loaded = demoire_weights.load_network(path, name=settings.model)
    return loaded.spec.name, dict(loaded.arguments), loaded.module


def _sources(
    settings: TrainDemoireSettings, device: torch.device
) -> tuple[BatchSource, BatchSource, dict[str, int]]:
    """Where training and held-out samples come from, and how much there is of each."""
    facts: dict[str, int] = {}
    pairs = held_pairs = None
    if settings.pairs is not None:
        whole = read_pairs(settings.pairs, smallest=settings.crop)
        facts["pairs"] = len(whole)
        pairs, held_pairs = whole.split(HELD_OUT)
    clean = held_clean = None
    if settings.clean is not None:
        pictures = read_pictures(settings.clean, smallest=settings.crop)
        facts["clean"] = len(pictures)
        clean, held_clean = pictures.split(HELD_OUT)
    patterns: tuple[list[Tensor], list[Tensor]] = ([], [])
    painted: tuple[list[BatchSource], list[BatchSource]] = ([], [])
    if settings.moire is not None:
        photos = read_pictures(settings.moire, smallest=settings.crop)
        facts["moire"] = len(photos)
        parts = photos.split(HELD_OUT)
        for found, part in zip(patterns, parts, strict=True):
            for photo in part:
                found += flat_patterns(photo, size=settings.crop)
        facts["patterns"] = sum(map(len, patterns))
        if settings.generator is not None:
            for sources, part, pool in zip(painted, parts, (clean, held_clean), strict=True):
                learnt = adopt(settings.generator, part, crop=settings.crop, device=device)
                sources.append(
                    PaintedBatches(learnt.painters, learnt.patches, pool or (), crop=settings.crop)
                )
    if not (pairs or patterns[0] or painted[0]):
        raise UsageError(
            "no band can be cut from these photographs: none shows anything flat and grey",
            remedy="photograph a grey page on the screen too, or learn with `synthesize moire`",
        )
    made = [
        MixedBatches(
            some_pairs or (),
            clean=some_clean or (),
            patterns=some_patterns,
            crop=settings.crop,
            shares=_shares(mixed_only=pairs is None),
            augment=augment,
        )
        for some_pairs, some_clean, some_patterns, augment in (
            (pairs, clean, patterns[0], True),
            (held_pairs, held_clean, patterns[1] or patterns[0], False),
        )
    ]
    train, held = (
        InTurn([own, *extra]) if extra else own for own, extra in zip(made, painted, strict=True)
    )
    return train, held, facts


def _shares(*, mixed_only: bool) -> Shares:
    return Shares(mixed=0.75) if mixed_only else Shares()


class _Untouched(nn.Module):
    """The network that does nothing, to compare with."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x,)


class _Run:
    """One training with measurements, a state file and the best weights so far."""

    def __init__(
        self,
        settings: TrainDemoireSettings,
        network: nn.Module,
        train: BatchSource,
        held_out: BatchSource,
        *,
        identity: list[Any],
    ) -> None:
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
        self.best = {key: value.cpu().clone() for key, value in network.state_dict().items()}
        self.best_step = 0
        self.seconds = 0.0
        self.identity = json.dumps([*identity, settings.batch_size, settings.seed], sort_keys=True)
        saved = self._read() if settings.resume and self.state_path.exists() else None
        if saved is not None:
            self.config = self._configured(saved[0]["steps"])
        elif settings.budget is not None:
            self.config = self._configured(self._affordable(settings.budget))
        notice.info(
            "plan: %d steps of %d samples of %d pixels",
            self.config.steps,
            settings.batch_size,
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
            warmup=min(50, max(1, steps // 10)),
            seed=self.settings.seed,
            bfloat16=bfloat16_is_faster(self.device),
        )

    def _score(self, network: nn.Module) -> float:
        psnr = held_out_psnr(
            network.to(self.device), self.held_out, count=_HELD_OUT_SAMPLES, seed=self.settings.seed
        )
        return round(psnr, 3)

    def _affordable(self, minutes: float) -> int:
        """Steps that fit into a budget, from a few trial steps whose result is thrown away."""
        before = {key: value.clone() for key, value in self.network.state_dict().items()}
        trial = RestorationTrainer(self.network, self.source, self.config)
        trial.step()
        started = time.monotonic()
        for _ in range(_TRIAL_STEPS):
            trial.step()
        seconds = (time.monotonic() - started) / _TRIAL_STEPS
        self.network.load_state_dict(before)
        # A measurement costs about as much as its samples in training, forward only.
        measuring = _HELD_OUT_SAMPLES / self.settings.batch_size / 3 / self.settings.save_every
        steps = max(1, int(60 * minutes / (seconds * (1 + measuring))))
        notice.info("plan: %.2f s a step, %d steps in %g minutes", seconds, steps, minutes)
        return steps

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
        self.best = {k[len(_BEST) :]: v for k, v in tensors.items() if k.startswith(_BEST)}
        self.trainer.load_state({k: v for k, v in tensors.items() if not k.startswith(_BEST)})

    def _save(self) -> None:
        facts = {
            "steps": self.config.steps,
            "scores": self.scores,
            "best_step": self.best_step,
        }
        tensors = self.trainer.state() | {f"{_BEST}{k}": v for k, v in self.best.items()}
        metadata = {"identity": self.identity, _FACTS: json.dumps(facts)}
        container.write_container(self.state_path, metadata, tensors, overwrite=True)

    def train(self, progress: Progress | None) -> None:
        """Train to the end, keeping the weights that did best on held-out samples."""
        started = saved = time.monotonic()
        steps = self.config.steps
        loss = 0.0
        while self.trainer.step_index < steps:
            loss = self.trainer.step() or loss
            step = self.trainer.step_index
            measured = step % self.settings.save_every == 0 or step == steps
            if measured:
                self._measure(step)
            if progress is not None:
                note = f"loss {loss:.3f}, held out {self.scores['after']:.2f} dB"
                progress("train", step, steps, note)
            if measured or time.monotonic() - saved > _SAVE_SECONDS:
                saved = time.monotonic()
                self._save()
        self.seconds = time.monotonic() - started

    def _measure(self, step: int) -> None:
        score = self._score(self.trainer.average)
        if score > self.scores["after"]:
            average = self.trainer.average.state_dict()
            self.best = {key: value.cpu().clone() for key, value in average.items()}
            self.scores["after"], self.best_step = score, step
