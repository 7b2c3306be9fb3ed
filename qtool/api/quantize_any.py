"""`qtool quantize --bits any`: one checkpoint that runs at every width, chosen when it runs."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.api import calibration, export, hub_folder, nested_report
from qtool.api.estimate import checkpoint_bytes
from qtool.api.load import restore
from qtool.api.nested_model import choose_bits
from qtool.api.quantized_header import calibrated_provenance
from qtool.api.runtime import notice, write_report
from qtool.api.synthesize import denormalised, sheet_png
from qtool.errors import Progress, QtoolError, UsageError
from qtool.io import checkpoint, nested_tensors
from qtool.methods.multiquant.nested import (
    USUAL_ACTIVATION,
    NestedConfig,
    calibrate,
    freeze,
    simulate,
)
from qtool.methods.multiquant.sensitivity import sensitivities
from qtool.methods.rotated import rotated
from qtool.models import vision
from qtool.quant import widths
from qtool.quant.bits import BitSpec
from qtool.quant.convolution import fold_norms
from qtool.quant.macs import multiplications
from qtool.quant.nested_storage import round_to_storage, stored
from qtool.quant.plan import LayerPlan, Quantizer, plan_layers, weight_parameters
from qtool.quant.widths import DEDICATED_BITS, Offer
from qtool.report import Picture, Result
from qtool.settings.quantize import QuantizeSettings

METHOD = "nested 2-bit planes"
PAPER = "MultiQuant, arXiv 2305.08117"
TRAINED_DOWN_TO = 4
"""Below this width, weights rounded after training rarely serve."""

_FEWEST_WEIGHTS = 32
"""Weights in a row below which it stays in half precision, as squeeze-and-excitation does."""

_SAMPLE = 32
_SENSITIVITY_IMAGES = 8


def activation_widths(weight: tuple[int, ...]) -> tuple[int, ...]:
    """The activation widths of a file: those of the weights, and 8, which is the usual one."""
    return tuple(sorted({*weight, USUAL_ACTIVATION}))


def quantize(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    *,
    steps: int,
    drop: float,
    batch_size: int,
    exports: str | None,
    progress: Progress | None,
) -> Result:
    """Quantize an opened classifier to one checkpoint of nested planes.

    Args:
        settings: What to do; their `switchable` names the widths.
        opened: The float model.
        steps: Training steps per block.
        drop: Share of activations left unrounded in a training step.
        batch_size: Images synthesized together.
        exports: ONNX file to write as well, at the widest bits, or None.
        progress: Told about every step.

    Returns:
        One item per layer; size and check of the file in the summary.

    Raises:
        QtoolError: One of its kinds, for wrong settings or refused output.
    """
    started = time.monotonic()
    offer = _offered(settings)
    bits = offer.weight
    layout = vision.layout(opened.model)
    planned = _planned(settings, opened.model, layout, offer)
    plans = planned.plans
    if min(bits) < TRAINED_DOWN_TO:
        notice.warning(
            "%d-bit weights without training lose much; measure before use: "
            "qtool eval %s --bits %d",
            min(bits),
            settings.output,
            min(bits),
        )
    made = calibration.gather(settings, opened, batch_size=batch_size, progress=progress)
    trained = made.everything.to(next(opened.model.parameters()).device)
    pixels = trained[: len(made.pixels)]
    gathered = time.monotonic()

    quantizer: Quantizer = "table" if settings.recipe == "strong" else "uniform"
    if settings.recipe == "strong":
        opened = replace(opened, model=rotated(opened.model, layout, pixels, quantized=plans))
    float_bytes = sum(p.numel() * 4 for p in opened.model.parameters())
    fold_norms(opened.model, [(name, plan.norm) for name, plan in plans.items() if plan.norm])
    model = simulate(
        copy.deepcopy(opened.model),
        plans,
        layout.attentions,
        offer=offer,
        quantizer=quantizer,
        pinned=planned.pinned,
        sees_picture=planned.sees_picture,
    )
    records = calibrate(
        model,
        opened.model,
        trained,
        layout.units,
        offer=offer,
        config=NestedConfig(steps=steps, seed=settings.seed, drop=drop),
        norms=layout.norms,
        progress=progress,
    )
    round_to_storage(model)
    calibrated = time.monotonic()
    sample = pixels[:_SAMPLE]
    costs = _sensitivities(settings, model, planned, pixels, bits, progress)
    expected = _outputs(model, sample, _checked_widths(offer))
    freeze(model)
    macs = multiplications(opened.model, plans, pixels[:1])
    header = _header(settings, opened, planned, made, offer, quantizer, macs, costs)
    summary: dict[str, Any] = {
        "model": opened.name,
        "architecture": opened.architecture,
        "bits": settings.bits,
        "engine": "nested",
        "widths": list(bits),
        "recipe": settings.recipe,
        "calibration": calibration.source(settings),
        "count": len(pixels),
        "patches": len(trained) - len(pixels),
        "output": str(settings.output),
        "float_bytes": float_bytes,
        "quantized_weights": weight_parameters(opened.model, plans),
        **made.summary,
        "calibration_agreement": _agreement(opened.model, sample, expected),
    }
    hub_folder.save(
        settings,
        header,
        stored(model),
        summary,
        verify=lambda path: _verify(path, settings.output, sample, expected),
    )
    summary["seconds"] = {
        "calibration_images": round(gathered - started, 1),
        "calibration": round(calibrated - gathered, 1),
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
    items = nested_report.items(model, opened.model, plans, sample, offer, macs)
    result = Result(
        "quantize",
        items=items,
        summary=summary,
        tables=nested_report.tables(summary, items, records, offer),
        pictures=(
            Picture("Calibration images", sheet_png(denormalised(pixels.cpu(), opened.data))),
        ),
    )
    write_report(settings.report, result)
    if made.work is not None:
        made.work.forget()
    return result


def estimated_bytes(settings: QuantizeSettings, network: nn.Module) -> int:
    """About how large the checkpoint of a network will be, which need not have its weights.

    Raises:
        UsageError: As for `quantize`, for rules.
    """
    offer = _offered(settings)
    planned = _planned(settings, network, vision.layout(network), offer)
    stored_bits = nested_tensors.bits_of(nested_tensors.planes_for(max(offer.weight)))
    if offer.dedicated:
        stored_bits += DEDICATED_BITS
    return checkpoint_bytes(network, planned.plans, bits=stored_bits, widths=len(offer.weight))


def _offered(settings: QuantizeSettings) -> Offer:
    """The widths that a file is asked to have."""
    bits = settings.switchable or ()
    return Offer(bits, activation_widths(bits), dedicated=settings.dedicated_2bit)


class _Planned(NamedTuple):
    """The layers of a switchable file.

    Attributes:
        plans: Their kinds, and the widths they run at.
        pinned: Those that `--keep` pins to a width.
        sees_picture: The one whose input is the picture, if it is among them.
    """

    plans: dict[str, LayerPlan]
    pinned: list[str]
    sees_picture: list[str]


def _planned(
    settings: QuantizeSettings, model: nn.Module, layout: vision.Layout, offer: Offer
) -> _Planned:
    """Decide which layers have several widths.

    First and last layers stay in half precision unless they are named; so do convolutions in groups
    and those with so few weights a row that their scales would outweigh what few bits save.

    Raises:
        UsageError: A pinned width is none of the file's, or a layer that was named has groups.
    """
    kinds = (nn.Linear, nn.Linear | nn.Conv2d)
    ends = [
        name
        for name in layout.units
        if isinstance(model.get_submodule(name), kinds[name == layout.units[0]])
        and not any(fnmatchcase(name, glob) for glob, _ in settings.kept)
    ]
    small = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and (module.groups > 1 or _is_short(module)):
            if module.groups > 1 and any(fnmatchcase(name, glob) for glob, _ in settings.kept):
                raise UsageError(
                    f"{name} convolves in groups, and stays in half precision in a switchable file",
                    remedy="leave it out of --keep",
                )
            small.append(name)
    plans = plan_layers(
        model,
        attentions=[site.name for site in layout.attentions],
        bits=settings.bit_spec,
        batch_norms=dict(layout.batch_norms),
        keep=settings.kept,
        skip=[*settings.skip, *ends, *small],
    )
    pinned = []
    for name, plan in plans.items():
        if any(fnmatchcase(name, glob) for glob, _ in settings.kept) and plan.weight_bits:
            spec = BitSpec(plan.weight_bits, plan.input_bits)
            if spec.weight not in offer.weight or spec.activation not in offer.activation:
                raise UsageError(
                    f"{name} cannot be kept at {spec} in a file of {settings.bits}",
                    remedy="keep it at one of the widths of the file",
                )
            pinned.append(name)
    convolutions = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return _Planned(plans, pinned, [name for name in convolutions[:1] if name in plans])


def _is_short(module: nn.Conv2d) -> bool:
    return module.weight[0].numel() < _FEWEST_WEIGHTS


def _sensitivities(
    settings: QuantizeSettings,
    model: nn.Module,
    planned: _Planned,
    pixels: Tensor,
    bits: tuple[int, ...],
    progress: Progress | None,
) -> dict[str, list[float]]:
    """What each layer costs at each width, for `switch-bits --budget`; none with effort quick."""
    if settings.effort == "quick" or len(bits) < 2:
        return {}
    names = [
        name
        for name, plan in planned.plans.items()
        if plan.weight_bits and name not in planned.pinned
    ]
    return sensitivities(model, pixels[:_SENSITIVITY_IMAGES], names, bits, progress=progress)


def _checked_widths(offer: Offer) -> list[BitSpec]:
    """The widths at which a file is compared with what calibration computed."""
    low, high = offer.weight[0], offer.weight[-1]
    specs = (BitSpec(high, USUAL_ACTIVATION), BitSpec(low, USUAL_ACTIVATION), BitSpec(low, low))
    return list(dict.fromkeys(specs))


def _outputs(model: nn.Module, sample: Tensor, specs: list[BitSpec]) -> dict[str, Tensor]:
    outputs = {}
    for spec in specs:
        with torch.no_grad(), widths.bits(str(spec)):
            outputs[str(spec)] = model(sample)
    return outputs


def _agreement(
    reference: nn.Module, sample: Tensor, outputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """Share of images on which the float model and each width choose the same class."""
    with torch.no_grad():
        choice = reference(sample).argmax(dim=1)
    return {
        name: round(float((logits.argmax(dim=1) == choice).float().mean()), 4)
        for name, logits in outputs.items()
    }


def _verify(
    path: Path, output: Path, sample: Tensor, expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Read a file back and compare it with what calibration computed, at several widths.

    Raises:
        QtoolError: The file computes something else.
    """
    header, tensors = checkpoint.read(path)
    model = restore(header, tensors, origin=str(output)).to(sample.device)
    choose_bits(model, header, None, path=str(output))
    worst = 0.0
    for spec, logits in expected.items():
        with torch.no_grad(), widths.bits(spec):
            difference = float((model(sample) - logits).abs().max())
        # Not `>`, so that a difference of NaN fails as well.
        if not difference <= 0.05 * float(logits.abs().max()):
            raise QtoolError(
                f"{output} was not written: read back, it computes other outputs at {spec} than "
                f"calibration did (largest difference {difference:.3g})",
                remedy="please report this with the command you ran",
            )
        worst = max(worst, difference)
    return {"max_abs_difference": worst}


