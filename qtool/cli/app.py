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
from typing import Any

from typer.core import TyperGroup

from qtool.cli.commands import GROUPS
from qtool.cli.console import (
    Look,
    as_qtool_error,
    failure,
    show_error,
    show_result,
    wants_color,
    write_text,
)
from qtool.cli.program import completed_words, program
from qtool.errors import QtoolError, UsageError


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
    if not words or {"-h", "--help"} & set(words) or words in [[group.name] for group in GROUPS]:
        _colour_help(look)
    asked = completed_words() if "_QTOOL_COMPLETE" in os.environ else words
    code = program(asked).main(args=words, prog_name="qtool", standalone_mode=False)
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
    command: Any = program([])
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
            program([]).main(args=[], prog_name="qtool")
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
