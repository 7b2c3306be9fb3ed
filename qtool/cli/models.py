"""`qtool models` and `qtool info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import add_command, argument, complete_models
from qtool.cli.session import session
from qtool.settings.models import InfoSettings, ModelsSettings


def models(
    ctx: typer.Context,
    pattern: Annotated[
        str | None,
        argument(ModelsSettings, "pattern", metavar="GLOB", complete=complete_models),
    ] = None,
) -> int:
    """List models."""
    with session(ctx, ModelsSettings) as run:
        from qtool.api import models as api

        return run.show(api.list_models(run.settings, progress=run.progress))


def info(
    ctx: typer.Context,
    target: Annotated[Path | None, argument(InfoSettings, "target", metavar="CHECKPOINT")] = None,
) -> int:
    """Describe a checkpoint."""
    with session(ctx, InfoSettings) as run:
        from qtool.api import models as api

        return run.show(api.info(run.settings, progress=run.progress))


def register(app: typer.Typer) -> None:
    """Add both commands to the program."""
    add_command(
        app,
        models,
        name="models",
        settings=ModelsSettings,
        summary="List the models that can be used, with size, licence and paper.",
        examples=("qtool models", "qtool models 'swin_*'"),
    )
    add_command(
        app,
        info,
        name="info",
        settings=InfoSettings,
        summary="Describe a checkpoint from its header, without reading the weights.",
        examples=("qtool info vit_b-w4a4.safetensors", "qtool info vit_b-w4a4.safetensors --json"),
    )
