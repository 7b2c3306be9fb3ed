"""Widths, budgets and places, and what contradicts itself."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import QtoolError, UsageError
from qtool.quant.bits import BitSpec
from qtool.settings.switch_bits import Budget, SwitchBitsSettings, parse_budget

FILE = Path("any.safetensors")


def settings(**options):
    return SwitchBitsSettings.build({"target": FILE, **options})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5MB", Budget(5e6, "bytes")),
        ("5.25", Budget(5.25e6, "bytes")),
        (" 2 mb ", Budget(2e6, "bytes")),
        ("40%", Budget(0.4, "operations")),
    ],
)
def test_budgets_are_sizes_or_shares(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0%", "-3MB", "5GB", "many", "4%%", "٤MB", "nan", "1e3"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UsageError, match="is not a budget") as caught:
        settings(budget=text, in_place=True)
    assert "5MB" in caught.value.remedy


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_one_clear_error(text):
    try:
        found = parse_budget(text)
    except UsageError:
        return
    assert found.amount > 0


def test_rules_keep_their_order_and_their_globs():
    found = settings(layers=("blocks.*=4", "blocks.0.*=w6a8", "a=b=2"), in_place=True)
    assert found.rules == (
        ("blocks.*", BitSpec(4, 8)),
        ("blocks.0.*", BitSpec(6, 8)),
        ("a=b", BitSpec(2, 8)),
    )


@pytest.mark.parametrize("rule", ["blocks.0", "=4", "  =4", "head=", "head=9", "head=w1a8"])
def test_rules_that_say_nothing_are_refused(rule):
    with pytest.raises(QtoolError):
        settings(layers=(rule,), in_place=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "nothing asked for"),
        ({"bits": "4", "budget": "5MB", "in_place": True}, "several things"),
        ({"bits": "4", "listing": True}, "several things"),
        ({"bits": "4"}, "not clear where"),
        ({"bits": "4", "in_place": True, "out": Path("copy.safetensors")}, "two places"),
        ({"listing": True, "in_place": True}, "writes nothing"),
        ({"listing": True, "drop_unused": True}, "writes nothing"),
        ({"bits": "4", "in_place": True, "drop_unused": True}, "makes another file"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(options, reason):
    with pytest.raises(UsageError, match=reason) as caught:
        settings(**options)
    assert caught.value.remedy


def test_a_width_may_be_bits_of_weights_alone():
    assert settings(bits="4", in_place=True).bits == "w4a8"
    assert settings(bits="w4a4", out=Path("copy.safetensors"), drop_unused=True).bits == "w4a4"
    with pytest.raises(UsageError):
        settings(bits="1", in_place=True)


def test_an_onnx_model_is_a_place_of_its_own():
    assert settings(onnx=Path("m.onnx")).exports_alone
    assert not settings(onnx=Path("m.onnx"), bits="4").exports_alone
    assert not settings(onnx=Path("m.onnx"), bits="4", in_place=True).exports_alone
    for options in (
        {"onnx": Path("m.onnx"), "listing": True},
        {"onnx": Path("m.onnx"), "bits": "4", "drop_unused": True},
        {"onnx": Path("m.onnx"), "in_place": True},
        {"onnx": Path("m.onnx"), "bits": "4", "in_place": True, "out": Path("b.safetensors")},
    ):
        with pytest.raises(UsageError):
            settings(**options)


@pytest.mark.parametrize("name", ["model", "model.safetensors", "onnx"])
def test_an_onnx_model_is_known_by_its_name(name):
    with pytest.raises(UsageError, match="is no name of an ONNX file") as caught:
        settings(onnx=Path(name))
    assert ".onnx" in caught.value.remedy


def test_a_copy_is_a_file_or_a_hub_folder(tmp_path):
    assert settings(listing=True).output is None
    assert settings(listing=True).folder is None
    assert settings(bits="4", out="b.safetensors").output == Path("b.safetensors")
    made = settings(bits="4", out=f"{tmp_path}/hub/")
    assert (made.folder, made.output) == (tmp_path / "hub", tmp_path / "hub" / "model.safetensors")
    assert settings(bits="4", out=tmp_path).folder == tmp_path
