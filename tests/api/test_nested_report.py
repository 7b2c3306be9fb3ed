"""Tables of a switchable file."""

from qtool.api import nested_report
from qtool.methods.multiquant.nested import NestedRecord
from qtool.quant.widths import Offer

SUMMARY = {
    "output": "any.safetensors",
    "bytes": 2_000_000,
    "float_bytes": 8_000_000,
    "count": 32,
    "patches": 3,
    "calibration": "real images",
    "calibration_agreement": {"w8a8": 1.0, "w4a8": 0.875},
    "seconds": {"total": 61.4},
    "verify": {"max_abs_difference": 0.0},
}
LAYER = {"layer": "fc", "backend": "cpu", "output_error": {"w8a8": 1e-4, "w4a8": 0.02}}


def test_tables_tell_file_layers_and_blocks():
    record = NestedRecord("blocks.0", {"w8a8": 2e-4, "w4a8": 0.03}, {"w8a8": 1e-4, "w4a8": 0.01})
    file, layers, blocks = nested_report.tables(SUMMARY, [LAYER], [record], Offer((4, 8), (8,)))
    facts = dict(file.rows)
    assert facts["weight bits"] == "4, 8"
    assert facts["calibration"] == "32 images and 3 of their patches, real images"
    assert facts["agreement with float, w4a8"] == "87.5%"
    assert layers.columns == ("layer", "backend", "output error w8a8", "output error w4a8")
    assert [len(row) for row in layers.rows] == [4]
    assert blocks.columns == ("block", "w8a8", "w4a8")
    assert all(" > " in cell for cell in blocks.rows[0][1:])


def test_a_model_without_layers_has_empty_tables():
    _, layers, blocks = nested_report.tables(SUMMARY, [], [], Offer((4, 8), (8,)))
    assert not layers.rows
    assert not blocks.rows
