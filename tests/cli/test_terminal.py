"""On a real terminal: a bar, colour, and a cursor that comes back."""

import os
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty")

WORKER = """
import logging, sys, time, types
import qtool.api
from qtool.cli.app import main
from qtool.report import Result, Table

def work(settings, progress):
    for done in range(1, 5):
        progress("calibrating", done, 4)
        time.sleep(0.05)
    logging.getLogger("qtool.api").warning("careful")
    if settings.count == 1:
        raise RuntimeError("broken")
    return Result("quantize", tables=[Table("Layers", ["name"], [["head"]])])

qtool.api.quantize = types.SimpleNamespace(quantize=work)
sys.exit(main(["quantize", "m", "--data-free", *sys.argv[1:]]))
"""


def on_a_terminal(tmp_path, *words, **variables):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *words],
        cwd=tmp_path,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 65536):
            text += chunk
    except OSError:
        pass  # Linux says so when the other side has closed
    os.close(ours)
    return process.wait(timeout=20), text.decode()


def test_a_bar_then_the_result(tmp_path):
    code, text = on_a_terminal(tmp_path)
    assert code == 0
    assert "4/4" in text
    assert "━" in text
    assert "\x1b[33mwarning: \x1b[0mcareful" in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h") < text.index("Layers")


def test_the_cursor_comes_back_after_an_error(tmp_path):
    code, text = on_a_terminal(tmp_path, "--count", "1")
    assert code == 1
    assert text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h") < text.index("unexpected")


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    code, text = on_a_terminal(tmp_path, TERM="dumb")
    assert code == 0
    assert "calibrating: 50 % (2/4)" in text
    assert "\x1b" not in text


def test_no_colour_is_no_colour(tmp_path):
    _, text = on_a_terminal(tmp_path, "--no-progress", NO_COLOR="1")
    assert "warning: careful" in text
    assert "\x1b" not in text
