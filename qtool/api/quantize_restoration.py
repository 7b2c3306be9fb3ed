"""`qtool quantize` of a demoire network: one file that `qtool demoire --weights` runs in integers.

A network that restores has no classes to agree on and takes pictures of any size. Its ranges are
fixed, one per tensor, so that a tile is computed as the whole picture would be. What is compared
is the picture that comes out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool import __version__
from qtool.api import hub_folder, layer_report
from qtool.api.demoire import calibration
from qtool.api.demoire.network import missing_weights
from qtool.api.estimate import checkpoint_bytes
from qtool.api.float_source import public_name
from qtool.api.load import restore
from qtool.api.quantized_header import compressed_tensors, layer_bits
from qtool.api.runtime import bfloat16_is_faster, planned_device, prepare, write_report
from qtool.api.synthesize import sheet_png
from qtool.errors import Progress, QtoolError, UsageError
from qtool.io import checkpoint, folders
from qtool.methods.spdfq.reconstruction import (
    ReconstructionConfig,
    UnitRecord,
    freeze,
    reconstruct,
    simulate,
)
from qtool.metrics import fidelity
from qtool.models import demoire, demoire_weights, sources, vision
from qtool.models.demoire import DemoireSpec
from qtool.models.demoire_weights import DemoireNetwork
from qtool.quant.bits import BitSpec
from qtool.quant.plan import LayerPlan, plan_layers, weight_parameters
from qtool.report import Picture, Result, Table
from qtool.settings.quantize import QuantizeSettings

_SIDE, _SMALL_SIDE = 256, 128
_HEAVY = 1000
"""Bytes per pixel above which a network calibrates on parts of the smaller side."""

_BATCH = 4
_ENDS_BITS = 8
_EXACT = 100.0
"""Decibels that stand for pictures without any difference."""


def is_restoration(settings: QuantizeSettings) -> bool:
    """Tell whether the model that is named is a demoire network, by its name or its file."""
    if settings.model.partition(",")[0].strip() in {spec.name for spec in demoire.NETWORKS}:
        return True
    path = Path(settings.model)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return demoire_weights.METADATA_KEY in sources.read_metadata(path)


def plan(settings: QuantizeSettings, *, steps: int) -> Result:
    """What `quantize` would do; loads no weights.

    Args:
        settings: The request.
        steps: Training steps per block.
    """
    _check(settings)
    name, arguments, path = _source(settings)
    summary: dict[str, Any] = {
        "model": settings.model,
        "task": "restoration",
        "weights": str(path),
        "bits": settings.bits,
        "recipe": settings.recipe,
        "calibration": _calibration(settings),
        "count": settings.count,
        "reconstruction_steps": steps,
        "device": planned_device(settings),
        "output": str(settings.output),
        "skipped": False,
    }
    if name is not None:
        with torch.device("meta"):
            outline = demoire.build(name, arguments)
        plans = _plans(settings, demoire.find(name), outline)
        summary["estimated_bytes"] = checkpoint_bytes(outline, plans)
    return Result("quantize", status="planned", summary=summary)


def quantize(
    settings: QuantizeSettings, *, steps: int, drop: float, progress: Progress | None = None
) -> Result:
    """Quantize a demoire network and write one checkpoint.

    Args:
        settings: What to do.
        steps: Training steps per block.
        drop: Share of activations that a training step leaves unrounded.
        progress: Told about every step.

    Returns:
        One item per layer with bits, backend and errors; the PSNR lost in the summary.

    Raises:
        QtoolError: One of its kinds, for wrong settings, missing weights or refused output.
    """
    _check(settings)
    started = time.monotonic()
    device = prepare(settings)
    name, arguments, path = _source(settings)
    network = demoire_weights.load_network(path, name=name, arguments=arguments)
    reference = network.module.to(device).requires_grad_(False)
    plans = _plans(settings, network.spec, network.module)
    heavy = network.spec.bytes_per_pixel > _HEAVY
    made = calibration.gather(settings, side=_SMALL_SIDE if heavy else _SIDE, progress=progress)
    pixels = made.pixels.to(device)
    gathered = time.monotonic()

    float_bytes = sum(p.numel() * 4 for p in reference.parameters())
    float_weights = weight_parameters(reference, plans)
    model = simulate(copy.deepcopy(reference), plans, sites=())
    units = reconstruct(
        model,
        reference,
        pixels,
        reference.blocks(),  # type: ignore[operator]
        config=ReconstructionConfig(
            steps=steps,
            seed=settings.seed,
            bfloat16=bfloat16_is_faster(device),
            drop=drop,
        ),
        progress=progress,
    )
    result = network.spec.result
    sample = pixels[:_BATCH]
    simulated = _restored(model, sample, result)
    freeze(model)
    reconstructed = time.monotonic()
    layers = layer_report.measure(model, reference, plans, sample, losses={})
    summary: dict[str, Any] = {
        "model": settings.model,
        "task": "restoration",
        "architecture": network.spec.name,
        "bits": settings.bits,
        "recipe": settings.recipe,
        "calibration": _calibration(settings),
        "count": len(pixels),
        "output": str(settings.output),
        "float_bytes": float_bytes,
        "quantized_weights": float_weights,
        "calibration_psnr_to_float": _mean_psnr(
            _restored(model, pixels, result), _restored(reference, pixels, result)
        ),
        **_judged(model, reference, made, result, device),
    }
    hub_folder.save(
        settings,
        _header(settings, network, plans, made, source=path),
        model.state_dict(),
        summary,
        verify=lambda written: _verify(written, settings.output, sample, simulated, result),
    )
    summary["seconds"] = {
        "calibration_images": round(gathered - started, 1),
        "reconstruction": round(reconstructed - gathered, 1),
        "total": round(time.monotonic() - started, 1),
    }
    found = Result(
        "quantize",
        items=layers,
        summary=summary,
        tables=_tables(summary, layers, units),
        pictures=(Picture("Calibration pictures", sheet_png(made.pixels)),),
        charts=(layer_report.chart(units),),
    )
    write_report(settings.report, found)
    return found


def _check(settings: QuantizeSettings) -> None:
    """Refuse what a network that restores cannot be asked for.

    Raises:
        UsageError: It was asked for.
    """
    refused = {
        f"--bits {settings.bits}": settings.switchable is not None
        or settings.average_bits is not None,
        "--synthetic": settings.synthetic is not None,
        "--budget": settings.budget != QuantizeSettings.model_fields["budget"].default,
        "--resume": settings.resume,
    }
    for option, given in refused.items():
        if given:
            raise UsageError(
                f"{option} is for classifiers, {settings.model} restores pictures",
                remedy="give one width such as --bits w8a8, and --data-free or --calib DIR",
            )
    if settings.calib is not None:
        folders.find_images(settings.calib)


def _source(settings: QuantizeSettings) -> tuple[str | None, dict[str, Any], Path]:
    """Name, arguments and file of weights that a request means; no name for that of the file.

    Raises:
        UsageError: Weights are named twice, or arguments make no sense.
        MissingError: Weights are named nowhere, and do not come with qtool.
    """
    given = None if settings.weights == "pretrained" else Path(settings.weights)
    name, arguments = vision.split_arguments(settings.model)
    if name not in {spec.name for spec in demoire.NETWORKS}:
        if given is not None:
            raise UsageError(
                f"{settings.model} and {given} are both weights",
                remedy="give the file as the model, or the network's name and --weights FILE",
            )
        return None, {}, Path(settings.model)
    if not demoire_weights.are_harmless(arguments):
        raise UsageError(f"{name} takes no such arguments: {arguments}")
    if given is None:
        if not demoire.find(name).bundled:
            raise missing_weights(name)
        given = demoire_weights.bundled_path()
    return name, arguments, given


def _calibration(settings: QuantizeSettings) -> str:
    """Name the source of the photographs for people."""
    return "simulated moire" if settings.data_free else f"photographs of {settings.calib}"


def _plans(
    settings: QuantizeSettings, spec: DemoireSpec, network: nn.Module
) -> dict[str, LayerPlan]:
    """Plans with the same bits everywhere, but for both ends of the network.

    What looks at the picture takes it with the 8 bits that pictures have, and what writes it has
    8 bits throughout: its rounding would be seen as it is, and it holds few weights.

    Raises:
        UsageError: A rule matches no layer.
    """
    bits = settings.bit_spec
    ends = [(glob, BitSpec(bits.weight, _ENDS_BITS)) for glob in spec.sees]
    ends += [(glob, BitSpec(_ENDS_BITS, _ENDS_BITS)) for glob in spec.writes]
    return plan_layers(
        network,
        attentions=(),
        bits=bits,
        keep=(*ends, *settings.kept),
        skip=settings.skip,
        quantizer="table" if settings.recipe == "strong" else "uniform",
    )


@torch.no_grad()
def _restored(model: nn.Module, pictures: Tensor, result: int) -> Tensor:
    """What a network makes of pictures, (B, 3, H, W) in 0..1."""
    parts = [model(batch)[result].clamp(0, 1) for batch in pictures.split(_BATCH)]
    return torch.cat(parts)


def _mean_psnr(output: Tensor, target: Tensor) -> float:
    """Mean PSNR of pictures, (B, 3, H, W), in decibels."""
    values = [
        min(fidelity.psnr(one, other), _EXACT) for one, other in zip(output, target, strict=True)
    ]
    return round(sum(values) / len(values), 2)


def _judged(
    model: nn.Module,
    reference: nn.Module,
    made: calibration.Photographs,
    result: int,
    device: torch.device,
) -> dict[str, Any]:
    """PSNR on photographs that nothing was calibrated on, if there are any."""
    if not len(made.held_out):
        return {}
    found, wanted = (
        _restored(network, made.held_out.to(device), result) for network in (model, reference)
    )
    judged = {
        "held_out": len(made.held_out),
        "held_out_psnr_to_float": _mean_psnr(found, wanted),
    }
    if made.targets is not None:
        targets = made.targets.to(device)
        quantized, whole = _mean_psnr(found, targets), _mean_psnr(wanted, targets)
        judged |= {
            "held_out_psnr_float": whole,
            "held_out_psnr": quantized,
            "psnr_lost": round(whole - quantized, 2),
        }
    return judged


def _header(
    settings: QuantizeSettings,
    network: DemoireNetwork,
    plans: Mapping[str, LayerPlan],
    made: calibration.Photographs,
    *,
    source: Path,
) -> checkpoint.Header:
    bundled = settings.weights == "pretrained" and source.name == network.spec.bundled
    return checkpoint.Header(
        architecture=network.spec.name,
        model_args=dict(network.arguments),
        data={"colour": "sRGB", "range": [0.0, 1.0]},
        engine="fixed",
        bits=[settings.bits],
        active_bits=settings.bits,
        layers=layer_bits(plans),
        quantization_config=compressed_tensors(plans, skip=settings.skip),
        provenance={
            "qtool": __version__,
            "method": made.method,
            "paper": network.spec.paper,
            "recipe": settings.recipe,
            "effort": settings.effort,
            "seed": settings.seed,
            "count": len(made.pixels),
            "source": public_name(settings.model),
            "weights_source": f"bundled {source.name}" if bundled else source.name,
            "weights_sha256": network.sha256,
            "weights_provenance": dict(network.provenance),
        },
        task="restoration",
    )


def _verify(
    path: Path, output: Path, sample: Tensor, expected: Tensor, result: int
) -> dict[str, float]:
    """Read a file back and compare it with what calibration computed.

    Args:
        path: The file, still under a temporary name.
        output: The name it is to get.
        sample: (B, 3, H, W).
        expected: What calibration made of it, the same shape.
        result: Index of the network's output that has the size of the input.

    Raises:
        QtoolError: The file computes something else.
    """
    header, tensors = checkpoint.read(path)
    model = restore(header, tensors, origin=str(output)).to(sample.device)
    difference = (_restored(model, sample, result) - expected).abs()
    mean, largest = float(difference.mean()), float(difference.max())
    # Not `>`, so that a difference of NaN fails as well.
    if not mean <= 0.5 / 255:
        raise QtoolError(
            f"{output} was not written: read back, it restores other pictures than calibration "
            f"did (mean difference {255 * mean:.3g} of 255)",
            remedy="please report this with the command you ran",
        )
    return {"max_abs_difference": largest, "mean_abs_difference": mean}


def _tables(
    summary: Mapping[str, Any], layers: list[dict[str, Any]], units: list[UnitRecord]
) -> tuple[Table, ...]:
    facts: list[tuple[str, Any]] = [
        ("file", summary["output"]),
        ("size", layer_report.shown_size(summary)),
        ("calibration", f"{summary['count']} pictures, {summary['calibration']}"),
        ("PSNR to float on them", f"{summary['calibration_psnr_to_float']:.1f} dB"),
    ]
    if "held_out" in summary:
        others = f"on {summary['held_out']} others"
        facts.append((others, f"{summary['held_out_psnr_to_float']:.1f} dB"))
    if "psnr_lost" in summary:
        facts.append(
            (
                "their PSNR to the target",
                f"{summary['held_out_psnr']:.2f} dB (float {summary['held_out_psnr_float']:.2f})",
            )
        )
    facts.append(("time", f"{summary['seconds']['total']:.0f} s"))
    if "verify" in summary:
        worst = 255 * summary["verify"]["max_abs_difference"]
        facts.append(("reloaded file differs by at most", f"{worst:.2g} of 255"))
    return (
        Table("Quantized", ("what", "value"), facts),
        layer_report.layers_table(layers),
        layer_report.blocks_table(units),
    )
