"""One run of one command: settings gathered, logs and progress on, the result shown."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import typer

from qtool.cli import config
from qtool.cli.console import Look, Terminal, as_qtool_error, logs, show_result, write_text
from qtool.cli.progress import ProgressReporter, progress_mode
from qtool.errors import UsageError
from qtool.report import Result
from qtool.settings.base import CommonSettings

S = TypeVar("S", bound=CommonSettings)


@dataclass(frozen=True)
class Session(Generic[S]):
    """What a command body needs.

    Args:
        settings: Checked settings.
        progress: Callback for `qtool.api`.
        look: How results should be printed.
    """

    settings: S
    progress: ProgressReporter
    look: Look

    def show(self, result: Result) -> int:
        """Print a result and return the exit code it stands for."""
        self.progress.close()
        if self.settings.dry_run and result.status == "ok":
            result = replace(result, status="planned")
        show_result(result, self.look)
        return result.exit_code


@contextmanager
def session(ctx: typer.Context, model: type[S]) -> Iterator[Session[S]]:
    """Open a session for the running command.

    Raises:
        UsageError: The settings are wrong.
        QtoolError: The log file cannot be written.
        typer.Exit: Only the configuration was asked for, and is printed.
    """
    options = ctx.params
    look = Look(json=options["json"], color=options["color"] or "auto")
    gathered = config.gather(ctx, model)
    if options["dump_config"]:
        _dump(ctx, model, gathered, look)
        raise typer.Exit
    settings = model.build(gathered.values, named=gathered.name)
    quiet = bool(options["quiet"])
    console = Terminal(sys.stderr, look.color)
    mode = progress_mode(
        options["progress"],
        quiet=quiet,
        terminal=sys.stderr.isatty() and not console.is_dumb_terminal,
    )
    verbosity = -1 if quiet else options["verbose"]
    with (
        logs(console, verbosity=verbosity, file=options["log_file"]),
        ProgressReporter(console, mode) as progress,
    ):
        try:
            yield Session(settings, progress, look)
        except Exception as error:
            logging.getLogger("qtool.cli").debug("%s", type(error).__name__, exc_info=True)
            raise as_qtool_error(error) from error


def require_one_process(ctx: typer.Context) -> None:
    """Refuse what every process of torchrun would do all over again.

    Raises:
        UsageError: torchrun started several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UsageError(
            f"`{ctx.command_path}` cannot be shared by the processes of torchrun",
            remedy="start it without torchrun; `synthesize images`, `demoire`, `train demoire` and "
            "`quantize --engine branches` share their work",
        )


def _dump(
    ctx: typer.Context, model: type[CommonSettings], gathered: config.Gathered, look: Look
) -> None:
    missing = [
        name
        for name, field in model.model_fields.items()
        if field.is_required() and name not in gathered.values
    ]
    blank: dict[str, Any] = dict.fromkeys(missing, "-")
    settings = model.build({**gathered.values, **blank}, named=gathered.name, complete=False)
    words = config.command_words(ctx)
    if look.json:
        values = {name: value for name, value in settings if name not in missing}
        show_result(Result(words, summary={"config": values}), look)
    else:
        text = config.to_toml(settings, words.replace(" ", "."), missing=missing)
        write_text(text, sys.stdout)
