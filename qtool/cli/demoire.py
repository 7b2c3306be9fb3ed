"""`qtool demoire`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.console import write_bytes
from qtool.cli.options import MACHINE, OUTPUT, add_command, argument, option
from qtool.cli.session import session
from qtool.errors import UsageError
from qtool.settings.demoire import (
    BitDepth,
    DemoireSettings,
    Format,
    Head,
    MetadataPolicy,
    Network,
    OnError,
    Transform,
)

_INPUT = "Photographs"
_NETWORK = "Network"


def demoire(
    ctx: typer.Context,
    paths: Annotated[list[str] | None, argument(DemoireSettings, "paths", metavar="PATH")] = None,
    strength: Annotated[
        float | None, option(DemoireSettings, "strength", "--strength", metavar="0..1")
    ] = None,
    keep_colour: Annotated[
        bool | None, option(DemoireSettings, "keep_colour", "--keep-colour/--restore-screen")
    ] = None,
    mask: Annotated[Path | None, option(DemoireSettings, "mask", "--mask", metavar="FILE")] = None,
    force: Annotated[bool | None, option(DemoireSettings, "force", "--force")] = None,
    files_from: Annotated[
        str | None,
        option(DemoireSettings, "files_from", "--files-from", panel=_INPUT, metavar="FILE|-"),
    ] = None,
    recursive: Annotated[
        bool | None,
        option(DemoireSettings, "recursive", "--recursive/--no-recursive", "-r", panel=_INPUT),
    ] = None,
    include: Annotated[
        list[str] | None,
        option(DemoireSettings, "include", "--include", panel=_INPUT, metavar="GLOB"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        option(DemoireSettings, "exclude", "--exclude", panel=_INPUT, metavar="GLOB"),
    ] = None,
    first_frame: Annotated[
        bool | None, option(DemoireSettings, "first_frame", "--first-frame", panel=_INPUT)
    ] = None,
    on_error: Annotated[
        OnError | None, option(DemoireSettings, "on_error", "--on-error", panel=_INPUT)
    ] = None,
    model: Annotated[
        Network | None, option(DemoireSettings, "model", "--model", "-m", panel=_NETWORK)
    ] = None,
    weights: Annotated[
        Path | None,
        option(DemoireSettings, "weights", "--weights", panel=_NETWORK, metavar="FILE"),
    ] = None,
    head: Annotated[Head | None, option(DemoireSettings, "head", "--head", panel=_NETWORK)] = None,
    transform: Annotated[
        Transform | None, option(DemoireSettings, "transform", "--transform", panel=_NETWORK)
    ] = None,
    out: Annotated[
        str | None,
        option(DemoireSettings, "out", "--out", "-o", panel=OUTPUT, metavar="DIR|FILE|-"),
    ] = None,
    output_format: Annotated[
        Format | None, option(DemoireSettings, "output_format", "--format", panel=OUTPUT)
    ] = None,
    quality: Annotated[
        int | None, option(DemoireSettings, "quality", "--quality", panel=OUTPUT)
    ] = None,
    bit_depth: Annotated[
        BitDepth | None, option(DemoireSettings, "bit_depth", "--bit-depth", panel=OUTPUT)
    ] = None,
    metadata: Annotated[
        MetadataPolicy | None, option(DemoireSettings, "metadata", "--metadata", panel=OUTPUT)
    ] = None,
    preview: Annotated[
        Path | None,
        option(DemoireSettings, "preview", "--preview", panel=OUTPUT, metavar="FILE.html"),
    ] = None,
    tile: Annotated[int | None, option(DemoireSettings, "tile", "--tile", panel=MACHINE)] = None,
    overlap: Annotated[
        int | None, option(DemoireSettings, "overlap", "--overlap", panel=MACHINE)
    ] = None,
    max_memory: Annotated[
        str | None,
        option(DemoireSettings, "max_memory", "--max-memory", panel=MACHINE, metavar="SIZE"),
    ] = None,
) -> int:
    """Take moire out of photographs."""
    with session(ctx, DemoireSettings) as run:
        from qtool.api.demoire import run as api

        settings = run.settings
        listed = _listed(settings)
        if settings.dry_run:
            return run.show(api.plan(settings, listed=listed))
        if settings.out == "-" and run.look.json:
            raise UsageError(
                "--out - writes a photograph to stdout, where --json would go too",
                remedy="leave out --json, or name a file with --out",
            )
        reads = "-" in (*settings.paths, *listed)
        result = api.demoire(
            settings,
            progress=run.progress,
            listed=listed,
            stdin=sys.stdin.buffer.read() if reads else None,
            sink=lambda content: write_bytes(content, sys.stdout),
        )
        if settings.out == "-":
            return result.exit_code
        return run.show(result)


def _listed(settings: DemoireSettings) -> list[str]:
    """Names from `--files-from`, separated by NUL if there is one, else by line.

    Raises:
        UsageError: The list cannot be read, or stdin is wanted twice.
    """
    if settings.files_from is None:
        return []
    if settings.files_from == "-":
        if "-" in settings.paths:
            raise UsageError(
                "stdin cannot be a photograph and a list at once",
                remedy="give one of them in a file",
            )
        content = sys.stdin.buffer.read()
    else:
        try:
            content = Path(settings.files_from).read_bytes()
        except OSError as error:
            raise UsageError(f"the list {settings.files_from}: {error.strerror}") from None
    separator = b"\0" if b"\0" in content else b"\n"
    names = (name.removesuffix(b"\r") for name in content.split(separator))
    return [name.decode(sys.getfilesystemencoding(), "surrogateescape") for name in names if name]


def register(app: typer.Typer, words: str) -> None:
    """Add the command to the program."""
    add_command(
        app,
        demoire,
        words=words,
        settings=DemoireSettings,
        examples=(
            "qtool demoire photos/ --out clean/",
            "qtool demoire photos/ --out clean/ --skip-existing --preview clean.html",
            "qtool demoire photo.jpg --out result.jpg --strength 0.7",
        ),
        details="Photographs without moire are passed on byte for byte. The network that comes "
        "with qtool was trained on simulated moire and on moire carried over from real "
        "photographs to other pictures, and only turns bands down. Larger networks make up "
        "what strong bands have hidden: do not rely on that for evidence or medicine.",
    )
