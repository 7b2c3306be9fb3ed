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


def test_parts_of_spdfq_can_be_left_out():
    made = SynthesizeSettings.build({"model": "m", "out": "x", "ablate": ["patches", "alignment"]})
    assert made.ablate == ("patches", "alignment")


@pytest.mark.parametrize("method", ["psaq", "noise"])
def test_other_methods_have_no_such_parts(method):
    with pytest.raises(UsageError, match="has no patches"):
        SynthesizeSettings.build(
            {"model": "m", "out": "x", "method": method, "ablate": ["patches"]}
        )
