"""Settings of `qtool quantize`."""

from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec
from qtool.settings.quantize import QuantizeSettings


def quantize(**values: object) -> QuantizeSettings:
    return QuantizeSettings.build({"model": "vit_b", "data_free": True, **values})


def test_bits_are_normalised():
    made = quantize(bits="W4A8", keep=("head=8",))
    assert made.bits == "w4a8"
    assert made.bit_spec == BitSpec(4, 8)
    assert made.kept == (("head", BitSpec(8, 8)),)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("vit_b", "vit_b-w4a4.safetensors"),
        ("hf-hub:timm/vit_base.augreg", "vit_base.augreg-w4a4.safetensors"),
        ("local-dir:weights/mine/", "mine-w4a4.safetensors"),
        ("dir/own weights.safetensors", "own-weights-w4a4.safetensors"),
    ],
)
def test_output_is_named_after_model_and_bits(model, name):
    assert quantize(model=model).output == Path(name)


def test_mixed_bits_name_the_file_and_the_mean():
    made = quantize(bits="Mixed:4.50")
    assert made.bits == "mixed:4.5"
    assert made.average_bits == 4.5
    assert made.output == Path("vit_b-mixed4.5.safetensors")
    assert quantize().average_bits is None


def test_output_can_be_named():
    assert quantize(out="here.safetensors").output == Path("here.safetensors")


BRANCHES = {"model": "resnet20", "bits": "any:2-8", "engine": "branches", "train": "pictures"}


def test_branches_need_no_calibration_pictures():
    made = QuantizeSettings.build(BRANCHES)
    assert made.switchable == tuple(range(2, 9))
    assert made.epochs > 0
    assert QuantizeSettings.build({**BRANCHES, "bits": "any:8,2,4"}).switchable == (2, 4, 8)


@pytest.mark.parametrize("bits", ["w2a8", "any:4-8", "any:2-2", "mixed:3"])
def test_own_codes_of_two_bits_need_two_bits_and_others(bits):
    made = {"model": "demo_vit", "data_free": True, "dedicated_2bit": True}
    with pytest.raises(UsageError, match="--dedicated-2bit is for files"):
        QuantizeSettings.build({**made, "bits": bits})
    assert QuantizeSettings.build({**made, "bits": "any:2,4"}).dedicated_2bit


def test_a_list_of_widths_names_the_file():
    made = QuantizeSettings.build({**BRANCHES, "bits": "any:2,4,8"})
    assert made.output == Path("resnet20-any2-4-8.safetensors")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"bits": "w4a4"}, "not for w4a4"),
        ({"bits": "mixed:4"}, "not for mixed:4"),
        ({"train": None}, "needs pictures to train on"),
        ({"data_free": True}, "--data-free is for calibration"),
        ({"calib": "photos"}, "--calib is for calibration"),
        ({"synthetic": "made"}, "--synthetic is for calibration"),
        ({"recipe": "paper"}, "--recipe is for calibration"),
        ({"effort": "max"}, "--effort is for calibration"),
        ({"steps": 3}, "--steps is for calibration"),
        ({"count": 3}, "--count is for calibration"),
        ({"onnx": "b.onnx"}, "not exported to ONNX"),
        ({"keep": ("a=8",)}, "--keep is for calibration"),
        ({"skip": ("a",)}, "--skip is for calibration"),
        ({"dedicated_2bit": True}, "--dedicated-2bit is for calibration"),
        ({"ablate": ("prefix", "one-set")}, "no branches for prefix"),
        ({"ablate": ("everything",)}, "ablate"),
        ({"engine": "nested", "train": None, "data_free": True, "epochs": 3}, "--epochs is for"),
        ({"engine": "nested", "data_free": True}, "--train is for training"),
        ({"epochs": 0}, "epochs must be greater"),
        ({"learning_rate": 0}, "learning_rate must be greater"),
    ],
)
def test_options_that_make_no_sense_with_an_engine_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        QuantizeSettings.build({**BRANCHES, **values})


def test_a_slash_or_a_folder_asks_for_a_hub_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = quantize(out="new/")
    assert (made.folder, made.output) == (Path("new"), Path("new/model.safetensors"))
    assert made.state == Path(".new.resume")
    for file in (quantize(out="new"), quantize(out=Path("new/"))):
        assert (file.folder, file.output) == (None, Path("new"))
    (tmp_path / "new").mkdir()
    for out in ("new", "new/", Path("new"), tmp_path / "new"):
        assert quantize(out=out).folder == Path(out)
    assert quantize(out="new").state == Path("new/.model.safetensors.resume")
    assert quantize(out=".").output == Path("model.safetensors")
    assert quantize().folder is None
    assert quantize().state == Path(".vit_b-w4a4.safetensors.resume")


def test_an_output_without_a_name_is_refused():
    with pytest.raises(UsageError, match="the name of the output is empty"):
        quantize(out="")
