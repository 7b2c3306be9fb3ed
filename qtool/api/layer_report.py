"""What quantization cost, layer by layer, and which backend each layer runs on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qtool.engine import dispatch
from qtool.methods.spdfq.reconstruction import UnitRecord
from qtool.quant.layers import QuantLinear
from qtool.quant.plan import LayerPlan
from qtool.report import Chart, Table

_IMAGES = 8
_PRODUCTS = {"attention": ("attention", "matmul"), "linear": ("linear",), "conv": ("conv2d",)}


def shown(error: float | None) -> str:
    """A relative squared error for people, in per cent."""
    return "" if error is None else f"{100 * error:.2f} %"


def shown_size(summary: Mapping[str, Any]) -> str:
    """Size of a written file beside that of its float model, for people."""
    return f"{summary['bytes'] / 1e6:.2f} MB (float {summary['float_bytes'] / 1e6:.2f} MB)"


def sqnr(error: float) -> float:
    """Signal-to-quantization-noise ratio in decibels of a relative squared error."""
    return -10.0 * math.log10(max(error, 1e-30))


def costliest(losses: Mapping[str, float], count: int = 5) -> list[str]:
    """The layers whose rounding is estimated to cost most, the worst first."""
    return sorted(losses, key=lambda name: -losses[name])[:count]


def _relative(found: Tensor, expected: Tensor) -> float:
    power = expected.double().square().sum().clamp_min(1e-30)
    return float((found - expected).double().square().sum() / power)


def _outputs(model: nn.Module, names: Iterable[str], images: Tensor) -> dict[str, Tensor]:
    """Outputs of named modules for some images."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for name in names:

            def keep(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                outputs[name] = output.clone()  # activations may write over it

            handle = model.get_submodule(name).register_forward_hook(keep)
            stack.callback(handle.remove)
        model(images)
    return outputs


def backends(model: nn.Module, plans: Mapping[str, LayerPlan], images: Tensor) -> dict[str, str]:
    """Which backend multiplies in each planned layer: run one image and look.

    Args:
        model: A model of integer layers.
        plans: Its planned layers.
        images: (B, 3, H, W); the first is used.
    """
    found: dict[str, str] = {}
    with ExitStack() as stack, torch.no_grad():
        decisions = stack.enter_context(dispatch.trace())
        for name, plan in plans.items():
            module = model.get_submodule(name)
            start: list[int] = []

            def before(_: nn.Module, __: tuple[Any, ...], start: list[int] = start) -> None:
                start.append(len(decisions))

            def after(
                _: nn.Module,
                __: tuple[Any, ...],
                ___: Tensor,
                name: str = name,
                plan: LayerPlan = plan,
                start: list[int] = start,
            ) -> None:
                wanted = _PRODUCTS[plan.kind]
                used = {
                    d.backend
                    for d in decisions[start.pop() :]
                    if d.op.split("::")[-1].startswith(wanted)
                }
                found[name] = "+".join(sorted(used))

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        model(images[:1])
    return found


def measure(
    model: nn.Module,
    reference: nn.Module,
    plans: Mapping[str, LayerPlan],
    images: Tensor,
    *,
    losses: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Compare every planned layer with its float original on the same images.

    The output error includes what the layers before it did to its input.

    Args:
        model: A model of integer layers.
        reference: The float model.
        plans: Its planned layers.
        images: (B, 3, H, W); up to eight are used.
        losses: What each layer's rounding alone is estimated to cost, where that is known.

    Returns:
        One record per layer: bits, backend, relative squared error of weights and output, its SQNR
        in decibels, estimated cost.
    """
    sample = images[:_IMAGES]
    found = _outputs(model, plans, sample)
    expected = _outputs(reference, plans, sample)
    used = backends(model, plans, sample)
    records = []
    for name, plan in plans.items():
        layer = model.get_submodule(name)
        weight_error = None
        if isinstance(layer, QuantLinear):
            original = reference.get_submodule(name).weight
            if isinstance(original, Tensor):
                weight_error = _relative(layer.dequantized_weight(), original.detach().flatten(1))
        error = _relative(found[name], expected[name])
        bits = (
            f"w{plan.weight_bits}a{plan.input_bits}" if plan.weight_bits else f"a{plan.input_bits}"
        )
        records.append(
            {
                "layer": name,
                "kind": plan.kind,
                "bits": bits,
                "backend": used.get(name, ""),
                "weight_error": weight_error,
                "output_error": error,
                "output_sqnr_db": round(sqnr(error), 2),
                "estimated_cost": losses.get(name),
            }
        )
    return records


def layers_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """The records of `measure` for people."""
    return Table(
        "Layers",
        ("layer", "bits", "backend", "weight error", "output error", "SQNR (dB)", "cost"),
        [
            (
                layer["layer"],
                layer["bits"],
                layer["backend"],
                shown(layer["weight_error"]),
                shown(layer["output_error"]),
                layer["output_sqnr_db"],
                layer["estimated_cost"],
            )
            for layer in layers
        ],
    )


def blocks_table(units: Sequence[UnitRecord]) -> Table:
    """What reconstruction did to every block, for people."""
    return Table(
        "Reconstruction (squared error relative to the block's output)",
        ("block", "before", "after"),
        [(unit.name, shown(unit.before), shown(unit.after)) for unit in units],
    )


def chart(units: Sequence[UnitRecord]) -> Chart:
    """Error of every block, in forward order, before and after its training."""
    return Chart(
        "Squared error relative to the block's output, block by block",
        steps=[str(number) for number in range(1, len(units) + 1)],
        lines={
            "before training": [100 * unit.before for unit in units],
            "after": [100 * unit.after for unit in units],
        },
        unit="%",
    )
