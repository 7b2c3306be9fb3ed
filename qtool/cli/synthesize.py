"""`qtool synthesize images`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import OUTPUT, add_command, argument, complete_models, option
from qtool.cli.session import session
from qtool.settings.base import Effort
from qtool.settings.synthesize import SynthesisMethod, SynthesizeSettings


def images(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        argument(SynthesizeSettings, "model", metavar="MODEL", complete=complete_models),
    ] = None,
    count: Annotated[int | None, option(SynthesizeSettings, "count", "--count")] = None,
    method: Annotated[
        SynthesisMethod | None, option(SynthesizeSettings, "method", "--method")
    ] = None,
    effort: Annotated[Effort | None, option(SynthesizeSettings, "effort", "--effort")] = None,
    steps: Annotated[int | None, option(SynthesizeSettings, "steps", "--steps")] = None,
    learning_rate: Annotated[
        float | None, option(SynthesizeSettings, "learning_rate", "--learning-rate")
    ] = None,
    batch_size: Annotated[
        int | None, option(SynthesizeSettings, "batch_size", "--batch-size")
    ] = None,
    weights: Annotated[
        str | None, option(SynthesizeSettings, "weights", "--weights", metavar="pretrained|FILE")
    ] = None,
    classes: Annotated[
        str | None, option(SynthesizeSettings, "classes", "--classes", metavar="LIST")
    ] = None,
    out: Annotated[
        Path | None,
        option(SynthesizeSettings, "out", "--out", "-o", panel=OUTPUT, metavar="DIR"),
    ] = None,
) -> int:
    """Synthesize calibration pictures."""
    with session(ctx, SynthesizeSettings) as run:
        from qtool.api import synthesize as api

        if run.settings.dry_run:
            return run.show(api.plan_images(run.settings))
        return run.show(api.synthesize_images(run.settings, progress=run.progress))


def register(app: typer.Typer) -> None:
    """Add `images` to the group `synthesize`."""
    add_command(
        app,
        images,
        name="images",
        settings=SynthesizeSettings,
        summary="Make calibration pictures from a classifier alone, without any data.",
        examples=(
            "qtool synthesize images demo_vit -o pictures/",
            "qtool synthesize images vit_b -o pictures/ --count 64 --effort quick",
            "qtool synthesize images swin_t -o pictures/ --classes 0-9,17 --seed 1",
        ),
        details="Writes PNG files to look at, one safetensors file with the exact tensors, and a "
        "contact sheet.",
    )
