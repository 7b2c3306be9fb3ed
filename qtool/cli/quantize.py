"""`qtool quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from qtool.cli.options import OUTPUT, add_command, argument, complete_bits, complete_models, option
from qtool.cli.session import require_one_process, session
from qtool.settings.base import Effort
from qtool.settings.demoire import Network
from qtool.settings.quantize import Ablation, Budget, Engine, QuantizeSettings, Recipe

_PICTURES = "Calibration pictures (choose one source)"
_TRAINING = "Training (--engine branches)"


def _complete_ablations(incomplete: str) -> list[str]:
    return [name for name in get_args(Ablation) if name.startswith(incomplete)]


def _complete(incomplete: str) -> list[str]:
    """Short names of classifiers, then those of demoire networks."""
    networks = [name for name in get_args(Network) if name.startswith(incomplete)]
    return [*complete_models(incomplete), *networks]


def quantize(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        argument(QuantizeSettings, "model", metavar="MODEL", complete=_complete),
    ] = None,
    bits: Annotated[
        str | None,
        option(QuantizeSettings, "bits", "--bits", "-b", metavar="BITS", complete=complete_bits),
    ] = None,
    budget: Annotated[Budget | None, option(QuantizeSettings, "budget", "--budget")] = None,
    engine: Annotated[Engine | None, option(QuantizeSettings, "engine", "--engine")] = None,
    dedicated_2bit: Annotated[
        bool | None, option(QuantizeSettings, "dedicated_2bit", "--dedicated-2bit")
    ] = None,
    recipe: Annotated[Recipe | None, option(QuantizeSettings, "recipe", "--recipe")] = None,
    effort: Annotated[Effort | None, option(QuantizeSettings, "effort", "--effort")] = None,
    steps: Annotated[int | None, option(QuantizeSettings, "steps", "--steps")] = None,
    keep: Annotated[
        list[str] | None, option(QuantizeSettings, "keep", "--keep", metavar="GLOB=BITS")
    ] = None,
    skip: Annotated[
        list[str] | None, option(QuantizeSettings, "skip", "--skip", metavar="GLOB")
    ] = None,
    weights: Annotated[
        str | None, option(QuantizeSettings, "weights", "--weights", metavar="pretrained|FILE")
    ] = None,
    data_free: Annotated[
        bool | None, option(QuantizeSettings, "data_free", "--data-free", panel=_PICTURES)
    ] = None,
    calib: Annotated[
        Path | None,
        option(QuantizeSettings, "calib", "--calib", panel=_PICTURES, metavar="DIR"),
    ] = None,
    synthetic: Annotated[
        Path | None,
        option(QuantizeSettings, "synthetic", "--synthetic", panel=_PICTURES, metavar="DIR"),
    ] = None,
    count: Annotated[
        int | None, option(QuantizeSettings, "count", "--count", panel=_PICTURES)
    ] = None,
    train: Annotated[
        Path | None, option(QuantizeSettings, "train", "--train", panel=_TRAINING, metavar="DIR")
    ] = None,
    epochs: Annotated[
        int | None, option(QuantizeSettings, "epochs", "--epochs", panel=_TRAINING)
    ] = None,
    batch_size: Annotated[
        int | None, option(QuantizeSettings, "batch_size", "--batch-size", panel=_TRAINING)
    ] = None,
    learning_rate: Annotated[
        float | None, option(QuantizeSettings, "learning_rate", "--learning-rate", panel=_TRAINING)
    ] = None,
    ablate: Annotated[
        list[str] | None,
        option(
            QuantizeSettings,
            "ablate",
            "--ablate",
            panel=_TRAINING,
            metavar="PART",
            complete=_complete_ablations,
        ),
    ] = None,
    out: Annotated[
        str | None,
        option(QuantizeSettings, "out", "--out", "-o", panel=OUTPUT, metavar="FILE|DIR/"),
    ] = None,
    onnx: Annotated[
        Path | None,
        option(QuantizeSettings, "onnx", "--onnx", panel=OUTPUT, metavar="FILE.onnx"),
    ] = None,
    report: Annotated[
        Path | None,
        option(QuantizeSettings, "report", "--report", panel=OUTPUT, metavar="FILE"),
    ] = None,
    verify: Annotated[
        bool | None, option(QuantizeSettings, "verify", "--verify/--no-verify", panel=OUTPUT)
    ] = None,
) -> int:
    """Quantize a model."""
    with session(ctx, QuantizeSettings) as run:
        if run.settings.engine != "branches":
            require_one_process(ctx)
        from qtool.api import quantize as api

        if run.settings.dry_run:
            return run.show(api.plan(run.settings))
        return run.show(api.quantize(run.settings, progress=run.progress))


def register(app: typer.Typer, words: str) -> None:
    """Add the command to the program."""
    add_command(
        app,
        quantize,
        words=words,
        settings=QuantizeSettings,
        examples=(
            "qtool quantize demo_vit --bits w4a4 --data-free",
            "qtool quantize vit_b -b w4a8 --calib photos/ --keep 'head=8'",
            "qtool quantize resnet18 -b any:2-8 --engine branches --train classes/",
            "qtool quantize bandgate -b w8a8 --data-free",
        ),
        details="The file holds packed integers, scales and the recipe; nothing else is needed to "
        "load it. Of a demoire network it goes to `qtool demoire --weights FILE`; --data-free then "
        "calibrates on simulated moire.",
    )
