"""A training of branches that is killed and goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtool.api import branch_run
from qtool.errors import CheckpointError

FILE = Path("b.safetensors")
STATE = Path(".b.safetensors.resume")


class _Killed(BaseException):
    pass


def kill_at(step):
    def progress(stage, done, total, note=""):
        if stage == "train" and done == step:
            raise _Killed

    return progress


@pytest.mark.parametrize("step", [3, 4])
def test_going_on_gives_the_file_of_an_uninterrupted_run(train_branches, monkeypatch, step):
    options = {"bits": "any:2,4", "epochs": 3}
    train_branches(out=Path("whole.safetensors"), **options)
    monkeypatch.setattr(branch_run, "_SAVE_SECONDS", 0.0)
    with pytest.raises(_Killed):
        train_branches(out=FILE, progress=kill_at(step), **options)
    assert STATE.exists()
    assert not FILE.exists()
    result = train_branches(out=FILE, resume=True, **options)
    assert len(result.summary["epochs"]) == 3
    assert FILE.read_bytes() == Path("whole.safetensors").read_bytes()
    assert not STATE.exists()


def test_the_state_of_other_settings_is_refused(train_branches, monkeypatch):
    monkeypatch.setattr(branch_run, "_SAVE_SECONDS", 0.0)
    with pytest.raises(_Killed):
        train_branches(out=FILE, bits="any:2,4", progress=kill_at(2), epochs=2)
    with pytest.raises(CheckpointError, match="other settings"):
        train_branches(out=FILE, bits="any:2,4", epochs=3, resume=True)
    assert STATE.exists()


def test_resuming_nothing_starts_from_the_beginning(train_branches):
    assert train_branches(out=FILE, bits="any:2,4", resume=True).status == "ok"


def test_a_killed_process_leaves_a_state_to_go_on_from(small_resnet, colours):
    words = ["quantize", small_resnet, "--bits", "any:2,4", "--engine", "branches"]
    words += ["--train", str(colours), "--epochs", "400", "--batch-size", "16", "-o", str(FILE)]
    process = subprocess.Popen(
        [sys.executable, "-m", "qtool", *words, "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not STATE.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not FILE.exists()
    metadata, tensors = branch_run.read_tensor_file(STATE)
    assert int(tensors["step"]) >= 2
    assert "epochs" in metadata["facts"]
