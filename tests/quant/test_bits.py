"""Bit-widths read from text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import UsageError
from qtool.quant.bits import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    BitSpec,
    parse_average,
    parse_range,
    parse_rule,
    parse_width,
)


@given(
    weight=st.sampled_from(WEIGHT_BITS),
    activation=st.sampled_from(ACTIVATION_BITS),
    upper=st.booleans(),
)
def test_every_width_survives_text(weight, activation, upper):
    spec = BitSpec(weight, activation)
    text = str(spec).upper() if upper else str(spec)
    assert BitSpec.parse(text) == spec


@given(st.text(max_size=8))
def test_any_text_is_a_width_or_a_usage_error(text):
    if re.fullmatch(r"[wW][2-8][aA]([2-8]|16|32)", text):
        assert str(BitSpec.parse(text)) == text.lower()
    else:
        with pytest.raises(UsageError):
            BitSpec.parse(text)


@pytest.mark.parametrize("text", ["", "4", "w4", "a4", "w1a4", "w9a4", "w4a1", "w4a9", "w4a12"])
@pytest.mark.parametrize("around", ["{}", " {}", "{}\n", "x{}"])
def test_wrong_widths_are_refused(text, around):
    with pytest.raises(UsageError, match="is not a bit-width"):
        BitSpec.parse(around.format(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("any", (4, 5, 6, 7, 8)),
        ("ANY:2-8", (2, 3, 4, 5, 6, 7, 8)),
        ("any:4-4", (4,)),
        ("any:8,2,4,2", (2, 4, 8)),
        ("Any:3", (3,)),
        ("any:2,9", None),
        ("any:2,", None),
        ("w4a4", None),
    ],
)
def test_ranges_of_switchable_files(text, expected):
    assert parse_range(text) == expected


def test_a_falling_range_is_refused():
    with pytest.raises(UsageError, match="empty range") as caught:
        parse_range("any:8-4")
    assert "any:4-8" in caught.value.remedy


@pytest.mark.parametrize(("width", "expected"), [(4, "w4a8"), ("6", "w6a8"), ("W4A4", "w4a4")])
def test_widths_of_switchable_files(width, expected):
    assert str(parse_width(width)) == expected


@pytest.mark.parametrize(("weight", "activation"), [(1, 4), (9, 4), (4, 12), (16, 16)])
def test_a_width_outside_the_grammar_cannot_be_made(weight, activation):
    with pytest.raises(UsageError):
        BitSpec(weight, activation)


def test_floating_point_activations_are_not_integer():
    assert BitSpec(8, 8).integer
    assert not BitSpec(8, 16).integer


@pytest.mark.parametrize(
    ("text", "glob", "spec"),
    [
        ("head=8", "head", BitSpec(8, 8)),
        ("blocks.*.mlp.fc1=w4a8", "blocks.*.mlp.fc1", BitSpec(4, 8)),
        ("a=b=w2a3", "a=b", BitSpec(2, 3)),
    ],
)
def test_rules(text, glob, spec):
    assert parse_rule(text) == (glob, spec)


@pytest.mark.parametrize("text", ["", "head", "=8", "head=", "head=9", "head=w8a16", "head=any"])
def test_wrong_rules_are_refused(text):
    with pytest.raises(UsageError):
        parse_rule(text)


@pytest.mark.parametrize(
    ("text", "average"),
    [("mixed:4", 4.0), ("MIXED:3.25", 3.25), ("mixed:8.0", 8.0), ("w4a4", None), ("any", None)],
)
def test_mean_widths(text, average):
    assert parse_average(text) == average


@pytest.mark.parametrize(
    "text", ["mixed", "mixed:", "mixed:1.9", "mixed:9", "mixed:-4", "mixed:4x"]
)
def test_wrong_mean_widths(text):
    with pytest.raises(UsageError, match="mean bit-width"):
        parse_average(text)
