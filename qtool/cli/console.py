"""stdout is data, stderr is talk: results, messages, logs and their colours."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from qtool.errors import QtoolError, UsageError
from qtool.report import Result, Table, cell, is_number

ColorMode = Literal["auto", "always", "never"]

# What everybody should see, such as the device that was chosen, is logged here at INFO.
NOTICE_LOGGER = "qtool.notice"

_SAID_ELSEWHERE = ("latency", "rows", "error", "remedy", "exit_code")
_PIPE_WIDTH = 10_000


@dataclass(frozen=True)
class Look:
    """How output should look, read from raw arguments so that it holds even if parsing fails."""

    json: bool = False
    color: ColorMode = "auto"

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Look:
        """Find `--json` and `--color MODE` before a `--`."""
        own = list(arguments)
        if "--" in own:
            own = own[: own.index("--")]
        modes: dict[str, ColorMode] = {"always": "always", "never": "never"}
        color: ColorMode = "auto"
        for word, following in zip(own, [*own, ""][1:], strict=True):
            flag, _, value = word.partition("=")
            if flag == "--color":
                color = modes.get(value or following, "auto")
        return cls(json="--json" in own, color=color)


def wants_color(mode: ColorMode, stream: TextIO) -> bool:
    """Whether to colour: the flag, then NO_COLOR, FORCE_COLOR, TERM=dumb, then the stream."""
    if mode != "auto":
        return mode == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") != "0":
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def one_line(text: str) -> str:
    """Text as one line with control characters spelt out, so that no name can steer a terminal."""
    return "".join(
        char if char.isprintable() else f"\\x{ord(char):02x}" for char in " ".join(text.split())
    )


class Terminal(Console):
    """A rich console that goes quiet when its reader leaves; the work goes on."""

    def __init__(self, stream: TextIO, mode: ColorMode) -> None:
        color = wants_color(mode, stream)
        super().__init__(
            file=stream,
            force_terminal=True if color else None,
            color_system="standard" if color else None,
            no_color=not color,
            width=None if stream.isatty() else _PIPE_WIDTH,
            highlight=False,
            markup=False,
            emoji=False,
        )

    def on_broken_pipe(self) -> None:
        """Drop this and all later output."""
        self.quiet = True
        abandon(self.file)


def abandon(stream: IO[str]) -> None:
    """Point a stream whose reader has left at nothing, so that closing it raises nothing."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def write_text(text: str, stream: TextIO) -> None:
    """Write and flush, quietly if nobody reads."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        abandon(stream)


def write_bytes(content: bytes, stream: TextIO) -> None:
    """Write bytes to a text stream's own file and flush, quietly if nobody reads."""
    try:
        stream.buffer.write(content)
        stream.buffer.flush()
    except BrokenPipeError:
        abandon(stream)


def show_error(message: str, remedy: str, look: Look) -> None:
    """One line of cause and one line of remedy on stderr."""
    color = wants_color(look.color, sys.stderr)
    lines = [f"{_styled('error:', '1;31', color)} {one_line(message)}"]
    if remedy:
        lines.append(f"{_styled('hint:', '36', color)} {one_line(remedy)}")
    write_text("\n".join(lines) + "\n", sys.stderr)


def show_result(result: Result, look: Look) -> None:
    """Print a result: tables and facts on stdout, what failed on stderr; or one JSON object."""
    if look.json:
        write_text(result.to_json(), sys.stdout)
    else:
        out = Terminal(sys.stdout, look.color)
        if result.status == "planned":
            out.print(Text("Plan; nothing was written.", style="bold"))
        for table in result.tables:
            out.print(_table(table))
        if not result.tables:
            items = (item for item in result.items if item.get("status") != "failed")
            paths = (item.get("output", item.get("path")) for item in items)
            write_text("".join(f"{one_line(str(path))}\n" for path in paths if path), sys.stdout)
        facts = [fact for fact in result.facts if fact[0] not in _SAID_ELSEWHERE]
        width = max((len(name) for name, _ in facts), default=0)
        for name, value in facts:
            label = (name.replace("_", " ") + ":").ljust(width + 2)
            out.print(Text.assemble((label, "bold"), one_line(value)), soft_wrap=True)
    for item in result.items:
        if item.get("status") == "failed":
            show_error(f"{item.get('path', '?')}: {item.get('error', 'failed')}", "", look)
    if result.status == "failed" and "error" in result.summary:
        show_error(str(result.summary["error"]), str(result.summary.get("remedy", "")), look)


