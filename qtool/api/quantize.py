"""`qtool quantize`: a float network to one file of low-bit integers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.api import (
    calibration,
    export,
    float_source,
    hub_folder,
    layer_report,
    precision,
    quantize_any,
    quantize_branches,
    quantize_restoration,
)
from qtool.api.attention_sheet import attention_png
from qtool.api.estimate import Estimate, checkpoint_bytes
from qtool.api.load import restore
from qtool.api.parallel import torchrun_group
from qtool.api.quantized_header import calibrated_provenance, compressed_tensors, layer_bits
from qtool.api.runtime import (
    bfloat16_is_faster,
    check_report,
    planned_device,
    prepare,
    write_report,
)
from qtool.api.synthesize import STEPS, denormalised, estimated_seconds, sheet_png
from qtool.errors import Progress, QtoolError, UsageError
from qtool.io import checkpoint
from qtool.io.atomic import sweep
from qtool.methods.rotated import rotated
from qtool.methods.spdfq.reconstruction import (
    ReconstructionConfig,
    UnitRecord,
    freeze,
    reconstruct,
    simulate,
)
from qtool.models import vision
from qtool.quant.convolution import fold_norms
from qtool.quant.plan import LayerPlan, weight_parameters
from qtool.report import Picture, Result, Table
from qtool.settings.quantize import QuantizeSettings

PAPER = "SPDFQ, arXiv 2412.16553"
RECONSTRUCTION_STEPS = {"quick": 100, "standard": 100, "max": 400}
"""Training steps per block and effort; the paper takes 100."""

UNTRAINED_FROM = 8
"""Bits from which blocks are not trained: 100 steps on 32 pictures cost DeiT-tiny 1.6 and
MobileNetV2 0.5 points of top-1 at w8a8, where rounding alone cost none."""

DROP = {"paper": 0.0, "strong": 0.5}
"""Share of activations that a training step leaves unrounded, per recipe."""

_BATCH = 32
_ATTENTION_TITLE = "Where the last block looks, beside the priors its images were aligned to"


def _outputs(settings: QuantizeSettings) -> bool:
    """Check all outputs before work starts; False means the result is there and may stay."""
    check_report(settings.report, replace=settings.overwrite or settings.skip_existing)
    return hub_folder.check_output(
        settings.output,
        settings.folder,
        overwrite=settings.overwrite,
        skip_existing=settings.skip_existing,
    )


def _exports(settings: QuantizeSettings) -> str | None:
    """The ONNX file to write, if one is to be written and can be."""
    if settings.onnx is not None and quantize_restoration.is_restoration(settings):
        raise UsageError(
            "only classifiers are exported to ONNX", remedy="leave out --onnx for this network"
        )
    wanted = export.check_output(
        settings.onnx, overwrite=settings.overwrite, skip_existing=settings.skip_existing
    )
    return str(settings.onnx) if wanted else None


def _skipped(settings: QuantizeSettings, exports: str | None) -> Result:
    """What there is to do when the checkpoint may stay: its ONNX model at most."""
    summary: dict[str, Any] = {"output": str(settings.output), "status": "skipped"}
    if exports is None:
        return Result("quantize", summary=summary)
    summary["onnx"] = export.export_file(settings, settings.output, Path(exports))
    return Result(
        "quantize",
        summary=summary,
        tables=(Table("Exported", ("what", "value"), export.facts(summary)),),
    )


def _steps(settings: QuantizeSettings) -> int:
    """Training steps per block."""
    return settings.steps or RECONSTRUCTION_STEPS[settings.effort]


def _classifier_steps(settings: QuantizeSettings) -> int:
    """Training steps per block of a classifier: none where nothing has fewer than 8 bits."""
    specs = (settings.bit_spec, *(spec for _, spec in settings.kept))
    fine = all(min(spec.weight, spec.activation) >= UNTRAINED_FROM for spec in specs)
    if settings.steps is None and settings.switchable is None and fine:
        return 0
    return _steps(settings)


def plan(settings: QuantizeSettings) -> Result:
    """What `quantize` would do; loads no weights.

    Raises:
        QtoolError: The request is wrong, or the device or the weights are missing.
    """
    exports = _exports(settings)
    if not _outputs(settings):
        skipped = {"output": str(settings.output), "skipped": True, "onnx": exports}
        return Result("quantize", status="planned", summary=skipped)
    if quantize_restoration.is_restoration(settings):
        return quantize_restoration.plan(settings, steps=_steps(settings))
    calibration.check(settings)
    architecture = vision.resolve(
        settings.model, weights=settings.weights, offline=settings.offline
    )
    if settings.engine == "branches":
        return Result(
            "quantize", status="planned", summary=quantize_branches.plan(settings, architecture)
        )
    summary: dict[str, Any] = {
        "model": settings.model,
        "architecture": architecture,
        "bits": settings.bits,
        "recipe": settings.recipe,
        "calibration": calibration.source(settings),
        "count": settings.count,
        "synthesis_steps": STEPS[settings.effort] if settings.data_free else 0,
        "reconstruction_steps": _classifier_steps(settings),
        "device": planned_device(settings),
        "output": str(settings.output),
        "onnx": exports,
        "skipped": False,
    }
    estimate = Estimate(settings.model, weights=settings.weights, device=settings.device)
    if estimate.network is not None:
        summary["estimated_bytes"] = _estimated_bytes(settings, estimate.network)
    if estimate.forward is not None:
        seconds = estimate.reconstruction(
            count=settings.count, steps=summary["reconstruction_steps"]
        )
        if settings.data_free:
            seconds += estimated_seconds(
                estimate,
                method="spdfq",
                effort=settings.effort,
                count=settings.count,
                steps=summary["synthesis_steps"],
            )
        summary["estimated_seconds"] = math.ceil(seconds)
    return Result("quantize", status="planned", summary=summary)


def _estimated_bytes(settings: QuantizeSettings, network: nn.Module) -> int:
    """About how large the checkpoint will be; refuses wrong rules as the run would."""
    if settings.switchable is not None:
        return quantize_any.estimated_bytes(settings, network)
    plans = precision.uniform_plans(settings, network)
    return checkpoint_bytes(network, plans, bits=settings.average_bits)


def quantize(settings: QuantizeSettings, progress: Progress | None = None) -> Result:
    """Quantize a classifier or a demoire network to integers and write one checkpoint.

    Args:
        settings: What to do.
        progress: Told about every step.

    Returns:
        One item per layer with bits, backend and errors; size and check of the file in the summary.

    Raises:
        QtoolError: One of its kinds, for wrong settings, missing weights or refused output.
    """
    exports = _exports(settings)
    if not _outputs(settings):
        return _skipped(settings, exports)
    sweep(settings.output.parent)
    if quantize_restoration.is_restoration(settings):
        return quantize_restoration.quantize(
            settings, steps=_steps(settings), drop=DROP[settings.recipe], progress=progress
        )
    calibration.check(settings)
    if settings.engine == "branches":
        return _train(settings, progress)
    started = time.monotonic()
    device = prepare(settings)
    opened = _open(settings, device)
    if settings.switchable is not None:
        return quantize_any.quantize(
            settings,
            opened,
            steps=_classifier_steps(settings),
            drop=DROP[settings.recipe],
            batch_size=_BATCH,
            exports=exports,
            progress=progress,
        )
    layout = vision.layout(opened.model)
    planned = precision.uniform_plans(settings, opened.model)  # refuses wrong rules before any work
    made = calibration.gather(settings, opened, batch_size=_BATCH, progress=progress)
    trained = made.everything.to(device)
    pixels = trained[: len(made.pixels)]
    synthesized = time.monotonic()

    if settings.recipe == "strong":
        opened = replace(opened, model=rotated(opened.model, layout, pixels, quantized=planned))
    chosen = precision.choose(settings, opened, pixels, progress=progress)
    plans = chosen.plans
    float_bytes = sum(p.numel() * 4 for p in opened.model.parameters())
    fold_norms(opened.model, [(name, plan.norm) for name, plan in plans.items() if plan.norm])
    model = simulate(copy.deepcopy(opened.model), plans, layout.attentions)
    float_weights = weight_parameters(opened.model, plans)
    units = reconstruct(
        model,
        opened.model,
        trained,
        layout.units,
        config=ReconstructionConfig(
            steps=_classifier_steps(settings),
            seed=settings.seed,
            bfloat16=bfloat16_is_faster(device),
            drop=DROP[settings.recipe],
        ),
        norms=layout.norms,
        progress=progress,
    )
    sample = pixels[:_BATCH]
    with torch.no_grad():
        simulated = model(sample)
    freeze(model)
    reconstructed = time.monotonic()
    layers = layer_report.measure(model, opened.model, plans, sample, losses=chosen.losses)

    summary: dict[str, Any] = {
        "model": opened.name,
        "architecture": opened.architecture,
        "bits": settings.bits,
        "recipe": settings.recipe,
        "calibration": calibration.source(settings),
        "count": len(pixels),
        "patches": len(trained) - len(pixels),
        "output": str(settings.output),
        "float_bytes": float_bytes,
        "quantized_weights": float_weights,
        **made.summary,
        **chosen.summary,
        "calibration_agreement": _agreement(opened.model, model, sample),
        "costliest_layers": layer_report.costliest(chosen.losses),
    }
    if made.held_out is not None and len(made.held_out):
        summary["held_out"] = len(made.held_out)
        summary["held_out_agreement"] = _agreement(opened.model, model, made.held_out.to(device))
    header = _header(settings, opened, plans, made)
    hub_folder.save(
        settings,
        header,
        model.state_dict(),
        summary,
        verify=lambda path: _verify(path, settings.output, sample, simulated),
    )
    summary["seconds"] = {
        "calibration_images": round(synthesized - started, 1),
        "reconstruction": round(reconstructed - synthesized, 1),
        "total": round(time.monotonic() - started, 1),
    }
    if exports is not None:
        summary["onnx"] = export.export(
            model,
            header,
            Path(exports),
            images=sample,
            overwrite=settings.overwrite,
            verify=settings.verify,
        )
    attention = attention_png(opened, pixels, made.priors)
    result = Result(
        "quantize",
        items=layers,
        summary=summary,
        tables=_tables(summary, layers, units),
        pictures=(
            Picture("Calibration images", sheet_png(denormalised(pixels.cpu(), opened.data))),
            *([Picture(_ATTENTION_TITLE, attention)] if attention else []),
        ),
        charts=(layer_report.chart(units),),
    )
    write_report(settings.report, result)
    if made.work is not None:
        made.work.forget()
    return result


def _open(settings: QuantizeSettings, device: torch.device) -> vision.OpenedModel:
    opened = vision.open_model(
        settings.model, weights=settings.weights, offline=settings.offline, device=device
    )
    float_source.remember(opened, settings.weights)
    return opened


def _train(settings: QuantizeSettings, progress: Progress | None) -> Result:
    """Train branches, in one process or in those of torchrun."""
    with torchrun_group():
        device = prepare(settings)
        opened = _open(settings, device)
        return quantize_branches.quantize(settings, opened, progress=progress)


@torch.no_grad()
def _agreement(reference: nn.Module, model: nn.Module, images: Tensor) -> float:
    """Share of images for which two models choose the same class."""
    same = [
        reference(batch).argmax(dim=1) == model(batch).argmax(dim=1)
        for batch in images.split(_BATCH)
    ]
    return round(float(torch.cat(same).float().mean()), 4)


def _header(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    plans: Mapping[str, LayerPlan],
    made: calibration.Calibration,
) -> checkpoint.Header:
    return checkpoint.Header(
        architecture=opened.architecture,
        model_args=opened.model_args,
        data=opened.data.to_dict(),
        engine="fixed",
        bits=[settings.bits],
        active_bits=settings.bits,
        layers=layer_bits(plans),
        quantization_config=compressed_tensors(plans, skip=settings.skip),
        provenance=calibrated_provenance(
            settings, opened, method=made.method, paper=PAPER, count=len(made.pixels)
        ),
    )


def _verify(path: Path, output: Path, sample: Tensor, expected: Tensor) -> dict[str, float]:
    """Read a file back and compare it with what calibration computed.

    Args:
        path: The file, still under a temporary name.
        output: The name it is to get.
        sample: (B, 3, H, W).
        expected: Logits of `sample`, (B, classes).

    Raises:
        QtoolError: The file computes something else.
    """
    header, tensors = checkpoint.read(path)
    model = restore(header, tensors, origin=str(output)).to(sample.device)
    with torch.no_grad():
        found = model(sample)
    difference = float((found - expected).abs().max())
    same = float((found.argmax(dim=1) == expected.argmax(dim=1)).float().mean())
    # Not `>`, so that a difference of NaN fails as well.
    if not difference <= 0.05 * float(expected.abs().max()):
        raise QtoolError(
            f"{output} was not written: read back, it computes other outputs than calibration "
            f"did (largest difference {difference:.3g}, same choice {same:.1%})",
            remedy="please report this with the command you ran",
        )
    return {"max_abs_difference": difference, "same_choice": same}


def _tables(
    summary: Mapping[str, Any], layers: list[dict[str, Any]], units: list[UnitRecord]
) -> tuple[Table, ...]:
    facts: list[tuple[str, Any]] = [
        ("file", summary["output"]),
        ("size", layer_report.shown_size(summary)),
        ("calibration", calibration.told(summary)),
        *([("mean bits", f"{summary['mean_bits']:.2f}")] if "mean_bits" in summary else []),
        ("agreement with float on them", f"{summary['calibration_agreement']:.1%}"),
        *(
            [(f"on {summary['held_out']} others", f"{summary['held_out_agreement']:.1%}")]
            if "held_out" in summary
            else []
        ),
        ("costliest layers", ", ".join(summary["costliest_layers"])),
        ("time", f"{summary['seconds']['total']:.0f} s"),
    ]
    if "verify" in summary:
        worst = summary["verify"]["max_abs_difference"]
        facts.append(("reloaded file differs by at most", f"{worst:.2g}"))
    facts += export.facts(summary)
    return (
        Table("Quantized", ("what", "value"), facts),
        layer_report.layers_table(layers),
        layer_report.blocks_table(units),
    )
