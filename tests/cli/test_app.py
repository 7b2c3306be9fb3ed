"""Exit codes, errors, signals and what comes out where."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from qtool import errors
from qtool.report import Result

ERRORS = [
    errors.QtoolError("failed", remedy="do this"),
    errors.CheckpointError("damaged"),
    errors.UsageError("wrong"),
    errors.OutputExistsError("there", remedy="--overwrite"),
    errors.ItemsFailedError("some"),
    errors.MissingError("no weights"),
    errors.BackendError("no triton"),
    errors.QualityGateError("too low"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_become_exit_codes_and_two_lines(qtool_run, fake_api, error):
    fake_api.answer = error
    ran = qtool_run("models")
    assert ran.code == error.exit_code
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert lines[0] == f"error: {error.message}"
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert len(lines) <= 2


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_are_json_too(qtool_run, fake_api, error):
    fake_api.answer = error
    ran = qtool_run("models", "--json")
    content = json.loads(ran.out)
    assert ran.code == error.exit_code
    assert list(content) == ["schema", "command", "status", "items", "summary"]
    assert content["command"] == "models"
    assert content["status"] == "failed"
    assert content["items"] == []
    assert content["summary"]["error"] == error.message
    assert content["summary"]["exit_code"] == error.exit_code
    assert set(content["summary"]) == {"error", "remedy", "exit_code"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\nlines \x1b[31m"), r"unexpected ValueError: two lines \x1b[31m"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (EOFError("short"), "unexpected EOFError: short"),
    ],
)
def test_faults_are_one_line_without_traceback(qtool_run, fake_api, error, said):
    fake_api.answer = error
    ran = qtool_run("models")
    assert ran.code == 1
    assert ran.err.splitlines()[0] == f"error: {said}"
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("value", ["", "0"])
def test_debug_can_be_switched_off(qtool_run, fake_api, monkeypatch, value):
    monkeypatch.setenv("QTOOL_DEBUG", value)
    fake_api.answer = ValueError("inner")
    assert "Traceback" not in qtool_run("models").err


def test_debug_shows_the_traceback(qtool_run, fake_api, monkeypatch):
    monkeypatch.setenv("QTOOL_DEBUG", "1")
    fake_api.answer = ValueError("inner")
    ran = qtool_run("models", "--json")
    assert "Traceback" in ran.err
    assert "ValueError: inner" in ran.err
    assert json.loads(ran.out)["summary"]["exit_code"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantise"], "Did you mean 'quantize'"),
        (["quantize", "--bitz", "w4a4"], "--bits"),
        (["quantize", "m", "--count", "x"], "--count"),
        (["quantize", "m", "--effort", "hard"], "--effort"),
        (["quantize", "m", "n"], "unexpected extra argument"),
        (["quantize"], "MODEL is missing"),
        (["synthesize", "images", "m"], "--out is missing"),
        (["quantize", "m", "--data-free", "--count", "0"], "--count must be greater"),
    ],
)
def test_wrong_command_lines_exit_2_and_point_to_help(qtool_run, words, said):
    ran = qtool_run(*words)
    assert ran.code == 2
    assert said in ran.err.splitlines()[0]
    assert "--help`" in ran.err.splitlines()[1]
    parsed = json.loads(qtool_run(*words, "--json").out)
    assert said in parsed["summary"]["error"]
    assert parsed["command"] == " ".join(words[: {"quantise": 0, "synthesize": 2}.get(words[0], 1)])


def test_qtool_alone_prints_help(qtool_run):
    ran = qtool_run()
    assert ran.code == 0
    assert ran.out.rstrip() == qtool_run("--help").out.rstrip()
    assert "Usage: qtool" in ran.out


def test_help_lists_exit_codes(qtool_run):
    listed = qtool_run("-h").out.partition("Exit codes")[2]
    codes = [int(code) for code in re.findall(r"(?:^ *|, )(\d+) \w", listed, re.MULTILINE)]
    assert codes == [0, 1, 2, 3, 4, 5, 130, 143]
    assert {error.exit_code for error in ERRORS} < set(codes)


@pytest.mark.parametrize(
    ("mode", "variables", "colored"),
    [
        ("auto", {}, False),
        ("always", {"NO_COLOR": "1"}, True),
        ("never", {"FORCE_COLOR": "1"}, False),
        ("auto", {"FORCE_COLOR": "1"}, True),
        ("auto", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ("always", {"TERM": "dumb"}, True),
    ],
)
def test_colour(qtool_run, fake_api, monkeypatch, mode, variables, colored):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fake_api.answer = errors.QtoolError("failed")
    assert ("\x1b[" in qtool_run("models", "--color", mode).err) is colored
    assert ("\x1b[" in qtool_run("quantise", f"--color={mode}").err) is colored
    fake_api.answer = Result("models", summary={"fact": 1})
    assert ("\x1b[" in qtool_run("models", "--color", mode).out) is colored
    if "TERM" not in variables:
        assert ("\x1b[" in qtool_run("models", "--help", "--color", mode).out) is colored


SLEEPER = """
import pathlib, sys, time, types
import qtool.api
from qtool.cli.app import main

def work(settings, progress):
    try:
        pathlib.Path("started").touch()
        time.sleep(30)
    finally:
        pathlib.Path("cleaned").touch()

qtool.api.quantize = types.SimpleNamespace(quantize=work)
sys.exit(main(["quantize", "m", "--data-free", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_signals_unwind_and_have_their_codes(tmp_path, number, code, word, as_json):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, *(["--json"] if as_json else [])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert (tmp_path / "cleaned").exists()
    assert "Traceback" not in err
    if as_json:
        assert json.loads(out)["summary"] == {"error": word, "remedy": "", "exit_code": code}
    else:
        assert err == f"error: {word}\n"


LISTER = """
import sys, types
import qtool.api
from qtool.cli.app import main
from qtool.report import Result

rows = [{"path": f"file-{n}", "status": "ok"} for n in range(20_000)]
result = Result("models", items=rows)
qtool.api.models = types.SimpleNamespace(list_models=lambda settings, progress: result)
sys.exit(main(["models", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_that_leaves_is_no_error(tmp_path, words):
    with subprocess.Popen(
        [sys.executable, "-c", LISTER, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 0
