"""The tree of commands that Typer parses: those in use with their options, the others by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from qtool.cli.commands import COMMANDS, GROUPS, spoken
from qtool.cli.console import write_text
from qtool.cli.version import version_line

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


def program(words: Sequence[str] | None = None) -> Any:  # noqa: ANN401 - typer's own click
    """Build the program.

    Args:
        words: What was typed after `qtool`: only the commands that it may mean are imported. None
            imports all of them.

    Returns:
        The root command, with all commands below it.
    """
    modules = {command.module for command in COMMANDS} if words is None else spoken(words)
    app = typer.Typer(
        name="qtool",
        help=f"{_EXAMPLES}\n\nLow-bit quantization of vision models, with or without data, and "
        "photographs of screens without moire.",
        epilog=_EXIT_CODES,
        context_settings={"help_option_names": ["-h", "--help"]},
        invoke_without_command=True,
    )
    app.callback()(_root)
    parents = {"": app}
    for group in GROUPS:
        examples = "\n".join(group.examples)
        parents[group.name] = typer.Typer(
            help=f"\b\n{examples}\n\n{group.summary}",
            short_help=group.summary,
            invoke_without_command=True,
        )
        parents[group.name].callback()(_help_if_alone)
        app.add_typer(parents[group.name], name=group.name)
    for command in COMMANDS:
        parent, _, name = command.words.rpartition(" ")
        if command.module in modules:
            module = importlib.import_module(f"qtool.cli.{command.module}")
            module.register(parents[parent], command.words)
        else:
            parents[parent].command(name, short_help=command.summary)(_only_named)
    return get_command(app)


def completed_words() -> list[str]:
    """The words on the command line that a shell asks completions for."""
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    return line.split()[1:]


def _only_named() -> None:
    """Stand for a command that was not asked for."""


def _show_version(wanted: bool) -> None:
    if wanted:
        write_text(version_line() + "\n", sys.stdout)
        raise typer.Exit


def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show versions.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    _help_if_alone(ctx)


def _help_if_alone(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        ctx.get_help()
        raise typer.Exit
