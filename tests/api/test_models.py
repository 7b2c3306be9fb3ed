"""Lists of models, and what a file says about itself."""

from pathlib import Path

import pytest

from qtool.api.models import info, list_models
from qtool.errors import CheckpointError, UsageError
from qtool.models import registry
from qtool.settings.models import InfoSettings, ModelsSettings


def test_all_models_are_listed():
    result = list_models(ModelsSettings())
    assert result.status == "ok"
    assert [item["alias"] for item in result.items] == [spec.alias for spec in registry.MODELS]
    assert result.summary["count"] == len(registry.MODELS)
    assert len(result.tables[0].rows) == len(registry.MODELS)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("deit_?", {"deit_t", "deit_s", "deit_b"}),
        ("DEIT_T", {"deit_t"}),
        ("*window7*", {"swin_t", "swin_s", "swin_b"}),
        ("demo*", {"demo_vit"}),
    ],
)
def test_a_glob_selects_by_name_or_architecture(pattern, expected):
    found = list_models(ModelsSettings(pattern=pattern)).items
    assert {item["alias"] for item in found} == expected


def test_only_the_demo_model_is_bundled():
    bundled = [item for item in list_models(ModelsSettings()).items if item["bundled"]]
    assert [item["alias"] for item in bundled] == ["demo_vit"]


def test_a_glob_without_a_match_suggests_near_names():
    with pytest.raises(UsageError, match="no model matches 'diet_t'") as caught:
        list_models(ModelsSettings(pattern="diet_t"))
    assert "deit_t" in caught.value.remedy


def test_a_checkpoint_describes_itself(quantize, demo):
    quantize(demo, bits="w3a5", keep=("head=8",), out="q.safetensors", seed=7)
    result = info(InfoSettings(target=Path("q.safetensors")))
    summary = result.summary
    assert summary["bytes"] == Path("q.safetensors").stat().st_size
    assert (summary["architecture"], summary["engine"]) == ("demo_vit", "fixed")
    assert (summary["bits"], summary["active_bits"]) == (["w3a5"], "w3a5")
    assert summary["layers_by_weight_bits"] == {"3": 9, "8": 1}
    assert summary["provenance"]["seed"] == 7
    layers = {item["layer"]: item for item in result.items}
    assert layers["head"] == {
        "layer": "head",
        "kind": "linear",
        "weight_bits": 8,
        "input_bits": 8,
        "quantizer": "uniform",
    }
    assert layers["blocks.0.attn"]["quantizer"] == "table"
    assert layers["blocks.0.attn"]["probabilities"] == "table"
    assert result.to_json()
    assert result.to_markdown()


def test_other_files_are_refused(demo):
    with pytest.raises(CheckpointError):
        info(InfoSettings(target=Path(demo)))
    with pytest.raises(CheckpointError):
        info(InfoSettings(target=Path("absent.safetensors")))
