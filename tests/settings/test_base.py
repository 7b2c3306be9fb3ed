"""Settings shared by all commands: defaults, checks and what is said about wrong values."""

import importlib
import inspect
import pkgutil

import pytest

import qtool.settings as package
from qtool.errors import UsageError
from qtool.settings.base import CommonSettings, Settings
from qtool.settings.quantize import QuantizeSettings

MODELS = sorted(
    {
        model
        for found in pkgutil.iter_modules(package.__path__)
        for _, model in inspect.getmembers(
            importlib.import_module(f"qtool.settings.{found.name}"), inspect.isclass
        )
        if issubclass(model, Settings) and model is not Settings
    },
    key=lambda model: model.__name__,
)


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
        ({"bits": "any:8-4"}, "empty range"),
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
