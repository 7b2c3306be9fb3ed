"""What the widths of a switchable checkpoint take, beside what they achieve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool.api import branch_widths
from qtool.api.file_widths import bit_operations, chosen, layers_in, needed_bytes
from qtool.io import checkpoint
from qtool.quant.widths import Choice
from qtool.report import Chart


def add_costs(items: Sequence[dict[str, Any]], path: Path) -> None:
    """Add to the results of each width the bytes it needs of the file and its bit operations.

    Args:
        items: One record per width, whose `model` is the width; changed in place.
        path: The checkpoint.
    """
    table = checkpoint.read_planes(path)
    if table.header.engine == "branches":
        rows = {row["bits"]: row for row in branch_widths.costs(table)}
        for item in items:
            row = rows[item["model"]]
            item["bytes"], item["bit_operations"] = row["needed_bytes"], row["bit_operations"]
        return
    layers = layers_in(table)
    for item in items:
        specs = chosen(layers, Choice.of(item["model"]))
        item["bytes"] = needed_bytes(table, specs)
        item["bit_operations"] = bit_operations(table.header, specs)


def charts(items: Sequence[Mapping[str, Any]]) -> tuple[Chart, ...]:
    """Accuracy over the widths, beside the float model if there is one."""
    widths = [item for item in items if "bit_operations" in item]
    lines: dict[str, list[float | None]] = {"top-1": [item["top1"] for item in widths]}
    others = [item for item in items if "bit_operations" not in item]
    if others:
        lines["float"] = [others[0]["top1"]] * len(widths)
    steps = [str(item["model"]) for item in widths]
    return (Chart("Accuracy at every width", steps, lines, "top-1 %"),)
