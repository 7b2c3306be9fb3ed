"""Settings: defaults, checks and what is said about wrong values."""

import inspect
from pathlib import Path

import pytest

from qtool import settings as module
from qtool.errors import UsageError
from qtool.quant.bits import BitSpec
from qtool.settings import (
    CommonSettings,
    EvaluateSettings,
    QuantizeSettings,
    Settings,
    SynthesizeSettings,
)

MODELS = [
    model
    for _, model in inspect.getmembers(module, inspect.isclass)
    if issubclass(model, Settings) and model is not Settings
]


def quantize(**values: object) -> QuantizeSettings:
    return QuantizeSettings.build({"model": "vit_b", "data_free": True, **values})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_described_in_one_sentence(model):
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_settings_do_not_change():
    made = quantize()
    with pytest.raises(ValueError, match="frozen"):
        made.count = 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 0}, "count must be greater than or equal to 1, not 0"),
        ({"threads": "many"}, "threads must be a valid integer, not 'many'"),
        ({"effort": "hard"}, "effort must be 'quick', 'standard' or 'max', not 'hard'"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": "cuda:x"}, "there is no device 'cuda:x'"),
        ({"bits": "w4a16"}, "w4a16 keeps activations in floating point"),
        ({"bits": "any"}, "switchable"),
        ({"report": "report.pdf"}, "kind of report"),
        ({"keep": ("head",)}, "'head' is not GLOB=BITS"),
        ({"cuont": 3}, "cuont is not a setting here"),
        ({"overwrite": True, "skip_existing": True}, "contradict"),
        ({"calib": "photos"}, "several sources"),
        ({"data_free": False}, "no source"),
        ({"model": ""}, "model must have at least 1 character, not ''"),
    ],
)
def test_wrong_values_are_named(values, said):
    with pytest.raises(UsageError) as caught:
        quantize(**values)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_a_misspelt_field_brings_near_names():
    with pytest.raises(UsageError) as caught:
        quantize(data_fre=True)
    assert "data_free" in caught.value.remedy


def test_a_missing_field_is_called_by_the_users_name():
    with pytest.raises(UsageError, match=r"^MODEL is missing"):
        QuantizeSettings.build({}, named={"model": "MODEL"}.__getitem__)


def test_incomplete_settings_skip_rules_between_fields_only():
    made = QuantizeSettings.build({"model": "vit_b"}, complete=False)
    assert not made.data_free
    with pytest.raises(UsageError):
        QuantizeSettings.build({"model": "vit_b", "count": 0}, complete=False)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(device):
    assert CommonSettings.build({"device": device}).device == device


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


def test_output_can_be_named():
    assert quantize(out="here.safetensors").output == Path("here.safetensors")


@pytest.mark.parametrize(
    ("classes", "indices"),
    [("", ()), ("3", (3,)), ("0-3, 17,2", (0, 1, 2, 3, 17)), ("5-5", (5,))],
)
def test_classes(classes, indices):
    made = SynthesizeSettings.build({"model": "vit_b", "out": "x", "classes": classes})
    assert made.class_indices == indices


@pytest.mark.parametrize("classes", ["a", "3-1", "-3", "1;2", "1-2-3", "1234567"])
def test_wrong_classes(classes):
    with pytest.raises(UsageError, match="cannot be read"):
        SynthesizeSettings.build({"model": "vit_b", "out": "x", "classes": classes})


def test_gates():
    made = EvaluateSettings.build({"target": "vit_b", "minimum": ("top1=75", "top5 = 92.5")})
    assert made.gates == (("top1", 75.0), ("top5", 92.5))


@pytest.mark.parametrize(
    "gate", ["75", "top1", "top1=", "=75", "top1=high", "top1=nan", "top1=inf"]
)
def test_wrong_gates(gate):
    with pytest.raises(UsageError, match="METRIC=VALUE"):
        EvaluateSettings.build({"target": "vit_b", "minimum": (gate,)})
