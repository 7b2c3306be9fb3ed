"""Two processes of torchrun train one network."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from qtool.api.parallel import torchrun_group
from qtool.methods.multiquant import branch_training as training
from qtool.methods.multiquant.branches import branched, observe
from qtool.models import cifar
from qtool.models.residual import residual_layout

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
        share = slice(training.rank(), None, training.processes())
        for _ in range(2):
            trainer.step(images[share], labels[share])
        trainer.share_statistics()
        return trainer.state() | {"processes": torch.tensor(training.processes())}


def test_without_torchrun_there_is_one_process():
    with torchrun_group():
        assert training.processes() == 1


def test_two_processes_end_with_the_same_network(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    code = "import sys, torch; from tests.api.test_parallel import trained\n"
    code += "torch.save(trained(), sys.argv[1])"
    second = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "state")],
        env={**os.environ, **common, "RANK": "1", "LOCAL_RANK": "1"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for name, value in {**common, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mine = trained()
    assert training.processes() == 1
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    theirs = torch.load(tmp_path / "state")
    assert int(mine["processes"]) == 2
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
