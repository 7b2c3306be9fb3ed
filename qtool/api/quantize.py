"""`qtool quantize`: a float classifier to one file of low-bit integers."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool import __version__
from qtool.api import layer_report
from qtool.api.load import restore
from qtool.api.runtime import bfloat16_is_faster, notice, prepare
from qtool.api.synthesize import (
    STEPS,
    TENSORS,
    ResumableSynthesis,
    denormalised,
    read_tensor_file,
    sheet_png,
    synthesis_config,
)
from qtool.errors import CheckpointError, Progress, QtoolError, UsageError
from qtool.io import checkpoint, folders, images
from qtool.io.atomic import write_file
from qtool.methods.spdfq.reconstruction import (
    ReconstructionConfig,
    UnitRecord,
    freeze,
    reconstruct,
    simulate,
)
from qtool.models import registry, vision
from qtool.quant.plan import LayerPlan, plan_layers, weight_parameters
from qtool.report import Picture, Result, Table
from qtool.settings import QuantizeSettings

PAPER = "SPDFQ, arXiv 2412.16553"
RECONSTRUCTION_STEPS = {"quick": 100, "standard": 100, "max": 400}
"""Training steps per block and effort; the paper takes 100."""

_BATCH = 32


def _source(settings: QuantizeSettings) -> str:
    if settings.data_free:
        return "synthesized (spdfq)"
    return f"pictures of {settings.calib}" if settings.calib else f"images of {settings.synthetic}"


def _resume_path(settings: QuantizeSettings) -> Path:
    return settings.output.with_name(f".{settings.output.name}.resume")


def _outputs(settings: QuantizeSettings) -> bool:
    """Check all outputs before work starts; False means the result is there and may stay."""
    report = settings.report
    if report is not None:
        folders.check_output(report, overwrite=True)
    return folders.check_output(
        settings.output, overwrite=settings.overwrite, skip_existing=settings.skip_existing
    )


def plan(settings: QuantizeSettings) -> Result:
    """What `quantize` would do; loads no weights."""
    write = _outputs(settings)
    if settings.calib is not None:
        folders.find_images(settings.calib)
    spec = registry.find(settings.model)
    summary: dict[str, Any] = {
        "model": settings.model,
        "architecture": spec.architecture if spec else settings.model,
        "bits": settings.bits,
        "recipe": settings.recipe,
        "calibration": _source(settings),
        "count": settings.count,
        "synthesis_steps": STEPS[settings.effort] if settings.data_free else 0,
        "reconstruction_steps": settings.steps or RECONSTRUCTION_STEPS[settings.effort],
        "output": str(settings.output),
        "skipped": not write,
    }
    if spec is not None:
        size = spec.parameters * 1e6 * settings.bit_spec.weight / 8
        summary["estimated_bytes"] = round(size)
    return Result("quantize", status="planned", summary=summary)


def quantize(settings: QuantizeSettings, progress: Progress | None = None) -> Result:
    """Quantize a classifier to low-bit integers and write one checkpoint.

    Args:
        settings: What to do.
        progress: Told about every step.

    Returns:
        One item per layer with bits, backend and errors; size and check of the file in the summary.

    Raises:
        QtoolError: One of its kinds, for wrong settings, missing weights or refused output.
    """
    if not _outputs(settings):
        return Result("quantize", summary={"output": str(settings.output), "status": "skipped"})
    started = time.monotonic()
    device = prepare(settings)
    opened = vision.open_model(
        settings.model, weights=settings.weights, offline=settings.offline, device=device
    )
    sites = vision.layout(opened.model).attentions
    plans = plan_layers(
        opened.model,
        attentions=[site.name for site in sites],
        bits=settings.bit_spec,
        keep=settings.kept,
        skip=settings.skip,
    )
    work, facts = _calibration_images(settings, opened, progress)
    pixels = facts.pop("pixels").to(device)
    facts["count"] = len(pixels)
    synthesized = time.monotonic()

    model = simulate(copy.deepcopy(opened.model), plans, sites)
    float_weights = weight_parameters(opened.model, plans)
    units = reconstruct(
        model,
        opened.model,
        pixels,
        vision.layout(opened.model).units,
        config=ReconstructionConfig(
            steps=settings.steps or RECONSTRUCTION_STEPS[settings.effort],
            seed=settings.seed,
            bfloat16=bfloat16_is_faster(device),
        ),
        norms=vision.layout(opened.model).norms,
        progress=progress,
    )
    sample = pixels[:_BATCH]
    with torch.no_grad():
        simulated = model(sample)
    freeze(model)
    reconstructed = time.monotonic()
    layers = layer_report.measure(model, opened.model, plans, sample)

    header = _header(settings, opened, plans, facts)
    checkpoint.write(settings.output, header, model.state_dict(), overwrite=settings.overwrite)
    summary: dict[str, Any] = {
        "model": opened.name,
        "architecture": opened.architecture,
        "bits": settings.bits,
        "recipe": settings.recipe,
        "calibration": _source(settings),
        "count": len(pixels),
        "output": str(settings.output),
        "bytes": settings.output.stat().st_size,
        "float_bytes": sum(p.numel() * 4 for p in opened.model.parameters()),
        "quantized_weights": float_weights,
        **facts["summary"],
        "seconds": {
            "calibration_images": round(synthesized - started, 1),
            "reconstruction": round(reconstructed - synthesized, 1),
            "total": round(time.monotonic() - started, 1),
        },
    }
    if settings.verify:
        summary["verify"] = _verify(settings.output, opened, sample, simulated)
    with torch.no_grad():
        float_choice = opened.model(sample).argmax(dim=1)
    agreed = (float_choice == simulated.argmax(dim=1)).float().mean()
    summary["calibration_agreement"] = round(float(agreed), 4)
    result = Result(
        "quantize",
        items=layers,
        summary=summary,
        tables=_tables(summary, layers, units),
        pictures=(
            Picture("Calibration images", sheet_png(denormalised(pixels.cpu(), opened.data))),
        ),
    )
    if settings.report is not None:
        text = result.to_text(settings.report.suffix)
        write_file(settings.report, text.encode(), overwrite=True)
    if work is not None:
        work.forget()
    return result


def _calibration_images(
    settings: QuantizeSettings, opened: vision.OpenedModel, progress: Progress | None
) -> tuple[ResumableSynthesis | None, dict[str, Any]]:
    """Images in the model's own normalisation, and what is worth saying about them."""
    if settings.calib is not None:
        pixels = _read_pictures(settings.calib, opened.data, settings.count, settings.seed)
        return None, {"pixels": pixels, "summary": {}, "method": "real images"}
    if settings.synthetic is not None:
        pixels, method = _read_synthetic(settings.synthetic, opened, settings.count)
        return None, {"pixels": pixels, "summary": {}, "method": method}
    config = synthesis_config(
        method="spdfq",
        effort=settings.effort,
        model=opened.model,
        batch_size=_BATCH,
        seed=settings.seed,
    )
    work = ResumableSynthesis(
        opened,
        config,
        count=settings.count,
        batch_size=_BATCH,
        state=_resume_path(settings),
        resume=settings.resume,
    )
    made = work.run(progress)
    agreement = float(made.agreement.float().mean())
    if agreement < 0.5:
        notice.warning(
            "only %.0f %% of the images are seen as what they should show; try --effort standard",
            100 * agreement,
        )
    summary = {"synthesis_steps": config.steps, "image_agreement": round(agreement, 4)}
    return work, {"pixels": made.images, "summary": summary, "method": "spdfq"}


