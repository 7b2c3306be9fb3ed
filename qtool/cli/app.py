"""The program `qtool`: its commands, its exit codes, and what becomes of errors and signals."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from qtool.cli import demoire, evaluate, models, quantize, synthesize, train
from qtool.cli.console import (
    Look,
    failure,
    show_error,
    show_result,
    wants_color,
    write_text,
)
from qtool.cli.session import as_qtool_error
from qtool.cli.version import version_line
from qtool.errors import QtoolError, UsageError

_EXAMPLES = (
    "\b\n"
    "qtool quantize demo_vit --bits w4a4 --data-free\n"
    "qtool eval demo_vit-w4a4.safetensors --baseline demo_vit\n"
    "qtool demoire photos/ --out clean/\n"
    "qtool models"
)
_EXIT_CODES = """Exit codes
  0 done
  1 failed
  2 the request is wrong
  3 some items failed, the rest is written
  4 something is missing: weights, CUDA, an extra
  5 a quality gate was not met (eval --min)
  130 Ctrl-C, 143 SIGTERM"""

app = typer.Typer(
    name="qtool",
    help=f"{_EXAMPLES}\n\nLow-bit quantization of vision models, with or without data.",
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
_synthesis = typer.Typer(
    help="\b\nqtool synthesize images demo_vit -o pictures/\n"
    "qtool synthesize images vit_b -o pictures/ --count 64\n"
    "qtool synthesize moire --simulate --clean photos/ -o pairs/\n\n"
    "Make training or calibration pictures.",
    short_help="Make training or calibration pictures.",
    invoke_without_command=True,
)
_training = typer.Typer(
    help="\b\nqtool train demoire --moire screen/ --clean photos/ -o mine.safetensors\n"
    "qtool train demoire pairs/ --init none -o new.safetensors\n\n"
    "Train networks on your own pictures.",
    short_help="Train networks on your own pictures.",
    invoke_without_command=True,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        write_text(version_line() + "\n", sys.stdout)
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show versions.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    _help_if_alone(ctx)


@_synthesis.callback()
@_training.callback()
def _help_if_alone(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        ctx.get_help()
        raise typer.Exit


synthesize.register(_synthesis)
app.add_typer(_synthesis, name="synthesize")
train.register(_training)
app.add_typer(_training, name="train")
quantize.register(app)
demoire.register(app)
evaluate.register(app)
models.register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: Words after `qtool`; those of the process when None.

    Returns:
        The exit code, as `qtool --help` lists them.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    look = Look.from_arguments(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _terminable():
        try:
            return _run(words, look)
        except KeyboardInterrupt:
            return _report(_InterruptedError("interrupted", 130), words, look)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
            if code == 143:
                return _report(_InterruptedError("terminated", 143), words, look)
            return code
        except Exception as error:
            if os.environ.get("QTOOL_DEBUG", "0") not in ("", "0"):
                write_text(traceback.format_exc(), sys.stderr)
            return _report(as_qtool_error(error), words, look)


def _run(words: list[str], look: Look) -> int:
    if os.environ.get("_QTOOL_COMPLETE", "").startswith("source_"):
        return _print_completion()
    if not words or {"-h", "--help"} & set(words) or words in (["synthesize"], ["train"]):
        _colour_help(look)
    code = get_command(app).main(args=words, prog_name="qtool", standalone_mode=False)
    if code == 130:  # typer has swallowed Ctrl-C
        raise KeyboardInterrupt
    return int(code or 0)


class _InterruptedError(QtoolError):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def _report(error: QtoolError, words: list[str], look: Look) -> int:
    command = _command_words(words)
    remedy = error.remedy
    if not remedy and error.exit_code == UsageError.exit_code:
        remedy = f"see `qtool {command} --help`" if command else "see `qtool --help`"
    if look.json:
        show_result(failure(command, error, remedy), look)
    else:
        show_error(error.message, remedy, look)
    return error.exit_code


def _command_words(words: Sequence[str]) -> str:
    """The leading words that name a command, even where the rest cannot be parsed."""
    command: Any = get_command(app)
    named: list[str] = []
    for word in words:
        command = command.commands.get(word) if isinstance(command, TyperGroup) else None
        if command is None:
            break
        named.append(word)
    return " ".join(named)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exit that unwinds, so that temporary files are cleaned up."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_completion() -> int:
    """Print a completion script; its first line must not be empty, or zsh will not load it."""
    script = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(script):
        try:
            get_command(app).main(args=[], prog_name="qtool")
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
    text = script.getvalue().strip()
    write_text(f"{text}\n" if text else "", sys.stdout)
    return code


def _colour_help(look: Look) -> None:
    from typer import rich_utils

    color = wants_color(look.color, sys.stdout)
    rich_utils.COLOR_SYSTEM = "auto" if color else None
    rich_utils.FORCE_TERMINAL = True if color else None
