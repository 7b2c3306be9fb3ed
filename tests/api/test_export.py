"""Quantized models as ONNX files: what is in them, what they compute, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from qtool.api import export, onnx_check
from qtool.api import quantize as quantize_api
from qtool.api.load import load, restore
from qtool.api.switch_bits import switch_bits
from qtool.errors import MissingError, OutputExistsError, QtoolError, UsageError
from qtool.io import checkpoint
from qtool.io import onnx as files
from qtool.settings.quantize import QuantizeSettings
from qtool.settings.switch_bits import SwitchBitsSettings

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name)

CHECKPOINT, FILE = Path("q.safetensors"), Path("q.onnx")
SMALL = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
SWIN = {
    "img_size": 32,
    "window_size": 4,
    "embed_dim": 16,
    "depths": [2],
    "num_heads": [2],
    "num_classes": 10,
}


@pytest.fixture
def small(save_weights):
    return save_weights("demo_vit", SMALL)


def switch(**options):
    options = {"target": CHECKPOINT, "onnx": FILE, "device": "cpu", **options}
    return switch_bits(SwitchBitsSettings.build(options))


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def operators(path=FILE):
    import onnx

    return [node.op_type for node in onnx.load(path).graph.node]


def assert_runs_as_the_engine(model, path=FILE, size=32):
    with torch.no_grad():
        for count in (1, 3):
            x = images(count, size)
            (logits,) = files.run(str(path), x.numpy())
            found = onnx_check.compare(model, x, torch.from_numpy(logits))
            assert found["relative_error"] < 0.5


def test_quantize_writes_both_files(quantize, small):
    import onnx

    summary = quantize(small, out=CHECKPOINT, onnx=FILE, bits="w4a4").summary["onnx"]
    assert summary["bytes"] == FILE.stat().st_size
    assert summary["weights"] == {"int4": 6}
    assert summary["verify"]["layer_difference"] < 1e-5
    assert summary["verify"]["float_difference"] < 1e-5
    model = onnx.load(FILE)
    onnx.checker.check_model(model)
    assert [value.name for value in model.graph.input] == ["image"]
    assert [value.name for value in model.graph.output] == ["logits"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", 3, 32, 32]
    said = {prop.key: prop.value for prop in model.metadata_props}
    assert said["qtool.bits"] == "w4a4"
    assert '"mean": [0.5, 0.4, 0.3]' in said["qtool.data"]
    ops = operators()
    assert ops.count("DequantizeLinear") == 6 + ops.count("QuantizeLinear")
    assert str(Path.cwd()).encode() not in FILE.read_bytes()
    assert b"/qtool/" not in FILE.read_bytes()
    assert_runs_as_the_engine(restore(*checkpoint.read(CHECKPOINT), origin="q.safetensors"))


@pytest.mark.parametrize(
    ("family", "options", "weights"),
    [
        ("swin", {"recipe": "paper", "bits": "w5a4"}, "int8"),
        ("resnet", {"bits": "w3a8"}, "int4"),
        pytest.param("mobilenet", {"bits": "w8a8"}, "uint8", marks=pytest.mark.slow),
    ],
)
def test_every_family_is_exported(save_weights, quantize, convolutional, family, options, weights):
    if family == "swin":
        model = save_weights("swin_tiny_patch4_window7_224", SWIN)
    else:
        model = convolutional(family)
    summary = quantize(model, out=CHECKPOINT, onnx=FILE, **options).summary["onnx"]
    assert list(summary["weights"]) == [weights]
    assert summary["verify"]["layer_difference"] < 1e-5
    assert_runs_as_the_engine(restore(*checkpoint.read(CHECKPOINT), origin="q.safetensors"))


@pytest.mark.parametrize(("bits", "weights"), [("w8a8", "uint8"), ("w4a4", "int4")])
def test_switchable_convolutions_are_exported(quantize, convolutional, bits, weights):
    quantize(convolutional("resnet"), out=CHECKPOINT, bits="any:4-8", effort="quick")
    found = switch(bits=bits).summary["onnx"]
    assert set(found["weights"]) == {weights}
    assert found["verify"]["layer_difference"] < 1e-5
    assert_runs_as_the_engine(load(CHECKPOINT, bits=bits))


def test_a_switchable_file_is_exported_at_the_bits_asked_for(quantize, small):
    quantize(small, out=CHECKPOINT, bits="any:4-8", recipe="strong", effort="quick")
    before = CHECKPOINT.read_bytes()
    result = switch(bits="w4a4")
    assert result.summary["onnx"]["bits"] == "w4a4"
    assert set(result.summary["onnx"]["weights"]) == {"int4"}
    assert CHECKPOINT.read_bytes() == before
    assert_runs_as_the_engine(load(CHECKPOINT, bits="w4a4"))
    with pytest.raises(OutputExistsError):
        switch()


def test_the_same_checkpoint_gives_the_same_bytes_and_nothing_wrong_stays(
    quantize, small, monkeypatch
):
    quantize(small, out=CHECKPOINT, bits="w8a8")
    first = switch().summary["onnx"]
    content = FILE.read_bytes()
    traced = []

    def trace(*arguments, original=export._trace):
        traced.append(original(*arguments))
        return traced[0]

    monkeypatch.setattr(export, "_trace", trace)
    assert switch(overwrite=True).summary["onnx"] == first
    assert FILE.read_bytes() == content
    monkeypatch.setattr(export, "_trace", lambda *_: traced[0])
    original = files.run
    for wrong, message in ((False, "of the exported model"), (True, "the logits of the")):

        def run(model, image, *, optimize=True, wrong=wrong):
            found = original(model, image, optimize=optimize)
            return [np.flip(value, -1).copy() for value in found] if optimize == wrong else found

        monkeypatch.setattr(files, "run", run)
        with pytest.raises(QtoolError, match=message):
            switch(overwrite=True)
        assert FILE.read_bytes() == content
        with pytest.raises(QtoolError, match=message):
            switch(onnx=Path("other.onnx"))
    assert [path.name for path in Path().iterdir() if "onnx" in path.name] == [FILE.name]


def test_a_dry_run_lists_the_file_and_writes_nothing(quantize, small):
    options = {"model": small, "onnx": FILE, "calib": Path(), "dry_run": True, "device": "cpu"}
    planned = quantize_api.plan(QuantizeSettings.build(options))
    assert planned.summary["onnx"] == str(FILE)
    quantize(small, out=CHECKPOINT)
    assert switch(dry_run=True).summary["onnx"] == {"path": str(FILE), "bits": "w4a4"}
    assert not FILE.exists()


def test_an_existing_file_is_refused_before_any_work(quantize, small):
    FILE.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"q\.onnx exists"):
        quantize(small, out=CHECKPOINT, onnx=FILE)
    assert not CHECKPOINT.exists()
    assert FILE.read_text() == "mine"


def test_a_checkpoint_that_may_stay_is_still_exported(quantize, small, monkeypatch):
    quantize(small, out=CHECKPOINT, bits="w8a8")
    before = CHECKPOINT.read_bytes()
    made = []

    def write(model, header, path, *, images, **_):
        made.append((header.active_bits, images.shape))
        path.write_bytes(b"onnx")
        return {"path": str(path)}

    monkeypatch.setattr(export, "export", write)
    options = {"out": CHECKPOINT, "bits": "w8a8", "onnx": FILE, "skip_existing": True}
    result = quantize(small, **options)
    assert result.summary["status"] == "skipped"
    assert result.summary["onnx"] == {"path": str(FILE)}
    assert made == [("w8a8", (2, 3, 32, 32))]
    assert CHECKPOINT.read_bytes() == before
    assert "onnx" not in quantize(small, **options).summary
    assert len(made) == 1


def test_without_the_extra_nothing_starts(quantize, small, monkeypatch):
    def missing():
        raise MissingError("no")

    monkeypatch.setattr(files, "require", missing)
    with pytest.raises(MissingError):
        quantize(small, out=CHECKPOINT, onnx=FILE)
    assert not CHECKPOINT.exists()
    quantize(small, out=CHECKPOINT)
    with pytest.raises(MissingError):
        switch()


def test_a_checkpoint_with_one_width_cannot_be_switched_for_export(quantize, small):
    quantize(small, out=CHECKPOINT)
    with pytest.raises(UsageError, match="one width per layer"):
        switch(bits="8")
