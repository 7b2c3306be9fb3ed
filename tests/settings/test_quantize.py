"""Settings of `qtool quantize`."""

from pathlib import Path

import pytest

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
