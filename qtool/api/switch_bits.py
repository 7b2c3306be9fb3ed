"""`qtool switch-bits`: at which of its widths a switchable checkpoint runs."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.api import branch_widths, export, hub_folder
from qtool.api.file_widths import (
    bit_operations,
    chosen,
    layers_in,
    needed_bytes,
    planes_needed,
    with_bits,
)
from qtool.errors import CheckpointError, Progress, UsageError
from qtool.io import checkpoint, nested_tensors
from qtool.models import sources
from qtool.quant.allocation import Option, allot
from qtool.quant.bits import BitSpec, parse_width
from qtool.quant.widths import DEDICATED_BITS, Choice, SwitchableLayer
from qtool.report import Result, Table
from qtool.settings.switch_bits import Budget, SwitchBitsSettings, parse_budget


def switch_bits(settings: SwitchBitsSettings, progress: Progress | None = None) -> Result:
    """List or change the widths of a switchable checkpoint, or export one; no weight is touched.

    Args:
        settings: What to do.
        progress: Not needed; what takes a while is the export alone.

    Returns:
        One item per layer with its width; size and bit operations in the summary.

    Raises:
        UsageError: The file lacks a width, or no choice of bits fits the budget.
        QtoolError: The file is damaged, or the copy cannot be written.
    """
    exports = export.check_output(
        settings.onnx, overwrite=settings.overwrite, skip_existing=settings.skip_existing
    )
    settings = _located(settings)
    writes = settings.in_place or hub_folder.check_copy(settings)
    if not (writes or exports or settings.listing):
        return _skipped(settings)
    if settings.exports_alone:
        return _exported(settings)
    table = checkpoint.read_planes(settings.target)
    if table.header.engine == "branches":
        return branch_widths.switch(settings, table)
    if table.header.nested is None:
        raise UsageError(
            f"{settings.target} has one width per layer, {table.header.active_bits}",
            remedy="make a switchable file with `qtool quantize MODEL --bits any`",
        )
    layers = layers_in(table)
    if settings.listing:
        return _listed(settings, table, layers)
    specs = _wanted(settings, table, layers)
    header = with_bits(table, specs)
    if writes and not settings.dry_run:
        _write(settings, table, header, specs)
    summary = _summary(settings, table, header, specs)
    if exports and settings.onnx is not None:
        summary["onnx"] = _export(settings, settings.onnx, header)
    return Result(
        "switch-bits",
        status="planned" if settings.dry_run else "ok",
        items=_items(header, specs, layers),
        summary=summary,
        tables=(_facts(summary),),
    )


def _skipped(settings: SwitchBitsSettings) -> Result:
    """All that was asked for is there and may stay."""
    summary = {
        "path": str(settings.target),
        "output": str(settings.output or settings.onnx),
        "status": "skipped",
    }
    return Result("switch-bits", status="planned" if settings.dry_run else "ok", summary=summary)


def _located(settings: SwitchBitsSettings) -> SwitchBitsSettings:
    """The request with the file that its folder or hub repository holds.

    Raises:
        UsageError: A file of the hub's cache, which others read too, would be changed.
        MissingError: The repository is not cached and cannot be fetched.
    """
    if settings.in_place and str(settings.target).startswith(sources.HUB_PREFIXES):
        raise UsageError(
            f"{settings.target} is not a file of yours to change", remedy="give -o for a copy"
        )
    offline = settings.offline or settings.dry_run
    path = sources.checkpoint_file(settings.target, offline=offline)
    return settings.model_copy(update={"target": path})


def _exported(settings: SwitchBitsSettings) -> Result:
    """Any checkpoint as ONNX, at the bits it runs at."""
    header = checkpoint.read_header(settings.target)
    export.check_engine(header)
    summary: dict[str, Any] = {"path": str(settings.target), "active_bits": header.active_bits}
    if settings.onnx is not None:
        summary["onnx"] = _export(settings, settings.onnx, header)
    return Result(
        "switch-bits",
        status="planned" if settings.dry_run else "ok",
        summary=summary,
        tables=(Table("Exported", ("what", "value"), export.facts(summary)),),
    )


def _export(settings: SwitchBitsSettings, path: Path, header: checkpoint.Header) -> dict[str, Any]:
    if settings.dry_run:
        return {"path": str(path), "bits": header.active_bits}
    return export.export_file(
        settings, settings.target, path, header=header, overwrite=settings.overwrite
    )


def _wanted(
    settings: SwitchBitsSettings,
    table: checkpoint.PlaneTable,
    layers: Mapping[str, SwitchableLayer],
) -> dict[str, BitSpec]:
    if settings.budget is not None:
        return _budgeted(table, layers, parse_budget(settings.budget))
    for glob, _ in settings.rules:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise UsageError(
                f"no layer matches {glob!r}",
                remedy=f"layers are named like {', '.join(list(layers)[:4])}",
            )
    choice = Choice(settings.rules)
    if settings.bits is not None:
        choice = choice.after(Choice.of(settings.bits))
    try:
        return chosen(layers, choice)
    except UsageError as error:
        raise UsageError(f"{settings.target}: {error.message}", remedy=error.remedy) from error


def _budgeted(
    table: checkpoint.PlaneTable, layers: Mapping[str, SwitchableLayer], budget: Budget
) -> dict[str, BitSpec]:
    """The widths with the least cost by the file's sensitivities that fit a budget.

    Raises:
        UsageError: The file has no sensitivities, or nothing fits.
    """
    header, widths = table.header, table.header.nested
    if widths is None or not widths.sensitivity:
        raise UsageError(
            "the file holds no sensitivities to choose by",
            remedy="quantize again with --effort standard, or choose bits with --layers",
        )
    full = {name: layer.active for name, layer in layers.items()}
    for name in widths.sensitivity:
        full[name] = BitSpec(max(widths.weight_bits), full[name].activation)
    is_size = budget.measure == "bytes"
    total = bit_operations(header, full)
    limit = budget.amount if is_size else budget.amount * total

    def takes(name: str, bits: int) -> float:
        if is_size:
            return table.plane_bytes[name] * planes_needed(header, bits)
        macs = header.layers[name].options.get("macs")
        return (macs if isinstance(macs, int) else 0) * bits * full[name].activation

    options = {
        name: [
            Option(bits, takes(name, bits), cost)
            for bits, cost in zip(widths.weight_bits, costs, strict=True)
            if bits in layers[name].offer.present
        ]
        for name, costs in widths.sensitivity.items()
    }
    whole = needed_bytes(table, full) if is_size else total
    fixed = whole - sum(takes(name, full[name].weight) for name in options)
    found = allot(options, limit - fixed)
    if found is None:
        least = fixed + sum(own[0].takes for own in options.values())
        words = f"{least / 1e6:.2f} MB" if is_size else f"{100 * least / total:.1f} %"
        raise UsageError(
            f"nothing fits the budget; the narrowest widths take {words}",
            remedy="raise --budget",
        )
    return full | {name: BitSpec(bits, full[name].activation) for name, bits in found.items()}


def _write(
    settings: SwitchBitsSettings,
    table: checkpoint.PlaneTable,
    header: checkpoint.Header,
    specs: Mapping[str, BitSpec],
) -> None:
    if settings.drop_unused:
        smaller, tensors = _fewer(settings.target, header, specs)
        hub_folder.copy(settings, smaller, checkpoint.content(smaller, tensors))
    else:
        hub_folder.switch(settings, header)


def _fewer(
    source: Path, header: checkpoint.Header, specs: Mapping[str, BitSpec]
) -> tuple[checkpoint.Header, dict[str, Tensor]]:
    """A checkpoint without the planes, and the rows of scales, that no layer needs."""
    widths = header.nested
    if widths is None:
        raise CheckpointError(f"{source} has no planes")
    _, tensors = checkpoint.read(source)

    def reached(planes: int) -> int:
        return nested_tensors.bits_of(planes) or DEDICATED_BITS

    layers = {}
    top = 0
    for name, layer in header.layers.items():
        layers[name] = layer
        if layer.weight_bits:
            planes = planes_needed(header, specs[name].weight)
            top = max(top, reached(planes))
            layers[name] = layer.model_copy(update={"options": layer.options | {"planes": planes}})
            for number in range(planes + 1, nested_tensors.MAX_PLANES + 1):
                tensors.pop(f"{name}.p{number}", None)
    kept = [bits for bits in widths.weight_bits if bits <= top]
    rows = len(kept)
    for name, layer in layers.items():
        if layer.weight_bits:
            for leaf in ("alpha", "delta"):
                tensors[f"{name}.{leaf}"] = tensors[f"{name}.{leaf}"][:rows].clone()
    least = min(
        reached(planes_needed(header, specs[name].weight))
        for name, layer in layers.items()
        if layer.weight_bits and not layer.options.get("pinned")
    )
    names = [name for name in header.bits if parse_width(name).weight <= least]
    fewer = widths.model_copy(
        update={
            "weight_bits": kept,
            "sensitivity": {name: costs[:rows] for name, costs in widths.sensitivity.items()},
        }
    )
    smaller = header.model_copy(update={"layers": layers, "bits": names, "nested": fewer})
    return smaller, tensors


def _items(
    header: checkpoint.Header,
    specs: Mapping[str, BitSpec],
    layers: Mapping[str, SwitchableLayer],
) -> list[dict[str, Any]]:
    return [
        {
            "layer": name,
            "kind": layer.kind,
            "bits": str(specs[name]) if layer.weight_bits else f"a{specs[name].activation}",
            "pinned": layers[name].pinned,
            "weight_bits_there": list(layers[name].offer.present),
        }
        for name, layer in header.layers.items()
    ]


def _summary(
    settings: SwitchBitsSettings,
    table: checkpoint.PlaneTable,
    header: checkpoint.Header,
    specs: Mapping[str, BitSpec],
) -> dict[str, Any]:
    written = settings.output or settings.target
    weights = [specs[name].weight for name, layer in header.layers.items() if layer.weight_bits]
    return {
        "path": str(settings.target),
        "output": str(written),
        "active_bits": header.active_bits,
        "layers_by_weight_bits": {str(b): weights.count(b) for b in sorted(set(weights))},
        "bytes": written.stat().st_size if written.is_file() else None,
        "needed_bytes": needed_bytes(table, specs),
        "bit_operations": bit_operations(header, specs),
    }


def _facts(summary: Mapping[str, Any]) -> Table:
    counts = summary["layers_by_weight_bits"]
    facts = [
        ("file", summary["output"]),
        ("runs at", summary["active_bits"]),
        ("layers", ", ".join(f"{count} at {bits} bits" for bits, count in counts.items())),
        ("MB needed at these bits", round(summary["needed_bytes"] / 1e6, 2)),
        ("G bit operations a picture", round(summary["bit_operations"] / 1e9, 2)),
        *export.facts(summary),
    ]
    return Table("Switched", ("what", "value"), facts)


def _listed(
    settings: SwitchBitsSettings,
    table: checkpoint.PlaneTable,
    layers: Mapping[str, SwitchableLayer],
) -> Result:
    """What a file can run at and what it runs at."""
    header = table.header
    now = {name: layer.active for name, layer in layers.items()}
    rows: list[dict[str, Any]] = []
    for name in header.bits:
        try:
            specs = chosen(layers, Choice.of(name))
        except UsageError:
            continue
        rows.append(
            {
                "bits": name,
                "active": name == header.active_bits,
                "needed_bytes": needed_bytes(table, specs),
                "bit_operations": bit_operations(header, specs),
            }
        )
    summary = {
        "path": str(settings.target),
        "bytes": settings.target.stat().st_size,
        "active_bits": header.active_bits,
        "widths": [row["bits"] for row in rows],
    }
    widths = Table(
        f"Widths of {settings.target} (runs at {header.active_bits})",
        ("bits", "active", "MB needed", "G bit operations"),
        [
            (
                row["bits"],
                "yes" if row["active"] else "",
                f"{row['needed_bytes'] / 1e6:.2f}",
                f"{row['bit_operations'] / 1e9:.2f}",
            )
            for row in rows
        ],
    )
    items = _items(header, now, layers)
    columns = ("layer", "kind", "bits", "pinned", "weight bits there")
    own = Table("Layers", columns, [tuple(item.values()) for item in items])
    return Result(
        "switch-bits", items=items, summary={**summary, "rows": rows}, tables=(widths, own)
    )
