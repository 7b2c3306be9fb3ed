"""The program in this process, and an api that only records what it was asked."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import qtool.api
from qtool.cli.app import main
from qtool.report import Result


@dataclass
class Ran:
    """What one run left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No setting of the developer's own, and a folder to write into."""
    for name in ("DEVICE", "BACKEND", "OFFLINE", "THREADS", "DEBUG"):
        monkeypatch.delenv(f"QTOOL_{name}", raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "_QTOOL_COMPLETE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def qtool_run(capfd):
    """Run `qtool WORDS...`; returns the exit code and what was written."""

    def run(*words: str) -> Ran:
        capfd.readouterr()
        code = main(words)
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def fake_api(monkeypatch):
    """Replace every use case; `calls` holds (name, settings), `answer` is returned or raised."""
    fake = SimpleNamespace(calls=[], answer=Result("fake"), work=None)

    def use_case(name):
        def call(settings, progress=None):
            fake.calls.append((name, settings))
            if fake.work is not None:
                fake.work(progress)
            if isinstance(fake.answer, BaseException):
                raise fake.answer
            return fake.answer

        return call

    rooms = {
        "quantize": ("quantize", "plan"),
        "synthesize": ("synthesize_images", "plan_images"),
        "moire": ("synthesize_moire", "plan_moire"),
        "train": ("train_demoire", "plan_demoire"),
        "evaluate": ("evaluate", "plan"),
        "models": ("list_models", "info"),
    }
    for room, names in rooms.items():
        module = SimpleNamespace(**{name: use_case(f"{room}.{name}") for name in names})
        monkeypatch.setattr(qtool.api, room, module, raising=False)
    return fake
