"""`switch-bits` and `eval --bits` with a file of branches."""

import hashlib
from pathlib import Path

import pytest

from qtool.api import evaluate as evaluate_api
from qtool.api import models
from qtool.api.branch_widths import costs
from qtool.api.load import load
from qtool.api.switch_bits import switch_bits
from qtool.errors import OutputExistsError, UsageError
from qtool.io import checkpoint
from qtool.io.container import read_table
from qtool.settings.evaluate import EvaluateSettings
from qtool.settings.models import InfoSettings
from qtool.settings.switch_bits import SwitchBitsSettings

WIDTHS = [f"w{bits}a{bits}" for bits in range(2, 9)]


def switch(target, **options):
    return switch_bits(SwitchBitsSettings.build({"target": target, **options}))


def tensor_bytes(path):
    with path.open("rb") as file:
        start = read_table(file, path).data_start
    return hashlib.sha256(path.read_bytes()[start:]).hexdigest()


def evaluate(target, data, **options):
    values = {"target": str(target), "data": data, "device": "cpu", "baseline": "none", **options}
    return evaluate_api.evaluate(EvaluateSettings.build(values))


def test_the_list_shows_branches_and_costs(branch_file):
    result = switch(branch_file, listing=True)
    assert result.summary["widths"] == WIDTHS
    rows = result.summary["rows"]
    assert [row["branches"] for row in rows] == [
        "1", "1 h2", "2 3", "2 3 h4", "2 3 4", "1 2 3 h4", "1 2 3 4",
    ]  # fmt: skip
    assert [row["bits"] for row in rows if row["active"]] == ["w8a8"]
    assert rows[-1]["needed_bytes"] == pytest.approx(branch_file.stat().st_size, rel=0.01)


def test_bit_operations_are_those_of_plain_networks(branch_file):
    rows = costs(checkpoint.read_planes(branch_file))
    header = checkpoint.read_header(branch_file)
    macs = sum(layer.options["macs"] for layer in header.layers.values())
    for row, bits in zip(rows, range(2, 9), strict=True):
        assert row["bit_operations"] == pytest.approx(bits * bits * macs, rel=0.01)


def test_a_header_is_changed_in_place(branch_file):
    before = tensor_bytes(branch_file)
    result = switch(branch_file, bits="4", in_place=True)
    assert result.summary["active_bits"] == "w4a4"
    assert result.summary["branches"] == "2 3"
    assert tensor_bytes(branch_file) == before
    header = checkpoint.read_header(branch_file)
    assert header.active_bits == "w4a4"
    assert {layer.input_bits for layer in header.layers.values()} == {4}
    assert load(branch_file).active_bits == "w4a4"


def test_a_copy_leaves_its_source_alone(branch_file):
    switch(branch_file, bits="w3a3", out=Path("copy.safetensors"))
    assert checkpoint.read_header(branch_file).active_bits == "w8a8"
    assert load("copy.safetensors").active_bits == "w3a3"
    with pytest.raises(OutputExistsError):
        switch(branch_file, bits="3", out=Path("copy.safetensors"))
    with pytest.raises(UsageError, match="replace its source"):
        switch(branch_file, bits="3", out=branch_file, overwrite=True)


def test_a_dry_run_changes_nothing(branch_file):
    before = branch_file.read_bytes()
    assert switch(branch_file, bits="2", in_place=True, dry_run=True).status == "planned"
    assert branch_file.read_bytes() == before


def test_a_budget_picks_the_widest_width_that_fits(branch_file):
    picked = switch(branch_file, budget="40%", in_place=True, dry_run=True)
    assert picked.summary["active_bits"] == "w5a5"
    rows = costs(checkpoint.read_planes(branch_file))
    size = f"{rows[1]['needed_bytes'] / 1e6 + 1e-9:.9f}MB"
    assert switch(branch_file, budget=size, out=Path("c.safetensors")).summary["active_bits"] in (
        "w3a3",
        "w4a4",
    )
    with pytest.raises(UsageError, match="narrowest width takes"):
        switch(branch_file, budget="1%", in_place=True)
    with pytest.raises(UsageError, match="narrowest width takes"):
        switch(branch_file, budget="0.000001MB", in_place=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": "w4a6"}, "cannot run at w4a6"),
        ({"layers": ("layer1.*=4",)}, "one width as a whole"),
        ({"bits": "4", "onnx": Path("b.onnx")}, "not exported to ONNX"),
        ({"bits": "4", "drop_unused": True, "out": Path("c")}, "one width as a whole"),
    ],
)
def test_what_branches_cannot_do_is_refused(branch_file, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        switch(branch_file, **({"in_place": True} if "out" not in options else {}), **options)
    assert caught.value.remedy


@pytest.mark.parametrize("bits", [None, "4"])
def test_an_export_alone_is_refused_and_changes_nothing(branch_file, bits):
    before = branch_file.read_bytes()
    with pytest.raises(UsageError, match="not exported to ONNX"):
        switch(branch_file, bits=bits, onnx=Path("b.onnx"))
    assert branch_file.read_bytes() == before


def test_widths_are_evaluated_side_by_side(branch_file, colours):
    result = evaluate(branch_file, colours, bits=("2", "w5a5", "8"))
    items = result.items
    assert [item["model"] for item in items] == ["w2a2", "w5a5", "w8a8"]
    rows = {row["bits"]: row for row in costs(checkpoint.read_planes(branch_file))}
    for item in items:
        assert item["bytes"] == rows[item["model"]]["needed_bytes"]
        assert item["bit_operations"] == rows[item["model"]]["bit_operations"]
    assert 0 <= items[0]["top1"] <= 100
    with pytest.raises(UsageError, match="cannot run at w4a6"):
        evaluate(branch_file, colours, bits=("w4a6",))


def test_a_gate_holds_for_every_width(branch_file, colours):
    result = evaluate(branch_file, colours, bits=("2", "4"), minimum=("top1=101",))
    assert result.exit_code == 5
    assert "at w2a2" in result.summary["error"]
    assert "at w4a4" in result.summary["error"]


def test_the_float_model_is_measured_beside_it(branch_file, colours, small_resnet):
    values = {"target": str(branch_file), "data": colours, "device": "cpu"}
    result = evaluate_api.evaluate(EvaluateSettings.build(values | {"weights": small_resnet}))
    assert [item["model"].split()[0] for item in result.items] == ["float32", "w8a8"]


def test_info_describes_it(branch_file):
    result = models.info(InfoSettings.build({"target": branch_file}))
    assert result.summary["engine"] == "branches"
    assert result.summary["layers_by_weight_bits"] == {"2": 6}


def test_the_latency_names_the_backend_of_every_convolution(branch_file, colours):
    result = evaluate(branch_file, colours, latency=True)
    words = {row["backend"] for row in result.summary["latency"]}
    # Six convolutions in each of four branches.
    assert any(word.endswith(" x24") for word in words)
