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


def register(app: typer.Typer, words: str) -> None:
    """Add one of the two commands to the program."""
    if words == "models":
        add_command(
            app,
            models,
            words=words,
            settings=ModelsSettings,
            examples=("qtool models", "qtool models 'swin_*'"),
        )
    else:
        add_command(
            app,
            info,
            words=words,
            settings=InfoSettings,
            examples=(
                "qtool info vit_b-w4a4.safetensors",
                "qtool info vit_b-w4a4.safetensors --json",
            ),
        )
