"""What the header of a checkpoint says about its layers and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtool import __version__
from qtool.api.float_source import public_name
from qtool.io import checkpoint
from qtool.models import vision
from qtool.quant.plan import LayerPlan
from qtool.settings.quantize import QuantizeSettings


def layer_bits(plans: Mapping[str, LayerPlan]) -> dict[str, checkpoint.LayerBits]:
    """The planned layers as a header lists them."""
    return {
        name: checkpoint.LayerBits(
            kind=plan.kind,
            weight_bits=plan.weight_bits or None,
            input_bits=plan.input_bits,
            options=plan.options(),
        )
        for name, plan in plans.items()
    }


def calibrated_provenance(
    settings: QuantizeSettings, opened: vision.OpenedModel, *, method: str, paper: str, count: int
) -> dict[str, Any]:
    """Where a calibrated classifier comes from, and how it was made.

    Args:
        settings: The request.
        opened: The float model.
        method: Where the calibration images came from, and what was done with them.
        paper: Publication of the method.
        count: Number of calibration images.
    """
    return {
        "qtool": __version__,
        "method": method,
        "paper": paper,
        "recipe": settings.recipe,
        "effort": settings.effort,
        "seed": settings.seed,
        "count": count,
        **float_provenance(opened),
    }


def float_provenance(opened: vision.OpenedModel) -> dict[str, str]:
    """What a file says of its float model: names without folders, and the digest of its weights."""
    return {
        "source": public_name(opened.name),
        "weights_source": public_name(opened.weights_source),
        "weights_sha256": opened.weights_sha256,
    }


def compressed_tensors(plans: Mapping[str, LayerPlan], *, skip: Sequence[str]) -> dict[str, Any]:
    """The bits in the words of the compressed-tensors format.

    Args:
        plans: The quantized layers by name.
        skip: Globs of layers that stay in float.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for name, plan in plans.items():
        if plan.kind != "attention":
            groups.setdefault((plan.weight_bits, plan.input_bits), []).append(name)
    common = {"type": "int", "symmetric": False}
    return {
        "quant_method": "qtool",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(skip),
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
