"""The data configuration survives JSON, and says what it lacks."""

import json

import pytest

from qtool.errors import UsageError
from qtool.models.data_config import DataConfig

CONFIG = DataConfig((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.9)


def test_round_trip_through_json():
    assert DataConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def test_more_keys_do_no_harm():
    assert DataConfig.from_dict({**CONFIG.to_dict(), "crop_mode": "center"}) == CONFIG


@pytest.mark.parametrize("key", ["input_size", "mean", "std", "interpolation", "crop_pct"])
def test_absent_key_is_a_usage_error(key):
    values = CONFIG.to_dict()
    del values[key]
    with pytest.raises(UsageError, match="incomplete"):
        DataConfig.from_dict(values)


@pytest.mark.parametrize("size", [224, (224, 224), ("a", "b", "c")])
def test_odd_input_size_is_a_usage_error(size):
    with pytest.raises(UsageError):
        DataConfig.from_dict({**CONFIG.to_dict(), "input_size": size})