def _read_pictures(folder: Path, data: vision.DataConfig, count: int, seed: int) -> Tensor:
    """Read up to `count` pictures of a folder, chosen by seed, as the model expects them."""
    paths = folders.find_images(folder)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(paths), generator=generator)[:count].tolist()
    if len(chosen) < count:
        notice.warning("%s has only %d pictures", folder, len(chosen))
    return torch.stack(
        [
            images.to_tensor(
                images.load_rgb(paths[index]),
                size=data.input_size[1:],
                crop_pct=data.crop_pct,
                interpolation=data.interpolation,
                mean=data.mean,
                std=data.std,
            )
            for index in sorted(chosen)
        ]
    )


def _read_synthetic(folder: Path, opened: vision.OpenedModel, count: int) -> tuple[Tensor, str]:
    """Exact images of a folder that `qtool synthesize images` made."""
    path = folder / TENSORS
    if not path.is_file():
        raise UsageError(
            f"there is no {TENSORS} in {folder}",
            remedy="make one with `qtool synthesize images MODEL -o DIR`, or use --calib DIR",
        )
    metadata, tensors = read_tensor_file(path)
    pixels = tensors.get("images")
    expected = tuple(opened.data.input_size)
    if pixels is None or pixels.dtype != torch.float32 or tuple(pixels.shape[1:]) != expected:
        found = "no images" if pixels is None else f"images of shape {tuple(pixels.shape[1:])}"
        raise CheckpointError(
            f"{path} holds {found}, but the model takes {expected}",
            remedy="synthesize images with the model that is quantized",
        )
    try:
        made = json.loads(metadata.get("qtool.synthetic", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path} has unreadable metadata: {error}") from error
    if made.get("weights_sha256") not in (None, opened.weights_sha256):
        notice.warning("%s was synthesized from other weights", folder)
    method = str(made.get("config", {}).get("method", "synthetic images"))
    return pixels[:count], method


def _header(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    plans: Mapping[str, LayerPlan],
    facts: Mapping[str, Any],
) -> checkpoint.Header:
    layers = {
        name: checkpoint.LayerBits(
            kind=plan.kind,
            weight_bits=plan.weight_bits or None,
            input_bits=plan.input_bits,
            options={"probabilities": plan.probabilities} if plan.kind == "attention" else {},
        )
        for name, plan in plans.items()
    }
    return checkpoint.Header(
        architecture=opened.architecture,
        model_args=opened.model_args,
        data=opened.data.to_dict(),
        engine="fixed",
        bits=[settings.bits],
        active_bits=settings.bits,
        layers=layers,
        quantization_config=_compressed_tensors(plans, settings),
        provenance={
            "qtool": __version__,
            "method": facts["method"],
            "paper": PAPER,
            "recipe": settings.recipe,
            "effort": settings.effort,
            "seed": settings.seed,
            "count": facts["count"],
            "source": opened.name,
            "weights_source": opened.weights_source,
            "weights_sha256": opened.weights_sha256,
        },
    )


def _compressed_tensors(
    plans: Mapping[str, LayerPlan], settings: QuantizeSettings
) -> dict[str, Any]:
    """The bits in the words of the compressed-tensors format."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, plan in plans.items():
        if plan.kind != "attention":
            groups.setdefault((plan.weight_bits, plan.input_bits), []).append(name)
    common = {"type": "int", "symmetric": False}
    return {
        "quant_method": "qtool",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(settings.skip),
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "weights": {**common, "num_bits": bits[0], "strategy": "channel"},
                "input_activations": {
                    **common,
                    "num_bits": bits[1],
                    "strategy": "tensor",
                    "dynamic": False,
                },
            }
            for index, (bits, targets) in enumerate(groups.items())
        },
    }


def _verify(
    path: Path, opened: vision.OpenedModel, sample: Tensor, expected: Tensor
) -> dict[str, Any]:
    """Read the file back and compare it with what calibration computed.

    Raises:
        QtoolError: The file computes something else.
    """
    header, tensors = checkpoint.read(path)
    model = restore(header, tensors, origin=str(path)).to(sample.device)
    with torch.no_grad():
        found = model(sample)
    difference = float((found - expected).abs().max())
    same = float((found.argmax(dim=1) == expected.argmax(dim=1)).float().mean())
    if same < 1.0 and difference > 0.05 * float(expected.abs().max()):
        raise QtoolError(
            f"{path} was written, but computes other outputs than calibration did "
            f"(largest difference {difference:.3g}, same choice {same:.1%})",
            remedy="please report this with the command you ran",
        )
    return {"max_abs_difference": difference, "same_choice": same}


def _tables(
    summary: Mapping[str, Any], layers: list[dict[str, Any]], units: list[UnitRecord]
) -> tuple[Table, ...]:
    size = f"{summary['bytes'] / 1e6:.2f} MB (float {summary['float_bytes'] / 1e6:.2f} MB)"
    facts: list[tuple[str, Any]] = [
        ("file", summary["output"]),
        ("size", size),
        ("calibration", f"{summary['count']} images, {summary['calibration']}"),
        ("agreement with float on them", f"{summary['calibration_agreement']:.1%}"),
        ("time", f"{summary['seconds']['total']:.0f} s"),
    ]
    if "verify" in summary:
        worst = summary["verify"]["max_abs_difference"]
        facts.append(("reloaded file differs by at most", f"{worst:.2g}"))
    return (
        Table("Quantized", ("what", "value"), facts),
        Table(
            "Layers",
            ("layer", "bits", "backend", "weight error", "output error"),
            [
                (
                    layer["layer"],
                    layer["bits"],
                    layer["backend"],
                    layer_report.shown(layer["weight_error"]),
                    layer_report.shown(layer["output_error"]),
                )
                for layer in layers
            ],
        ),
        Table(
            "Reconstruction (squared error relative to the block's output)",
            ("block", "before", "after"),
            [(u.name, layer_report.shown(u.before), layer_report.shown(u.after)) for u in units],
        ),
    )
