"""`qtool train demoire`: from pictures to a weight file."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.api.estimate import warm_seconds
from qtool.api.moire_data import near, read_pairs, read_pictures
from qtool.api.moire_training import adopt
from qtool.api.parallel import torchrun_group
from qtool.api.runtime import bfloat16_is_faster, choose_device, prepare
from qtool.api.train_run import TrainRun
from qtool.errors import Progress, UsageError
from qtool.io import container, folders
from qtool.io.atomic import sweep
from qtool.methods.processes import rank
from qtool.methods.undem.batches import BatchSource, InTurn, MixedBatches, Shares
from qtool.methods.undem.denoise import PaintedBatches
from qtool.methods.undem.mixer import flat_patterns
from qtool.models import demoire, demoire_weights
from qtool.report import Result, Table
from qtool.settings.train import TrainDemoireSettings

COMMAND = "train demoire"
BUNDLED, NONE = "bundled", "none"

HELD_OUT = 10
"""One of so many pictures is kept for measuring."""

_BESIDE = 1.4
"""Time of a training step in that of forward and backward: batches, optimiser, measurements."""

_PATTERN = 96
"""Side of the band patterns: few photographs have larger parts that are flat and grey."""

_WIDTHS = {"bandgate": ("width",), "esdnet_s": ("encoder_width", "decoder_width")}
_RESIDUAL = ("esdnet", "esdnet_l")
"""Networks that learn from scratch what to add to their input: they start as the identity, which a
short training never reaches otherwise."""


def plan_demoire(settings: TrainDemoireSettings) -> Result:
    """What `train_demoire` would do, and how long it would take; reads no picture."""
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
    device = choose_device(settings.device)
    name, _, network = _network(settings)
    if settings.budget is None:
        seconds = settings.steps * _seconds_per_step(network.to(device), settings)
    else:
        seconds = 60 * settings.budget
    summary = {
        "model": name,
        "init": settings.init,
        "pictures": counts,
        "steps": None if settings.budget else settings.steps,
        "budget_minutes": settings.budget,
        "estimated_seconds": math.ceil(seconds),
        "batch_size": settings.batch_size,
        "crop": settings.crop,
        "device": str(device),
        "output": str(settings.out),
        "skipped": False,
    }
    return Result(COMMAND, status="planned", summary=summary)


def train_demoire(settings: TrainDemoireSettings, progress: Progress | None = None) -> Result:
    """Train a demoire network and write the weights that did best on held-out samples.

    The processes of torchrun train together, each on `batch_size` samples a step; the first one
    measures and writes.

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
    with torchrun_group():
        return _train(settings, progress if rank() == 0 else None)


def _train(settings: TrainDemoireSettings, progress: Progress | None) -> Result:
    started = time.monotonic()
    sweep(settings.out.parent)
    device = prepare(settings)
    name, arguments, network = _network(settings)
    train, held_out, facts = _sources(settings, device)
    run = TrainRun(
        settings,
        network.to(device),
        train,
        held_out,
        identity=[name, arguments, facts],
        started=started,
    )
    run.train(progress)
    if rank() != 0:
        return Result(COMMAND, summary={"rank": rank(), "status": "trained"})
    recipe = run.config.to_dict() | {"crop": settings.crop, "optimizer": "AdamW"}
    if settings.budget is not None:
        recipe |= {"steps": run.trainer.step_index, "minutes": settings.budget}
    provenance = {
        "data": facts,
        "init": settings.init,
        "recipe": recipe,
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
        "steps": run.trainer.step_index,
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


def _seconds_per_step(network: nn.Module, settings: TrainDemoireSettings) -> float:
    """Time the network forwards and backwards, and what a step does besides on top."""
    device = next(network.parameters()).device
    x = torch.rand(settings.batch_size, 3, settings.crop, settings.crop, device=device)

    def compute() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_faster(device)):
            outputs = network(x)
        torch.stack([output.float().mean() for output in outputs]).sum().backward()

    return _BESIDE * warm_seconds(compute, device)


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
        if settings.model in _RESIDUAL:
            arguments["residual"] = True
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
        pairs, held_pairs = near(whole, device).split(HELD_OUT)
    clean = held_clean = None
    if settings.clean is not None:
        pictures = read_pictures(settings.clean, smallest=settings.crop)
        facts["clean"] = len(pictures)
        clean, held_clean = near(pictures, device).split(HELD_OUT)
    patterns: tuple[list[Tensor], list[Tensor]] = ([], [])
    painted: tuple[list[BatchSource], list[BatchSource]] = ([], [])
    if settings.moire is not None:
        photos = read_pictures(settings.moire, smallest=max(_PATTERN, settings.crop))
        facts["moire"] = len(photos)
        parts = near(photos, device).split(HELD_OUT)
        for found, part in zip(patterns, parts, strict=True):
            for photo in part:
                found += flat_patterns(photo, size=_PATTERN)
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
