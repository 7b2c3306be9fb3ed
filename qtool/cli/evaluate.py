"""`qtool eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from qtool.cli.options import (
    OUTPUT,
    add_command,
    argument,
    complete_models,
    complete_widths,
    option,
)
from qtool.cli.session import require_one_process, session
from qtool.settings.evaluate import EvaluateSettings, FidelityMetric, FidelityProtocol

_RESTORED = "Restored pictures"


def _complete_metrics(incomplete: str) -> list[str]:
    return [name for name in get_args(FidelityMetric) if name.startswith(incomplete)]


def evaluate(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        argument(EvaluateSettings, "target", metavar="TARGET", complete=complete_models),
    ] = None,
    data: Annotated[Path | None, option(EvaluateSettings, "data", "--data", metavar="DIR")] = None,
    baseline: Annotated[
        str | None,
        option(
            EvaluateSettings,
            "baseline",
            "--baseline",
            metavar="TARGET",
            complete=complete_models,
        ),
    ] = None,
    bits: Annotated[
        list[str] | None,
        option(
            EvaluateSettings, "bits", "--bits", "-b", metavar="N|wNaN", complete=complete_widths
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        option(EvaluateSettings, "reference", "--reference", panel=_RESTORED, metavar="DIR"),
    ] = None,
    protocol: Annotated[
        FidelityProtocol | None,
        option(EvaluateSettings, "protocol", "--protocol", panel=_RESTORED),
    ] = None,
    metric: Annotated[
        list[str] | None,
        option(
            EvaluateSettings,
            "metric",
            "--metric",
            panel=_RESTORED,
            metavar="METRIC",
            complete=_complete_metrics,
        ),
    ] = None,
    weights: Annotated[
        str | None, option(EvaluateSettings, "weights", "--weights", metavar="pretrained|FILE")
    ] = None,
    count: Annotated[int | None, option(EvaluateSettings, "count", "--count")] = None,
    limit: Annotated[int | None, option(EvaluateSettings, "limit", "--limit")] = None,
    batch_size: Annotated[
        int | None, option(EvaluateSettings, "batch_size", "--batch-size")
    ] = None,
    crop_pct: Annotated[float | None, option(EvaluateSettings, "crop_pct", "--crop-pct")] = None,
    latency: Annotated[bool | None, option(EvaluateSettings, "latency", "--latency")] = None,
    minimum: Annotated[
        list[str] | None, option(EvaluateSettings, "minimum", "--min", metavar="METRIC=VALUE")
    ] = None,
    report: Annotated[
        Path | None,
        option(EvaluateSettings, "report", "--report", panel=OUTPUT, metavar="FILE"),
    ] = None,
    overwrite: Annotated[
        bool | None, option(EvaluateSettings, "overwrite", "--overwrite", panel=OUTPUT)
    ] = None,
) -> int:
    """Measure a model."""
    with session(ctx, EvaluateSettings) as run:
        require_one_process(ctx)
        from qtool.api import evaluate as api

        if run.settings.dry_run:
            return run.show(api.plan(run.settings))
        return run.show(api.evaluate(run.settings, progress=run.progress))


def register(app: typer.Typer, words: str) -> None:
    """Add the command to the program."""
    add_command(
        app,
        evaluate,
        words=words,
        settings=EvaluateSettings,
        examples=(
            "qtool eval demo_vit-w4a4.safetensors --baseline demo_vit",
            "qtool eval vit_b-w4a4.safetensors --data imagenet/val --report report.html",
            "qtool eval vit_b-any4-8.safetensors --bits 8 --bits 4 --data imagenet/val",
            "qtool eval clean/ --reference targets/ --baseline photos/ --protocol uhdm",
        ),
    )
