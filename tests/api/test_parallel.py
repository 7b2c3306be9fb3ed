"""Two processes of torchrun share work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qtool.api.parallel import torchrun_group
from qtool.api.synthesize import synthesize_images
from qtool.errors import UsageError
from qtool.io import images
from qtool.methods.multiquant import branch_training as training
from qtool.methods.multiquant.branches import branched, observe
from qtool.methods.processes import processes, rank
from qtool.models import cifar
from qtool.models.residual import residual_layout
from qtool.settings.synthesize import SynthesizeSettings

ROOT = Path(__file__).resolve().parents[2]


def trained():
    """The state after two steps on this process's share of a batch."""
    with torchrun_group():
        torch.manual_seed(0)
        model = cifar.build("resnet8", width=8, num_classes=3)
        layout = residual_layout(model, input_size=(3, 8, 8))
        network, _ = branched(model, layout, widths=(2, 4))
        images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
        observe(network, images)
        config = training.BranchTraining(steps=2, learning_rate=0.05)
        trainer = training.BranchTrainer(network, config)
        share = slice(rank(), None, processes())
        for _ in range(2):
            trainer.step(images[share], labels[share])
        trainer.share_statistics()
        return trainer.state() | {"processes": torch.tensor(processes())}


def test_without_torchrun_there_is_one_process():
    with torchrun_group():
        assert processes() == 1


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR"), torchrun_group():
        pass


def environment(number):
    """What torchrun says to one of two processes on this machine."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def together(*words):
    """Run the same words in two processes; what they printed, and how they ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**environment(number), "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [process.communicate(timeout=240) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in ended]


def test_two_processes_end_with_the_same_network(tmp_path):
    code = "import os, sys, torch; from tests.api.test_parallel import trained\n"
    code += "from qtool.methods.processes import processes\n"
    code += "torch.save(trained(), sys.argv[1] + os.environ['RANK'])\n"
    code += "assert processes() == 1"
    together("-c", code, str(tmp_path / "state"))
    one, other = (torch.load(tmp_path / f"state{number}") for number in range(2))
    assert int(one["processes"]) == 2
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


IMAGES = {"model": "demo_vit", "count": 3, "batch_size": 1, "steps": 3, "threads": 1}
WORDS = ["-m", "qtool", "synthesize", "images", "demo_vit", "--count", "3", "--batch-size", "1"]
WORDS += ["--steps", "3", "--threads", "1", "--json"]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.usefixtures("place")
def test_two_processes_share_a_synthesis_and_write_what_one_would():
    synthesize_images(SynthesizeSettings(**IMAGES, out=Path("whole")))
    first, second = together(*WORDS, "-o", "shared")
    assert json.loads(first)["summary"]["count"] == 3
    assert json.loads(second)["summary"] == {"rank": 1, "status": "synthesized"}
    assert files("shared") == files("whole")


@pytest.mark.usefixtures("place")
def test_two_processes_go_on_where_one_was_killed():
    synthesize_images(SynthesizeSettings(**IMAGES, out=Path("whole")))

    def stop(stage, done, total, note=""):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize_images(SynthesizeSettings(**IMAGES, out=Path("shared")), progress=stop)
    assert Path("shared/.resume.safetensors").exists()
    together(*WORDS, "-o", "shared", "--resume")
    assert files("shared") == files("whole")


@pytest.mark.usefixtures("place")
def test_two_processes_train_one_demoire_network():
    random = torch.Generator().manual_seed(0)
    for index in range(4):
        clean = torch.rand(3, 96, 96, generator=random)
        images.save_png(Path(f"pairs/clean/{index}.png"), clean)
        images.save_png(Path(f"pairs/moire/{index}.png"), 0.8 * clean)
    # 64 held-out samples a measurement are for real trainings.
    code = "import sys; from qtool.api import train_run; train_run._HELD_OUT_SAMPLES = 4\n"
    code += "from qtool.cli.app import main; sys.exit(main(sys.argv[1:]))"
    words = ["-c", code, "train", "demoire", "pairs", "--init", "none", "--width", "8"]
    words += ["--crop", "64", "--batch-size", "2", "--save-every", "2", "--threads", "1", "--json"]
    first, second = together(*words, "--steps", "3", "-o", "a.safetensors")
    summary = json.loads(first)["summary"]
    assert summary["steps"] == 3
    assert json.loads(second)["summary"] == {"rank": 1, "status": "trained"}
    together(*words, "--steps", "3", "-o", "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    clocked, _ = together(*words, "--budget", "0.05", "-o", "c.safetensors")
    assert json.loads(clocked)["summary"]["steps"] >= 1
