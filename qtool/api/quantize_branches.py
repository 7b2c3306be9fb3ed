"""`qtool quantize --bits any --engine branches`: one checkpoint of trained 2-bit branches."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import __version__
from qtool.api import branch_data, branch_model, branch_widths, hub_folder, layer_report
from qtool.api.branch_run import BranchRun, float_accuracy
from qtool.api.estimate import Estimate
from qtool.api.load import restore
from qtool.api.quantized_header import float_provenance
from qtool.api.runtime import notice, planned_device, write_report
from qtool.errors import ImageError, Progress, QtoolError
from qtool.io import checkpoint
from qtool.methods.multiquant.branches import BranchedClassifier, branched, freeze
from qtool.methods.multiquant.selection import NarrowWidths, select
from qtool.methods.processes import rank
from qtool.models import vision
from qtool.models.residual import ResidualLayout, residual_layout
from qtool.report import Chart, Result, Table
from qtool.settings.quantize import QuantizeSettings

METHOD = "branches of 2-bit weights, trained"
PAPER = "MBQuant, arXiv 2305.08117"

_SAMPLE = 32
_TOLERANCE = 1e-4


def plan(settings: QuantizeSettings, architecture: str) -> dict[str, Any]:
    """What `quantize` would do, for the summary of a dry run; loads no weights.

    Raises:
        UsageError: The network has no residual body, or the folder no labelled pictures.
    """
    widths = settings.switchable or ()
    summary: dict[str, Any] = {
        "model": settings.model,
        "architecture": architecture,
        "bits": settings.bits,
        "engine": settings.engine,
        "widths": list(widths),
        "branches": {
            f"w{bits}a{bits}": [branch + 1 for branch in chosen.branches]
            for bits, chosen in select(widths, amortized="prefix" not in settings.ablate).items()
        },
        "ablate": list(settings.ablate),
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "device": planned_device(settings),
        "output": str(settings.output),
        "skipped": False,
    }
    outline = vision.outline(settings.model, weights=settings.weights)
    if outline is not None and settings.train is not None:
        network, _ = outline
        residual_layout(network)
        split = branch_data.find(settings.train, classes=_classes(network), wnids=_wnids(network))
        summary["pictures"] = {"train": len(split.train), "held_out": len(split.held_out)}
        estimate = Estimate(settings.model, weights=settings.weights, device=settings.device)
        passes = sum(bits / 2 for bits in widths)
        if "one-set" in settings.ablate:
            passes = len(widths)
        seconds = estimate.training(pictures=settings.epochs * len(split.train), passes=passes)
        summary["estimated_seconds"] = math.ceil(seconds)
    return summary


def quantize(
    settings: QuantizeSettings, opened: vision.OpenedModel, *, progress: Progress | None
) -> Result:
    """Train an opened classifier into a network of branches and write it.

    Args:
        settings: What to do; their `switchable` names the widths.
        opened: The float model.
        progress: Told about every step.

    Returns:
        One item per width; training, size and check of the file in the summary.

    Raises:
        QtoolError: One of its kinds, for wrong settings, unusable pictures or refused output.
    """
    started = time.monotonic()
    widths = settings.switchable or ()
    layout = residual_layout(opened.model, input_size=opened.data.input_size)
    train, held_out = _pictures(settings, opened, progress)
    network, narrow = branched(
        opened.model,
        layout,
        widths=widths,
        amortized="prefix" not in settings.ablate,
        one_set="one-set" in settings.ablate,
        seed=settings.seed,
    )
    identity = [opened.weights_sha256, opened.architecture, list(widths), list(settings.ablate)]
    run = BranchRun(settings, network, train, held_out, identity=identity)
    run.train(progress)
    if rank() != 0:
        return Result("quantize", summary={"rank": rank(), "status": "trained"})
    branch_model.round_shared(network)
    frozen = freeze(network.eval())
    sample = _sample(held_out, next(network.parameters()).device)
    expected = {bits: frozen.at(sample, bits) for bits in widths}
    summary: dict[str, Any] = {
        "model": opened.name,
        "architecture": opened.architecture,
        "bits": settings.bits,
        "engine": "branches",
        "widths": list(widths),
        "ablate": list(settings.ablate),
        "output": str(settings.output),
        "float_bytes": sum(p.numel() * 4 for p in opened.model.parameters()),
        "narrow_share": round(narrow.share, 4),
        "pictures": {"train": len(train), "held_out": len(held_out)},
        "unreadable": len(train.failed) + len(held_out.failed),
        "training": run.config.to_dict(),
        "epochs": run.epochs,
        "float_top1": float_accuracy(opened.model, held_out, batch_size=settings.batch_size),
    }
    hub_folder.save(
        settings,
        _header(settings, opened, frozen, layout, narrow, run),
        branch_model.stored(frozen, layout),
        summary,
        verify=lambda path: _verify(path, settings.output, sample, expected),
    )
    run.forget()
    summary["seconds"] = {
        "training": round(run.seconds, 1),
        "total": round(time.monotonic() - started, 1),
    }
    items = _items(settings.output, run)
    result = Result(
        "quantize",
        items=items,
        summary=summary,
        tables=_tables(summary, items),
        charts=_charts(run),
    )
    write_report(settings.report, result)
    return result


def _pictures(
    settings: QuantizeSettings, opened: vision.OpenedModel, progress: Progress | None
) -> tuple[branch_data.Pictures, branch_data.Pictures]:
    """Pictures to train and to measure on."""
    if settings.train is None:
        raise ValueError("the settings name no pictures to train on")
    split = branch_data.find(
        settings.train, classes=_classes(opened.model), wnids=_wnids(opened.model)
    )
    device = next(opened.model.parameters()).device
    train = branch_data.Pictures(split.train, opened.data, progress, device=device)
    held_out = branch_data.Pictures(split.held_out, opened.data, device=device)
    for path, reason in (*train.failed, *held_out.failed):
        notice.warning("%s is left out: %s", path, reason)
    return train, held_out


def _classes(model: torch.nn.Module) -> int:
    return int(getattr(model, "num_classes", 0))


def _wnids(model: torch.nn.Module) -> list[str]:
    return vision.imagenet_wnids() if _classes(model) == 1000 else []


def _sample(pictures: branch_data.Pictures, device: torch.device) -> Tensor:
    for images, _ in branch_data.measuring_batches(pictures, batch_size=_SAMPLE):
        return images.to(device)
    raise ImageError("no held-out picture could be read", remedy="check the files of the folder")


@torch.no_grad()
def _verify(
    path: Path, output: Path, sample: Tensor, expected: dict[int, Tensor]
) -> dict[str, float]:
    """Read a file back and compare it with the trained network, at every width.

    Raises:
        QtoolError: The file computes something else.
    """
    header, tensors = checkpoint.read(path)
    model = restore(header, tensors, origin=str(output)).to(sample.device)
    if not isinstance(model, BranchedClassifier):
        raise TypeError(f"{type(model).__name__} is no network of branches")
    worst = 0.0
    for bits, logits in expected.items():
        difference = float((model.at(sample, bits) - logits).abs().max())
        # Not `>`, so that a difference of NaN fails as well.
        if not difference <= _TOLERANCE * float(logits.abs().max()):
            raise QtoolError(
                f"{output} was not written: read back, it computes other outputs at {bits} bits "
                f"than training did (largest difference {difference:.3g})",
                remedy="please report this with the command you ran",
            )
        worst = max(worst, difference)
    return {"max_abs_difference": worst}


def _header(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    frozen: BranchedClassifier,
    layout: ResidualLayout,
    narrow: NarrowWidths,
    run: BranchRun,
) -> checkpoint.Header:
    table = branch_model.table_of(frozen, layout)
    active = table.bits[-1]
    return checkpoint.Header(
        architecture=opened.architecture,
        model_args=opened.model_args,
        data=opened.data.to_dict(),
        engine="branches",
        bits=[f"w{bits}a{bits}" for bits in reversed(table.bits)],
        active_bits=f"w{active}a{active}",
        layers=branch_model.layers_of(layout, narrow, table, active),
        quantization_config={
            "quant_method": "qtool",
            "format": "branches",
            "quantization_status": "compressed",
            "ignore": [*layout.stem, *layout.head],
        },
        provenance={
            "qtool": __version__,
            "method": METHOD,
            "paper": PAPER,
            "ablate": list(settings.ablate),
            "epochs": settings.epochs,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "pictures": len(run.train_pictures),
            "seed": settings.seed,
            "held_out_top1": run.epochs[-1]["top1"],
            **float_provenance(opened),
        },
        branches=table,
    )


def _items(path: Path, run: BranchRun) -> list[dict[str, Any]]:
    """One record per width: branches, held-out top-1 after the last epoch, and what it takes."""
    top1 = run.epochs[-1]["top1"]
    return [
        {key: value for key, value in row.items() if key != "active"} | {"top1": top1[row["bits"]]}
        for row in branch_widths.costs(checkpoint.read_planes(path))
    ]


def _tables(summary: dict[str, Any], items: list[dict[str, Any]]) -> tuple[Table, ...]:
    pictures = summary["pictures"]
    facts: list[tuple[str, Any]] = [
        ("file", summary["output"]),
        ("size, all widths", layer_report.shown_size(summary)),
        ("trained on", f"{pictures['train']} pictures, {len(summary['epochs'])} epochs"),
        ("measured on", f"{pictures['held_out']} held-out pictures"),
        ("float top-1 there", f"{summary['float_top1']:.1f} %"),
        ("left out", ", ".join(summary["ablate"]) or "nothing"),
        ("time", f"{summary['seconds']['training']:.0f} s of training"),
    ]
    if "verify" in summary:
        worst = summary["verify"]["max_abs_difference"]
        facts.append(("reloaded file differs by at most", f"{worst:.2g}"))
    rows = [
        (
            item["bits"],
            item["branches"],
            f"{item['top1']:.1f}",
            f"{item['needed_bytes'] / 1e6:.2f}",
            f"{item['bit_operations'] / 1e9:.2f}",
        )
        for item in items
    ]
    columns = ("bits", "branches", "held-out top-1 %", "MB needed", "G bit operations")
    return (Table("Quantized", ("what", "value"), facts), Table("Widths", columns, rows))


def _charts(run: BranchRun) -> tuple[Chart, ...]:
    steps = [str(record["epoch"]) for record in run.epochs]
    names = list(run.epochs[-1]["top1"])
    lines = {name: [record["top1"].get(name) for record in run.epochs] for name in names}
    return (Chart("Top-1 on held-out pictures after every epoch", steps, lines, "top-1 %"),)
