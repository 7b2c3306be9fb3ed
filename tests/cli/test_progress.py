"""Progress as a bar and as lines."""

import io

import pytest

from qtool.cli.console import Terminal
from qtool.cli.progress import ProgressReporter, duration, pace, progress_mode


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def reported(mode, steps, *, stream=None, seconds_per_call=1.0):
    stream = stream or io.StringIO()
    now = iter(range(10_000))
    clock = lambda: next(now) * seconds_per_call  # noqa: E731
    with ProgressReporter(Terminal(stream, "never"), mode, clock=clock) as progress:
        for step in steps:
            progress(*step)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("wanted", "quiet", "terminal", "mode"),
    [
        (None, False, True, "bar"),
        (None, False, False, "lines"),
        (None, True, True, "off"),
        (True, True, False, "lines"),
        (False, False, True, "off"),
    ],
)
def test_modes(wanted, quiet, terminal, mode):
    assert progress_mode(wanted, quiet=quiet, terminal=terminal) == mode


def test_lines_come_every_ten_per_cent():
    lines = reported("lines", [("blocks", done, 200) for done in range(201)]).splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("blocks: 10 % (20/200), ")
    assert lines[-1].startswith("blocks: 100 % (200/200), ")
    assert lines[-1].endswith("/s")


def test_lines_tell_rate_time_left_and_note():
    text = reported("lines", [("blocks", 0, 4), ("blocks", 1, 4, "blocks.0")], seconds_per_call=30)
    assert text == "blocks: 25 % (1/4), 30.0 s each, 1 min 30 s left, blocks.0\n"


def test_few_steps_give_few_lines_and_stages_start_anew():
    text = reported("lines", [("a", 1, 2), ("a", 2, 2), ("b", 0, 2), ("b", 2, 2)])
    assert [line.split(",")[0] for line in text.splitlines()] == [
        "a: 50 % (1/2)",
        "a: 100 % (2/2)",
        "b: 100 % (2/2)",
    ]


def test_odd_totals_do_no_harm():
    assert reported("lines", [("a", 0, 0), ("a", 3, 0), ("b", 5, 3)]).startswith("b: 100 % (3/3)")


def test_off_is_silent():
    assert reported("off", [("a", 1, 1)]) == ""


def test_a_bar_shows_stage_count_and_note():
    text = reported("bar", [("blocks", 1, 4), ("blocks", 4, 4, "[red]done")], stream=Tty())
    assert "blocks" in text
    assert "4/4" in text
    assert "[red]done" in text
    assert "/s" in text or "s each" in text
    assert text.rstrip("\n").endswith("\x1b[?25h") or "\x1b[?25h" in text


def test_a_closed_reporter_is_silent():
    stream = io.StringIO()
    progress = ProgressReporter(Terminal(stream, "never"), "lines")
    progress.close()
    progress("a", 1, 1)
    assert stream.getvalue() == ""


def test_pace():
    assert pace(2.0, 0) == "2.0/s"
    assert pace(0.5, 90) == "2.0 s each, 1 min 30 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (61, "1 min 1 s"), (3600 * 26 + 120, "26 h 2 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
