"""What a switchable file is told to cost: layer by layer, block by block, width by width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qtool.api import calibration, export, layer_report
from qtool.methods.multiquant.nested import USUAL_ACTIVATION, NestedRecord
from qtool.quant import widths
from qtool.quant.bits import BitSpec
from qtool.quant.plan import LayerPlan
from qtool.quant.widths import Offer
from qtool.report import Table


def items(
    model: nn.Module,
    reference: nn.Module,
    plans: Mapping[str, LayerPlan],
    sample: Tensor,
    offer: Offer,
    macs: Mapping[str, int],
) -> list[dict[str, Any]]:
    """One record per layer: backend, multiplications, output errors at the ends of the range."""
    high, low = (
        BitSpec(offer.weight[-1], USUAL_ACTIVATION),
        BitSpec(offer.weight[0], USUAL_ACTIVATION),
    )
    measured = {}
    for spec in dict.fromkeys((high, low)):
        with widths.bits(str(spec)):
            measured[str(spec)] = layer_report.measure(
                model, reference, plans, sample, losses=dict.fromkeys(plans, 0.0)
            )
    first = measured[str(high)]
    return [
        {
            "layer": record["layer"],
            "kind": record["kind"],
            "backend": record["backend"],
            "macs": macs[record["layer"]],
            "output_error": {spec: rows[index]["output_error"] for spec, rows in measured.items()},
        }
        for index, record in enumerate(first)
    ]


def tables(
    summary: Mapping[str, Any],
    layers: list[dict[str, Any]],
    records: list[NestedRecord],
    offer: Offer,
) -> tuple[Table, ...]:
    """The file, its layers as `items` tells them, and the errors of its blocks."""
    agreement = summary["calibration_agreement"]
    facts: list[tuple[str, Any]] = [
        ("file", summary["output"]),
        ("size, all widths", layer_report.shown_size(summary)),
        ("weight bits", ", ".join(map(str, offer.weight))),
        ("calibration", calibration.told(summary)),
        *((f"agreement with float, {spec}", f"{share:.1%}") for spec, share in agreement.items()),
        ("time", f"{summary['seconds']['total']:.0f} s"),
    ]
    if "verify" in summary:
        worst = summary["verify"]["max_abs_difference"]
        facts.append(("reloaded file differs by at most", f"{worst:.2g}"))
    facts += export.facts(summary)
    specs = list(records[0].before) if records else []
    errors = list(layers[0]["output_error"]) if layers else []
    return (
        Table("Quantized", ("what", "value"), facts),
        Table(
            "Layers",
            ("layer", "backend", *(f"output error {spec}" for spec in errors)),
            [
                (
                    item["layer"],
                    item["backend"],
                    *(layer_report.shown(item["output_error"][spec]) for spec in errors),
                )
                for item in layers
            ],
        ),
        Table(
            "Blocks (squared error relative to the block's output, before and after training)",
            ("block", *specs),
            [
                (
                    record.name,
                    *(
                        f"{layer_report.shown(record.before[spec])} > "
                        f"{layer_report.shown(record.after[spec])}"
                        for spec in specs
                    ),
                )
                for record in records
            ],
        ),
    )
