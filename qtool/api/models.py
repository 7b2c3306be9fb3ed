"""`qtool models` and `qtool info`: what can be used, and what a file holds."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

from qtool.errors import Progress, UsageError
from qtool.io import checkpoint
from qtool.models import registry, sources
from qtool.report import Result, Table
from qtool.settings.models import InfoSettings, ModelsSettings


def list_models(settings: ModelsSettings, progress: Progress | None = None) -> Result:
    """List the models with a short name that match a glob.

    Raises:
        UsageError: None matches.
    """
    pattern = settings.pattern.lower()
    found = [
        spec
        for spec in registry.MODELS
        if fnmatchcase(spec.alias, pattern) or fnmatchcase(spec.architecture.lower(), pattern)
    ]
    if not found:
        near = registry.suggestions(settings.pattern)
        also = f"did you mean {', '.join(near)}? " if near else ""
        raise UsageError(
            f"no model matches {settings.pattern!r}",
            remedy=f"{also}`qtool models` lists all; any other timm classifier works by its name",
        )
    items = [
        {
            "alias": spec.alias,
            "architecture": spec.architecture,
            "family": spec.family,
            "parameters": round(spec.parameters * 1e6),
            "size": spec.size,
            "licence": spec.licence,
            "paper": spec.paper,
            "bundled": bool(spec.bundled),
        }
        for spec in found
    ]
    rows = [
        (
            spec.alias,
            spec.architecture,
            f"{spec.parameters:.1f} M",
            "bundled" if spec.bundled else spec.size,
            spec.licence,
        )
        for spec in found
    ]
    table = Table("Models", ("name", "architecture", "parameters", "weights", "licence"), rows)
    return Result("models", items=items, summary={"count": len(items)}, tables=(table,))


def info(settings: InfoSettings, progress: Progress | None = None) -> Result:
    """Describe a checkpoint from its header alone.

    Raises:
        CheckpointError: The file is absent, damaged, foreign or of a newer format.
        MissingError: The repository is not cached and cannot be fetched.
    """
    path = sources.checkpoint_file(settings.target, offline=settings.offline)
    header = checkpoint.read_header(path)
    items = [
        {
            "layer": name,
            "kind": layer.kind,
            "weight_bits": layer.weight_bits,
            "input_bits": layer.input_bits,
            **layer.options,
        }
        for name, layer in header.layers.items()
    ]
    widths = Counter(layer.weight_bits for layer in header.layers.values() if layer.weight_bits)
    summary: dict[str, Any] = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "architecture": header.architecture,
        "task": header.task,
        "engine": header.engine,
        "bits": header.bits,
        "active_bits": header.active_bits,
        "layers_by_weight_bits": {str(bits): widths[bits] for bits in sorted(widths)},
        "data": header.data,
        "provenance": header.provenance,
    }
    facts = [
        ("file", f"{path} ({summary['bytes'] / 1e6:.2f} MB)"),
        ("architecture", f"{header.architecture} ({header.task})"),
        ("bits", f"{header.active_bits} (engine {header.engine})"),
        ("layers", ", ".join(f"{n} at {b} bits" for b, n in sorted(widths.items()))),
        *((key, value) for key, value in header.provenance.items() if not isinstance(value, dict)),
    ]
    layers = [
        (
            item["layer"],
            item["kind"],
            item["weight_bits"] or "",
            item["input_bits"] or "float",
            item.get("probabilities") or "",
        )
        for item in items
    ]
    columns = ("layer", "kind", "weight bits", "activation bits", "after softmax")
    return Result(
        "info",
        items=items,
        summary=summary,
        tables=(Table("Checkpoint", ("what", "value"), facts), Table("Layers", columns, layers)),
    )
