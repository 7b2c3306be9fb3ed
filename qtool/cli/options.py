"""Options that commands share, and how a command is put together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.models import ArgumentInfo, OptionInfo

from qtool.cli.commands import SUMMARIES
from qtool.cli.console import ColorMode
from qtool.quant.bits import WEIGHT_BITS
from qtool.settings.base import (
    DEVICES,
    Backend,
    CommonSettings,
    DType,
    OutputSettings,
    Settings,
    WriterSettings,
)

Complete = Callable[[str], list[str]]

OUTPUT = "Output"
MACHINE = "Machine"
TALK = "Talk and configuration"


def complete_models(incomplete: str) -> list[str]:
    """Aliases that start with what was typed; shells add files by themselves."""
    from qtool.models.registry import MODELS

    return [spec.alias for spec in MODELS if spec.alias.startswith(incomplete)]


def complete_bits(incomplete: str) -> list[str]:
    """All integer bit-widths, the equal ones first, then ranges for switchable files."""
    pairs = [(weight, activation) for weight in WEIGHT_BITS for activation in WEIGHT_BITS]
    pairs.sort(key=lambda pair: pair[0] != pair[1])
    names = [f"w{weight}a{activation}" for weight, activation in pairs]
    names += ["any", *(f"any:{low}-8" for low in WEIGHT_BITS[:-1])]
    return [name for name in names if name.startswith(incomplete)]


def complete_widths(incomplete: str) -> list[str]:
    """Widths of a switchable checkpoint: bits of weights alone, then with those of activations."""
    names = [str(bits) for bits in WEIGHT_BITS]
    names += [f"w{bits}a{bits}" for bits in WEIGHT_BITS]
    return [name for name in names if name.startswith(incomplete)]


def complete_devices(incomplete: str) -> list[str]:
    """Device names without a number."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def option(
    settings: type[Settings],
    field: str,
    *flags: str,
    panel: str | None = None,
    metavar: str | None = None,
    complete: Complete | None = None,
) -> OptionInfo:
    """An option whose help and default come from a field of the settings."""
    info: OptionInfo = typer.Option(
        *flags,
        help=_help(settings, field),
        metavar="" if settings.model_fields[field].annotation is bool else metavar,
        autocompletion=complete,
        rich_help_panel=panel,
        show_default=False,
    )
    return info


def argument(
    settings: type[Settings], field: str, *, metavar: str, complete: Complete | None = None
) -> ArgumentInfo:
    """An argument whose help comes from a field of the settings."""
    info: ArgumentInfo = typer.Argument(
        help=_help(settings, field), metavar=metavar, autocompletion=complete, show_default=False
    )
    return info


def _help(settings: type[Settings], field: str) -> str:
    info = settings.model_fields[field]
    text = (info.description or "").replace("[", r"\[")
    if info.is_required():
        return rf"{text} [dim]\[required][/dim]"
    if info.default in (None, "", ()) or isinstance(info.default, bool):
        return text
    return rf"{text} [dim]\[default: {info.default}][/dim]"


def _common(
    device: Annotated[
        str | None,
        option(
            CommonSettings,
            "device",
            "--device",
            panel=MACHINE,
            metavar="DEVICE",
            complete=complete_devices,
        ),
    ] = None,
    dtype: Annotated[
        DType | None, option(CommonSettings, "dtype", "--dtype", panel=MACHINE)
    ] = None,
    backend: Annotated[
        Backend | None, option(CommonSettings, "backend", "--backend", panel=MACHINE)
    ] = None,
    seed: Annotated[int | None, option(CommonSettings, "seed", "--seed", panel=MACHINE)] = None,
    threads: Annotated[
        int | None, option(CommonSettings, "threads", "--threads", panel=MACHINE)
    ] = None,
    workers: Annotated[
        int | None, option(CommonSettings, "workers", "--workers", panel=MACHINE)
    ] = None,
    offline: Annotated[
        bool | None, option(CommonSettings, "offline", "--offline", panel=MACHINE)
    ] = None,
    dry_run: Annotated[
        bool | None, option(CommonSettings, "dry_run", "--dry-run", "-n", panel=TALK)
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            metavar="",
            help="Print one JSON object, for errors too.",
            rich_help_panel=TALK,
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings in TOML, a table per command.",
            rich_help_panel=TALK,
        ),
    ] = None,
    dump_config: Annotated[
        bool,
        typer.Option(
            "--dump-config",
            metavar="",
            help="Print the settings in effect as TOML and stop.",
            rich_help_panel=TALK,
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", metavar="", help="Show errors only.", rich_help_panel=TALK),
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            metavar="",
            show_default=False,
            rich_help_panel=TALK,
            help="Show more; twice for everything.",
        ),
    ] = 0,
    color: Annotated[
        ColorMode | None,
        typer.Option("--color", help="When to colour.", rich_help_panel=TALK),
    ] = None,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            metavar="",
            help="Show progress on stderr.",
            rich_help_panel=TALK,
        ),
    ] = None,
    log_file: Annotated[
        Path | None,
        typer.Option(
            "--log-file",
            metavar="FILE",
            help="Append everything logged to this file.",
            rich_help_panel=TALK,
        ),
    ] = None,
) -> None:
    """Carry the options of every command in its signature."""


def _output(
    overwrite: Annotated[
        bool | None, option(OutputSettings, "overwrite", "--overwrite", panel=OUTPUT)
    ] = None,
    skip_existing: Annotated[
        bool | None, option(OutputSettings, "skip_existing", "--skip-existing", panel=OUTPUT)
    ] = None,
) -> None:
    """Carry the options of every command that writes in its signature."""


def _resume(
    resume: Annotated[
        bool | None, option(WriterSettings, "resume", "--resume", panel=OUTPUT)
    ] = None,
) -> None:
    """Carry the option of every command that can go on in its signature."""


def add_command(
    app: typer.Typer,
    body: Callable[..., int],
    *,
    words: str,
    settings: type[CommonSettings],
    examples: Sequence[str],
    details: str = "",
) -> None:
    """Register a command: its own options, then the shared ones.

    Args:
        app: Where to register.
        body: Takes the context and its own options, which its settings read from the context;
            returns the exit code.
        words: What people type; its summary stands in `qtool.cli.commands`.
        settings: The command's settings; their bases decide which shared options it gets.
        examples: Lines of shell that work, two or three.
        details: Further paragraphs of help.
    """
    own = inspect.signature(body, eval_str=True)
    parameters = list(own.parameters.values())
    for base, source in (
        (OutputSettings, _output),
        (WriterSettings, _resume),
        (CommonSettings, _common),
    ):
        if issubclass(settings, base):
            parameters += inspect.signature(source, eval_str=True).parameters.values()

    @functools.wraps(body)
    def command(**values: object) -> int:
        return body(**{key: values[key] for key in own.parameters})

    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    summary = SUMMARIES[words]
    help_text = "\n\n".join(filter(None, ["\b\n" + "\n".join(examples), summary, details]))
    app.command(words.rpartition(" ")[2], help=help_text, short_help=summary)(command)
