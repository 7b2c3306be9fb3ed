"""Settings of `qtool synthesize`."""

import pytest

from qtool.errors import UsageError
from qtool.settings.synthesize import SynthesizeSettings


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
