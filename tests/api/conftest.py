"""What the tests of the use cases share: tiny weights on disk, and checkpoints made from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from qtool.api import quantize as quantize_api
from qtool.api import quantize_restoration
from qtool.api import synthesize as synthesize_api
from qtool.api.demoire import calibration as demoire_calibration
from qtool.engine import dispatch
from qtool.io import atomic
from qtool.io.container import write_container
from qtool.models import demoire, demoire_weights, vision
from qtool.report import Result
from qtool.settings.quantize import QuantizeSettings

DEMO = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "num_classes": 10,
}
DATA = vision.DataConfig((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.9)


@pytest.fixture(autouse=True)
def _quiet_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test works in a folder of its own, on the CPU, with few steps, and undoes settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.setenv("QTOOL_BACKEND", "auto")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for effort in ("quick", "standard", "max"):
        monkeypatch.setitem(synthesize_api.STEPS, effort, 4)
        monkeypatch.setitem(quantize_api.RECONSTRUCTION_STEPS, effort, 1)


@pytest.fixture
def stale() -> Callable[[Path], Path]:
    """Leave in a folder what a process that was killed while writing leaves."""

    def leave(folder: Path) -> Path:
        killed = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getpid())"],
            capture_output=True,
            text=True,
            check=True,
        )
        name = f".file.qtool-{atomic._HOST}-{killed.stdout.strip()}-0123abcd.tmp"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half")
        return folder / name

    return leave


@pytest.fixture
def save_weights(tmp_path: Path) -> Callable[..., str]:
    """Write the random weights of a small model to a file that says what it is."""

    def save(
        architecture: str,
        model_args: dict[str, object],
        *,
        seed: int = 0,
        data: vision.DataConfig = DATA,
    ) -> str:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = vision.build(architecture, model_args)
        state = {
            # Random weights of timm are so small that every picture looks the same.
            name: tensor * 4 if tensor.ndim > 1 else tensor
            for name, tensor in model.state_dict().items()
        }
        metadata = {
            "architecture": architecture,
            "model_args": json.dumps(model_args),
            "data": json.dumps(data.to_dict()),
        }
        path = tmp_path / f"{architecture}-{seed}.safetensors"
        save_file(state, path, metadata)
        return str(path)

    return save


@pytest.fixture
def convolutional(
    tmp_path: Path,
    build_convolutional: Callable[[str], nn.Module],
    convolutional_families: dict[str, tuple[str, dict[str, object]]],
) -> Callable[[str], str]:
    """Write the weights of a small ResNet, MobileNet or ConvNeXt to a file."""

    def save(family: str) -> str:
        architecture, model_args = convolutional_families[family]
        metadata = {
            "architecture": architecture,
            "model_args": json.dumps(model_args),
            "data": json.dumps(DATA.to_dict()),
        }
        path = tmp_path / f"{family}.safetensors"
        save_file(build_convolutional(family).state_dict(), path, metadata)
        return str(path)

    return save


@pytest.fixture
def demo(save_weights: Callable[..., str]) -> str:
    """A tiny model for drawn pictures: 24 classes, 32 x 32 pixels, two blocks."""
    return save_weights("demo_vit", DEMO)


@pytest.fixture
def swin(save_weights: Callable[..., str]) -> str:
    """A tiny Swin transformer with shifted windows: 10 classes."""
    return save_weights("swin_tiny_patch4_window7_224", SWIN)


GATES = {"octaves": 2, "width": 8}


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    """A small BandGate whose gates differ from place to place; four pixels at a time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = demoire.build("bandgate", GATES)
        for gate in network.gates:
            torch.nn.init.normal_(gate.weight, std=1.0)
    path = tmp_path / "gates.safetensors"
    described = demoire_weights.metadata("bandgate", GATES, {"licence": "of the test"})
    write_container(path, described, network.state_dict())
    return path


@pytest.fixture
def quantize_network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Quantize a demoire network on three small simulated photographs, judged by two more."""
    monkeypatch.setattr(quantize_restoration, "_SIDE", 64)
    monkeypatch.setattr(quantize_restoration, "_SMALL_SIDE", 64)
    monkeypatch.setattr(demoire_calibration, "HELD_OUT", 2)
    monkeypatch.setattr(demoire_calibration, "_CONTENT_SIDE", 64)

    def run(model: Path | str, **options: object) -> Result:
        source = {} if {"calib", "synthetic"} & set(options) else {"data_free": True}
        settings = QuantizeSettings.build(
            {"model": str(model), "count": 3, "device": "cpu", **source, **options}
        )
        return quantize_api.quantize(settings)

    return run


@pytest.fixture
def quantize(class_folders: Path) -> Callable[..., Result]:
    """Quantize with the pictures of `class_folders`, unless another source is named."""

    def run(model: str, *, progress: object = None, **options: object) -> Result:
        if not {"data_free", "synthetic", "calib"} & set(options):
            options["calib"] = class_folders
        settings = QuantizeSettings.build(
            {"model": model, "count": 6, "effort": "quick", "device": "cpu", **options}
        )
        return quantize_api.quantize(settings, progress)

    return run


BRANCHED = {"width": 8, "num_classes": 3}
BRANCHED_DATA = vision.DataConfig((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)


@pytest.fixture
def small_resnet(
    tmp_path: Path, build_model: Callable[..., nn.Module], trained_norms: Callable[..., nn.Module]
) -> str:
    """Weights of a residual network of 7 convolutions and 3 classes, as if it had been trained."""
    metadata = {
        "architecture": "resnet8",
        "model_args": json.dumps(BRANCHED),
        "data": json.dumps(BRANCHED_DATA.to_dict()),
    }
    path = tmp_path / "resnet8.safetensors"
    save_file(trained_norms(build_model("resnet8", **BRANCHED)).state_dict(), path, metadata)
    return str(path)


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Twelve noisy pictures of 16 x 16 in each of three classes, told by their strongest colour."""
    folder = tmp_path / "colours"
    random = np.random.default_rng(0)
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 150, (16, 16, 3))
            pixels[..., label] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / str(label) / f"{index:02d}.png")
    return folder


@pytest.fixture
def train_branches(small_resnet: str, colours: Path) -> Callable[..., Result]:
    """Train the small residual network in branches on the coloured pictures."""

    def run(*, progress: object = None, **options: object) -> Result:
        values = {
            "model": small_resnet,
            "bits": "any:2-8",
            "engine": "branches",
            "train": colours,
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": 0.02,
            "device": "cpu",
        }
        return quantize_api.quantize(QuantizeSettings.build({**values, **options}), progress)

    return run


@pytest.fixture(scope="session")
def kept_branches() -> dict[str, bytes]:
    """Files that were trained once and serve several tests."""
    return {}


@pytest.fixture
def branch_file(train_branches: Callable[..., Result], kept_branches: dict[str, bytes]) -> Path:
    """A file of branches for 2 to 8 bits."""
    path = Path("branches.safetensors")
    if "any" not in kept_branches:
        train_branches(out=path)
        kept_branches["any"] = path.read_bytes()
    path.write_bytes(kept_branches["any"])
    return path
