"""`qtool synthesize images` and `qtool synthesize moire`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from qtool.cli.options import OUTPUT, add_command, argument, complete_models, option
from qtool.cli.session import require_one_process, session
from qtool.settings.base import Effort
from qtool.settings.moire import MoireSettings, MoireTone
from qtool.settings.synthesize import SynthesisMethod, SynthesisPart, SynthesizeSettings


def _complete_parts(incomplete: str) -> list[str]:
    return [name for name in get_args(SynthesisPart) if name.startswith(incomplete)]


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
    ablate: Annotated[
        list[str] | None,
        option(
            SynthesizeSettings,
            "ablate",
            "--ablate",
            metavar="PART",
            complete=_complete_parts,
        ),
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


def moire(
    ctx: typer.Context,
    moire: Annotated[Path | None, option(MoireSettings, "moire", "--moire", metavar="DIR")] = None,
    clean: Annotated[Path | None, option(MoireSettings, "clean", "--clean", metavar="DIR")] = None,
    simulate: Annotated[bool | None, option(MoireSettings, "simulate", "--simulate")] = None,
    count: Annotated[int | None, option(MoireSettings, "count", "--count")] = None,
    patch_size: Annotated[int | None, option(MoireSettings, "patch_size", "--patch-size")] = None,
    pages: Annotated[float | None, option(MoireSettings, "pages", "--pages")] = None,
    tone: Annotated[MoireTone | None, option(MoireSettings, "tone", "--tone")] = None,
    groups: Annotated[
        int | None, option(MoireSettings, "groups", "--groups", metavar="[1|2|4]")
    ] = None,
    steps: Annotated[int | None, option(MoireSettings, "steps", "--steps")] = None,
    budget: Annotated[
        float | None, option(MoireSettings, "budget", "--budget", metavar="MINUTES")
    ] = None,
    batch_size: Annotated[int | None, option(MoireSettings, "batch_size", "--batch-size")] = None,
    width: Annotated[int | None, option(MoireSettings, "width", "--width")] = None,
    denoise: Annotated[
        bool | None, option(MoireSettings, "denoise", "--denoise/--no-denoise")
    ] = None,
    generator: Annotated[
        Path | None, option(MoireSettings, "generator", "--generator", metavar="FILE")
    ] = None,
    save_generator: Annotated[
        Path | None,
        option(MoireSettings, "save_generator", "--save-generator", panel=OUTPUT, metavar="FILE"),
    ] = None,
    out: Annotated[
        Path | None, option(MoireSettings, "out", "--out", "-o", panel=OUTPUT, metavar="DIR")
    ] = None,
) -> int:
    """Make pairs with and without moire."""
    with session(ctx, MoireSettings) as run:
        require_one_process(ctx)
        from qtool.api import moire as api

        if run.settings.dry_run:
            return run.show(api.plan_moire(run.settings))
        return run.show(api.synthesize_moire(run.settings, progress=run.progress))


def register(app: typer.Typer, words: str) -> None:
    """Add `images` or `moire` to the group `synthesize`."""
    if words == "synthesize images":
        add_command(
            app,
            images,
            words=words,
            settings=SynthesizeSettings,
            examples=(
                "qtool synthesize images demo_vit -o pictures/",
                "qtool synthesize images vit_b -o pictures/ --count 64 --effort quick",
                "qtool synthesize images swin_t -o pictures/ --classes 0-9,17 --seed 1",
            ),
            details="Writes PNG files to look at, one safetensors file with the exact tensors, and "
            "a contact sheet.",
        )
    else:
        add_command(
            app,
            moire,
            words=words,
            settings=MoireSettings,
            examples=(
                "qtool synthesize moire --simulate --clean photos/ -o pairs/ --count 500",
                "qtool synthesize moire --moire screen/ --clean photos/ -o pairs/",
                "qtool synthesize moire --moire screen/ --clean photos/ -o p/ --groups 1",
            ),
            details="Without --simulate, a network learns to paint the moire of your photographs "
            "onto clean pictures of anything else. That takes hours without a GPU.",
        )
