"""What an exported model's check sees, and what it leaves alone; no ONNX needed."""

from pathlib import Path

import pytest
import torch

from qtool.api import onnx_check
from qtool.api.load import restore
from qtool.errors import QtoolError
from qtool.io import checkpoint

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(quantize, demo):
    quantize(demo, out="q.safetensors", bits="w4a4")
    header, tensors = checkpoint.read(Path("q.safetensors"))
    found = restore(header, tensors, origin="q.safetensors")
    found.qtool_config = header
    return found


@pytest.fixture
def record(model):
    """Run the engine as an exported model would, and take everything down."""

    def run():
        taps, values = [], []

        def wrap(name, owner, method):
            original = getattr(owner, method)

            def call(*inputs):
                output = original(*inputs)
                taps.append(name)
                values.extend([*(value.clone() for value in inputs), output.clone()])
                return output

            setattr(owner, method, call)
            return owner, method

        wrapped = []
        for name in model.qtool_config.layers:
            module = model.get_submodule(name)
            if model.qtool_config.layers[name].kind == "attention":
                products = f"{name}.products"
                wrapped += [
                    wrap(f"{products}.{part}", module.products, part)
                    for part in ("scores", "values")
                ]
            else:
                wrapped.append(wrap(name, module, "forward"))
        with torch.no_grad():
            logits = model(IMAGES)
        for owner, method in wrapped:
            delattr(owner, method)
        return taps, [logits, *values]

    return run


def test_the_engine_agrees_with_itself(model, record):
    taps, outputs = record()
    assert len(taps) == 2 + 2 * 6
    found = onnx_check.lockstep(model, IMAGES, taps, outputs)
    assert found == {"layer_difference": 0.0, "float_difference": 0.0}
    assert not [name for module in model.modules() for name in ("forward", "scores")
                if name in vars(module)]  # fmt: skip


def test_any_part_that_differs_is_named(model, record):
    taps, outputs = record()
    for index in range(len(outputs)):
        changed = list(outputs)
        changed[index] = outputs[index] * 1.05
        with pytest.raises(QtoolError, match="of the exported model differs") as caught:
            onnx_check.lockstep(model, IMAGES, taps, changed)
        assert caught.value.remedy
        changed[index] = outputs[index] * torch.nan
        with pytest.raises(QtoolError, match="differs"):
            onnx_check.lockstep(model, IMAGES, taps, changed)


def test_logits_may_differ_as_noise_makes_them(model):
    with torch.no_grad():
        logits = model(IMAGES)
    found = onnx_check.compare(model, IMAGES, logits)
    assert found["same_choice"] == 1.0
    assert found["relative_error"] == found["largest_difference"] == 0.0
    assert 0 < found["relative_error_of_noise"] < 1
    with torch.no_grad():
        assert torch.equal(model(IMAGES), logits)
    for wrong in (logits.flip(1), logits * 3, logits * torch.nan):
        with pytest.raises(QtoolError, match="noise would make"):
            onnx_check.compare(model, IMAGES, wrong)
