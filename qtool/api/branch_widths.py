"""The widths of a file of branches: what each takes, and `switch-bits` between them."""

from __future__ import annotations

from typing import Any

from qtool.api import export, hub_folder
from qtool.api.branch_model import at_width
from qtool.errors import UsageError
from qtool.io import branch_tensors, checkpoint
from qtool.io.branch_tensors import BranchTable, size_of
from qtool.methods.multiquant.branches import BODY
from qtool.quant.bits import BitSpec, parse_width
from qtool.quant.widths import Offer
from qtool.report import Result, Table
from qtool.settings.switch_bits import SwitchBitsSettings, parse_budget


def costs(table: checkpoint.PlaneTable) -> list[dict[str, Any]]:
    """What every width that is there takes: bytes of the file, and bit operations of a picture."""
    header, branches = table.header, _branches(table.header)
    there = min((table.planes.get(name, 0) for name in header.layers), default=0)
    rows = []
    for width in branches.widths:
        if width.bits not in branches.there(there):
            continue
        codes = operations = 0
        for layer in header.layers.values():
            options = layer.options
            for branch in width.branches:
                bits = branches.weight_bits[branch - 1]
                row = branch_tensors.row_bytes(size_of(options, "columns"), bits)
                codes += size_of(options, "rows") * row
                macs = "narrow_macs" if branch == width.narrow else "macs"
                operations += size_of(options, macs) * bits * width.bits
        name = f"w{width.bits}a{width.bits}"
        rows.append(
            {
                "bits": name,
                "active": name == header.active_bits,
                "branches": _shown(width),
                "needed_bytes": table.other_bytes + codes,
                "bit_operations": operations,
            }
        )
    return rows


def switch(settings: SwitchBitsSettings, table: checkpoint.PlaneTable) -> Result:
    """List or change the width of a file of branches; only its header changes.

    Raises:
        UsageError: The file lacks the width, or what was asked for makes no sense with branches.
        QtoolError: The copy cannot be written.
    """
    rows = costs(table)
    if settings.listing:
        return _listed(settings, table, rows)
    if settings.onnx is not None:
        export.check_engine(table.header)
    if settings.layers or settings.drop_unused:
        raise UsageError(
            f"{settings.target} is a network of branches, which has one width as a whole",
            remedy="give --bits or --budget, without --layers and --drop-unused",
        )
    hub_folder.check_copy(settings)
    row = _wanted(settings, rows)
    header = at_width(table.header, parse_width(row["bits"]).weight)
    if not settings.dry_run:
        hub_folder.switch(settings, header)
    written = settings.output or settings.target
    summary = {
        "path": str(settings.target),
        "output": str(written),
        "active_bits": header.active_bits,
        "branches": row["branches"],
        "bytes": written.stat().st_size if written.is_file() else None,
        "needed_bytes": row["needed_bytes"],
        "bit_operations": row["bit_operations"],
    }
    facts = [
        ("file", summary["output"]),
        ("runs at", summary["active_bits"]),
        ("branches", summary["branches"]),
        ("MB needed at these bits", round(row["needed_bytes"] / 1e6, 2)),
        ("G bit operations a picture", round(row["bit_operations"] / 1e9, 2)),
    ]
    return Result(
        "switch-bits",
        status="planned" if settings.dry_run else "ok",
        items=[row],
        summary=summary,
        tables=(Table("Switched", ("what", "value"), facts),),
    )


def _wanted(settings: SwitchBitsSettings, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The width that was asked for, or the widest that fits a budget."""
    if settings.budget is None:
        widths = tuple(parse_width(row["bits"]).weight for row in rows)
        offer = Offer(widths, widths, tied=True)
        try:
            spec = offer.fit(BODY, BitSpec.parse(settings.bits or ""))
        except UsageError as error:
            raise UsageError(f"{settings.target}: {error.message}", remedy=error.remedy) from error
        return next(row for row in rows if row["bits"] == str(spec))
    budget = parse_budget(settings.budget)
    key = "needed_bytes" if budget.measure == "bytes" else "bit_operations"
    limit = budget.amount * (1 if budget.measure == "bytes" else rows[-1][key])
    fitting = [row for row in rows if row[key] <= limit]
    if not fitting:
        least = rows[0][key]
        words = (
            f"{least / 1e6:.2f} MB"
            if budget.measure == "bytes"
            else f"{100 * least / rows[-1][key]:.1f} %"
        )
        raise UsageError(
            f"nothing fits the budget; the narrowest width takes {words}",
            remedy="raise --budget",
        )
    return fitting[-1]


def _listed(
    settings: SwitchBitsSettings, table: checkpoint.PlaneTable, rows: list[dict[str, Any]]
) -> Result:
    summary = {
        "path": str(settings.target),
        "bytes": settings.target.stat().st_size,
        "active_bits": table.header.active_bits,
        "widths": [row["bits"] for row in rows],
    }
    shown = Table(
        f"Widths of {settings.target} (runs at {table.header.active_bits})",
        ("bits", "active", "branches", "MB needed", "G bit operations"),
        [
            (
                row["bits"],
                "yes" if row["active"] else "",
                row["branches"],
                f"{row['needed_bytes'] / 1e6:.2f}",
                f"{row['bit_operations'] / 1e9:.2f}",
            )
            for row in rows
        ],
    )
    return Result("switch-bits", items=rows, summary=summary | {"rows": rows}, tables=(shown,))


def _branches(header: checkpoint.Header) -> BranchTable:
    if header.branches is None:
        raise UsageError("the file has no branches")
    return header.branches


def _shown(width: branch_tensors.BranchWidth) -> str:
    """Branches as people write them: `2 3 h4`, where h is the narrow one."""
    return " ".join(f"h{n}" if n == width.narrow else str(n) for n in width.branches)
