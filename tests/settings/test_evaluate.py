"""Settings of `qtool eval`."""

import pytest

from qtool.errors import UsageError
from qtool.settings.evaluate import EvaluateSettings


def test_gates():
    made = EvaluateSettings.build({"target": "vit_b", "minimum": ("top1=75", "top5 = 92.5")})
    assert made.gates == (("top1", 75.0), ("top5", 92.5))


@pytest.mark.parametrize(
    "gate", ["75", "top1", "top1=", "=75", "top1=high", "top1=nan", "top1=inf"]
)
def test_wrong_gates(gate):
    with pytest.raises(UsageError, match="METRIC=VALUE"):
        EvaluateSettings.build({"target": "vit_b", "minimum": (gate,)})
