"""`qtool train demoire`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import OUTPUT, add_command, argument, option
from qtool.cli.session import session
from qtool.settings.train import DemoireTraining, TrainDemoireSettings


def demoire(
    ctx: typer.Context,
    pairs: Annotated[
        Path | None, argument(TrainDemoireSettings, "pairs", metavar="[PAIRS]")
    ] = None,
    moire: Annotated[
        Path | None, option(TrainDemoireSettings, "moire", "--moire", metavar="DIR")
    ] = None,
    clean: Annotated[
        Path | None, option(TrainDemoireSettings, "clean", "--clean", metavar="DIR")
    ] = None,
    generator: Annotated[
        Path | None, option(TrainDemoireSettings, "generator", "--generator", metavar="FILE")
    ] = None,
    model: Annotated[
        DemoireTraining | None, option(TrainDemoireSettings, "model", "--model", "-m")
    ] = None,
    width: Annotated[int | None, option(TrainDemoireSettings, "width", "--width")] = None,
    init: Annotated[
        str | None, option(TrainDemoireSettings, "init", "--init", metavar="bundled|none|FILE")
    ] = None,
    steps: Annotated[int | None, option(TrainDemoireSettings, "steps", "--steps")] = None,
    budget: Annotated[
        float | None, option(TrainDemoireSettings, "budget", "--budget", metavar="MINUTES")
    ] = None,
    batch_size: Annotated[
        int | None, option(TrainDemoireSettings, "batch_size", "--batch-size")
    ] = None,
    crop: Annotated[int | None, option(TrainDemoireSettings, "crop", "--crop")] = None,
    learning_rate: Annotated[
        float | None, option(TrainDemoireSettings, "learning_rate", "--learning-rate")
    ] = None,
    save_every: Annotated[
        int | None, option(TrainDemoireSettings, "save_every", "--save-every")
    ] = None,
    out: Annotated[
        Path | None,
        option(TrainDemoireSettings, "out", "--out", "-o", panel=OUTPUT, metavar="FILE"),
    ] = None,
) -> int:
    """Train a demoire network."""
    with session(ctx, TrainDemoireSettings) as run:
        from qtool.api import train as api

        if run.settings.dry_run:
            return run.show(api.plan_demoire(run.settings))
        return run.show(api.train_demoire(run.settings, progress=run.progress))


def register(app: typer.Typer, words: str) -> None:
    """Add `demoire` to the group `train`."""
    add_command(
        app,
        demoire,
        words=words,
        settings=TrainDemoireSettings,
        examples=(
            "qtool train demoire --moire a/ --clean b/ -o mine.safetensors --budget 60",
            "qtool train demoire pairs/ --init none -o new.safetensors",
            "qtool train demoire pairs/ --moire a/ --clean b/ -o mine.safetensors",
        ),
        details="Photographs with moire and pictures without it need not show the same things. A "
        "tenth of everything is held out to measure on. The weights with the best result there "
        "are written.",
    )
