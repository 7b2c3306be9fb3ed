"""`qtool switch-bits`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import OUTPUT, add_command, argument, complete_widths, option
from qtool.cli.session import require_one_process, session
from qtool.settings.switch_bits import SwitchBitsSettings


def switch_bits(
    ctx: typer.Context,
    target: Annotated[Path | None, argument(SwitchBitsSettings, "target", metavar="CKPT")] = None,
    bits: Annotated[
        str | None,
        option(
            SwitchBitsSettings, "bits", "--bits", "-b", metavar="N|wNaN", complete=complete_widths
        ),
    ] = None,
    layers: Annotated[
        list[str] | None, option(SwitchBitsSettings, "layers", "--layers", metavar="GLOB=BITS")
    ] = None,
    budget: Annotated[
        str | None, option(SwitchBitsSettings, "budget", "--budget", metavar="MB|%")
    ] = None,
    listing: Annotated[bool | None, option(SwitchBitsSettings, "listing", "--list")] = None,
    in_place: Annotated[
        bool | None, option(SwitchBitsSettings, "in_place", "--in-place", panel=OUTPUT)
    ] = None,
    out: Annotated[
        str | None,
        option(SwitchBitsSettings, "out", "--out", "-o", panel=OUTPUT, metavar="FILE|DIR/"),
    ] = None,
    drop_unused: Annotated[
        bool | None, option(SwitchBitsSettings, "drop_unused", "--drop-unused", panel=OUTPUT)
    ] = None,
    onnx: Annotated[
        Path | None,
        option(SwitchBitsSettings, "onnx", "--onnx", panel=OUTPUT, metavar="FILE.onnx"),
    ] = None,
) -> int:
    """Switch the widths of a checkpoint."""
    with session(ctx, SwitchBitsSettings) as run:
        require_one_process(ctx)
        from qtool.api import switch_bits as api

        return run.show(api.switch_bits(run.settings, progress=run.progress))


def register(app: typer.Typer, words: str) -> None:
    """Add the command to the program."""
    add_command(
        app,
        switch_bits,
        words=words,
        settings=SwitchBitsSettings,
        examples=(
            "qtool switch-bits vit.safetensors --list",
            "qtool switch-bits vit.safetensors --bits 4 --in-place",
            "qtool switch-bits vit.safetensors --budget 9MB --drop-unused -o b.safetensors",
            "qtool switch-bits vit.safetensors --bits 4 --onnx vit.onnx",
        ),
        details="Weights are neither copied nor quantized again: only the header of the file says "
        "which of its bits count.",
    )