def _header(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    planned: _Planned,
    made: calibration.Calibration,
    offer: Offer,
    quantizer: Quantizer,
    macs: Mapping[str, int],
    costs: Mapping[str, list[float]],
) -> checkpoint.Header:
    layers = {}
    for name, plan in planned.plans.items():
        options: dict[str, str | int | float | bool | None] = {
            "quantizer": "uniform" if name in planned.sees_picture else quantizer,
            "macs": macs[name],
        }
        if plan.norm:
            options["norm"] = plan.norm
        if name in planned.sees_picture:
            options[checkpoint.SEES_PICTURE] = True
        if plan.weight_bits:
            planes = nested_tensors.planes_for(max(offer.weight))
            options |= {"planes": planes, "pinned": name in planned.pinned}
        layers[name] = checkpoint.LayerBits(
            kind=plan.kind,
            weight_bits=plan.weight_bits or None,
            input_bits=plan.input_bits,
            options=options,
        )
    usual = [f"w{bits}a{USUAL_ACTIVATION}" for bits in reversed(offer.weight)]
    equal = [f"w{bits}a{bits}" for bits in reversed(offer.weight)]
    return checkpoint.Header(
        architecture=opened.architecture,
        model_args=opened.model_args,
        data=opened.data.to_dict(),
        engine="nested",
        bits=list(dict.fromkeys([*usual, *equal])),
        active_bits=str(settings.bit_spec),
        layers=layers,
        quantization_config={
            "quant_method": "qtool",
            "format": "nested-planes",
            "quantization_status": "compressed",
            "ignore": list(settings.skip),
        },
        provenance=calibrated_provenance(
            settings,
            opened,
            method=f"{METHOD}, calibrated on {made.method}",
            paper=PAPER,
            count=len(made.pixels),
        ),
        nested=checkpoint.NestedWidths(
            weight_bits=list(offer.weight),
            activation_bits=list(offer.activation),
            sensitivity={name: list(values) for name, values in costs.items()},
            dedicated_2bit=offer.dedicated,
        ),
    )
