"""Colour, streams and raw arguments."""

import io

import pytest

from qtool.cli.console import Look, Terminal, one_line, wants_color


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "look"),
    [
        ([], Look()),
        (["models", "--json"], Look(json=True)),
        (["models", "--", "--json"], Look()),
        (["--color", "always"], Look(color="always")),
        (["--color=never"], Look(color="never")),
        (["--color", "sometimes"], Look()),
        (["--color"], Look()),
    ],
)
def test_looks_are_read_from_raw_arguments(arguments, look):
    assert Look.from_arguments(arguments) == look


@pytest.mark.parametrize(
    ("variables", "tty", "pipe"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_colour_follows_the_environment(monkeypatch, variables, tty, pipe):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_color("auto", Tty()) is tty
    assert wants_color("auto", io.StringIO()) is pipe


def test_one_line_disarms_control_characters():
    assert one_line("a\n b\t\x1b[2J\x07 é") == "a b \\x1b[2J\\x07 é"


def test_a_terminal_whose_reader_left_goes_quiet():
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    terminal = Terminal(Closed(), "never")
    terminal.print("x")
    terminal.print("y")
    assert terminal.quiet
