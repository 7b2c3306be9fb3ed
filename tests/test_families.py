"""Every family of the registry at its real size, from synthesis to accuracy, with random weights.

Slow: minutes of one core each. Run them with `pytest -m slow tests/test_families.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from qtool.api.evaluate import evaluate
from qtool.api.load import load
from qtool.api.quantize import quantize
from qtool.api.synthesize import synthesize_images
from qtool.models import registry, vision
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.synthesize import SynthesizeSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CLASSES = 1000
OUT = Path("quantized.safetensors")


@pytest.fixture
def weights(build_model, trained_norms, request, tmp_path):
    """Random weights of a model of the registry, in a file."""
    spec = registry.find(request.param)
    model = trained_norms(build_model(spec.architecture))
    path = tmp_path / "weights.safetensors"
    metadata = {"architecture": spec.architecture, "model_args": json.dumps({})}
    save_file(model.state_dict(), path, metadata)
    return request.param, path


@pytest.fixture
def pictures(tmp_path):
    """Two pictures with a label each."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(2):
        pixels = generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "labels.csv").write_text("file,label\n0.png,3\n1.png,7\n")
    return folder


@pytest.mark.parametrize(
    "weights",
    [
        "vit_b",
        "deit_t_distilled",
        "swin_t",
        "convnext_t",
        "resnet18",
        "resnet50",
        "mobilenetv2",
    ],
    indirect=True,
)
def test_synthesize_quantize_save_load_eval(weights, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alias, path = weights
    common = {"model": alias, "weights": str(path), "device": "cpu", "count": 2, "steps": 2}
    made = synthesize_images(
        SynthesizeSettings.build({**common, "out": Path("made"), "batch_size": 2})
    )
    assert len(made.items) == 2
    result = quantize(
        QuantizeSettings.build({**common, "synthetic": Path("made"), "bits": "w4a4", "out": OUT})
    )
    checked = result.summary["verify"]
    assert checked["same_choice"] == 1.0
    assert result.summary["bytes"] < 0.2 * result.summary["float_bytes"]
    model = load(OUT)
    shape = vision.DataConfig.from_dict(model.qtool_config.data).input_size
    with torch.no_grad():
        assert model(torch.zeros(1, *shape)).shape == (1, CLASSES)
    report = evaluate(
        EvaluateSettings.build({"target": str(OUT), "data": pictures, "device": "cpu"})
    )
    assert report.summary["count"] == 2
    assert 0.0 <= report.summary["top1"] <= 100.0
