"""Aliases pin exact weights, and the registry needs no torch."""

import subprocess
import sys

import pytest

from qtool.models import registry

PINNED = {
    "vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deit_t": "deit_tiny_patch16_224.fb_in1k",
    "deit_s": "deit_small_patch16_224.fb_in1k",
    "deit_b": "deit_base_patch16_224.fb_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
}


@pytest.mark.parametrize(("alias", "architecture"), PINNED.items())
def test_alias_is_pinned(alias, architecture):
    spec = registry.find(alias)
    assert spec is not None
    assert spec.architecture == architecture
    assert registry.find(architecture) is spec


def test_aliases_are_unique_and_described():
    aliases = [spec.alias for spec in registry.MODELS]
    assert len(set(aliases)) == len(aliases)
    assert all(spec.licence and spec.paper and spec.parameters > 0 for spec in registry.MODELS)


def test_only_the_demo_is_bundled():
    assert [spec.alias for spec in registry.MODELS if spec.bundled] == ["demo_vit"]


def test_find_knows_no_near_names():
    assert registry.find("deit") is None
    assert registry.find("DEIT_T") is None


@pytest.mark.parametrize(
    ("typed", "expected"), [("deit_tt", "deit_t"), ("swint", "swin_t"), ("Resnet-50", "resnet50")]
)
def test_suggestions_hold_the_near_name(typed, expected):
    assert expected in registry.suggestions(typed)


def test_suggestions_are_few_and_distinct():
    near = registry.suggestions("deit_t", more=("deit_t", "deit_tiny", "deit_tin"), limit=2)
    assert len(near) == len(set(near)) == 2
    assert registry.suggestions("qqqqqq") == []


def test_size_is_in_megabytes():
    spec = registry.find("vit_b")
    assert spec is not None
    assert spec.size == "346 MB"
    assert registry.size_text(2.5e6) == "2.5 MB"


def test_importing_the_registry_leaves_torch_alone():
    code = "import sys, qtool.models.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