def as_qtool_error(error: Exception) -> QtoolError:
    """The error itself if it is qtool's own, else one that says what can be said about it."""
    if isinstance(error, QtoolError):
        return error
    if hasattr(error, "format_message"):  # typer's own errors about the command line
        path = getattr(getattr(error, "ctx", None), "command_path", "qtool")
        return UsageError(error.format_message(), remedy=f"see `{path} --help`")
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return QtoolError(f"{name}{error.strerror}")
    return QtoolError(
        f"unexpected {type(error).__name__}: {error}",
        remedy="this is a fault of qtool; QTOOL_DEBUG=1 shows where it happened",
    )


def failure(command: str, error: QtoolError, remedy: str) -> Result:
    """The result that stands for an error, for `--json`."""
    summary: Mapping[str, Any] = {
        "error": one_line(error.message),
        "remedy": one_line(remedy),
        "exit_code": error.exit_code,
    }
    return Result(command, "failed", summary=summary)


@contextmanager
def logs(console: Console, *, verbosity: int, file: Path | None) -> Iterator[None]:
    """Show log records on stderr while inside.

    Args:
        console: Where they go; a progress bar on the same console stays whole.
        verbosity: -1 errors only, 0 warnings and notices, 1 information, 2 everything.
        file: Also append everything, with times and tracebacks, to this file.

    Raises:
        QtoolError: The file cannot be written.
    """
    handlers: list[logging.Handler] = [_TalkHandler(console, verbosity)]
    if file is not None:
        handlers.append(_file_handler(file))
    root, own = logging.getLogger(), logging.getLogger("qtool")
    before = (root.level, own.level, logging.raiseExceptions)
    root.setLevel(logging.DEBUG if verbosity >= 2 else logging.WARNING)
    own.setLevel(logging.DEBUG)
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        logging.captureWarnings(False)
        root.setLevel(before[0])
        own.setLevel(before[1])
        logging.raiseExceptions = before[2]


class _TalkHandler(logging.Handler):
    def __init__(self, console: Console, verbosity: int) -> None:
        levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
        super().__init__()
        self._console = console
        self._level = levels.get(verbosity, logging.DEBUG)
        self._notices = verbosity >= 0

    def emit(self, record: logging.LogRecord) -> None:
        notice = record.name == NOTICE_LOGGER and record.levelno >= logging.INFO
        foreign_warning = record.name == "py.warnings" and self._level >= logging.WARNING
        if foreign_warning or (record.levelno < self._level and not (notice and self._notices)):
            return
        text = Text(one_line(record.getMessage()))
        if record.levelno >= logging.WARNING:
            style = "bold red" if record.levelno >= logging.ERROR else "yellow"
            text = Text.assemble((f"{record.levelname.lower()}: ", style), text)
        elif record.levelno < logging.INFO:
            text = Text(f"{record.name}: {text.plain}", style="dim")
        self._console.print(text, soft_wrap=True)


def _file_handler(file: Path) -> logging.Handler:
    try:
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise QtoolError(
            f"cannot write the log file {file}: {error.strerror}",
            remedy="give --log-file a path in a folder that exists and can be written",
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _styled(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text


def _table(table: Table) -> RichTable:
    view = RichTable(
        title=table.title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    for index, name in enumerate(table.columns):
        numbers = [row[index] for row in table.rows if row[index] is not None]
        right = bool(numbers) and all(is_number(value) for value in numbers)
        view.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in table.rows:
        view.add_row(*(Text(one_line(cell(value))) for value in row))
    return view
