"""Quantize block by block: choose ranges, then train each block's weights to restore its output.

Reference: SPDFQ (arXiv 2412.16553) with the details of I&S-ViT (arXiv 2311.10126): Adam, cosine
decay, squared distance to the clean output of the full-precision block, inputs from the already
quantized prefix, weights and biases trained through straight-through rounding, scales fixed. Batch
and step size differ: batches of 8 instead of 32 take a quarter of the time, and with them a step of
1.5e-4 lost less on DeiT-tiny than the paper's 4e-5. LayerNorms are reparametrised first (RepQ-ViT,
arXiv 2212.08254).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qtool.errors import Progress
from qtool.methods.streams import Stream, unit_calls
from qtool.models.vision import AttentionSite, Layout
from qtool.quant.attention import ATTENTION_CLASSES
from qtool.quant.convolution import SimulatedConv2d
from qtool.quant.plan import LayerPlan, replace_module
from qtool.quant.simulation import SimulatedLayer, SimulatedLinear, SimulatedProducts, dropping

Layer = TypeVar("Layer", bound=nn.Module)

RANGE_IMAGES = 32
"""Images whose activations set the ranges of a block."""


@dataclass(frozen=True)
class ReconstructionConfig:
    """How blocks are trained.

    Attributes:
        steps: Optimiser steps per block.
        learning_rate: Peak step size of Adam; cosine decay to zero.
        batch_size: Images per step.
        seed: Order of the images.
        bfloat16: Run the products of training steps in bfloat16 (codes are exact in it).
        drop: Share of activations left unrounded in a training step (QDrop, arXiv 2203.05740).
    """

    steps: int = 100
    learning_rate: float = 1.5e-4
    batch_size: int = 8
    seed: int = 0
    bfloat16: bool = False
    drop: float = 0.0


@dataclass(frozen=True)
class UnitRecord:
    """What happened to one block.

    Attributes:
        name: The block.
        before: Squared output error relative to the output's power, after choosing ranges.
        after: The same after training; never above `before`.
    """

    name: str
    before: float
    after: float


def simulate(
    model: nn.Module, plans: Mapping[str, LayerPlan], sites: Sequence[AttentionSite]
) -> nn.Module:
    """Replace planned layers by simulated ones, in place, all of them still computing in float.

    Args:
        model: The float model; parameters keep their names.
        plans: Plans by module name.
        sites: Attention modules and their kinds.

    Returns:
        The same model.
    """
    kinds = {site.name: site.kind for site in sites}
    for name, plan in plans.items():
        source = model.get_submodule(name)
        if plan.kind == "attention":
            device = next(source.parameters()).device
            products = SimulatedProducts(plan).to(device)
            replace_module(model, name, ATTENTION_CLASSES[kinds[name]](source, products))
        elif isinstance(source, nn.Conv2d):
            replace_module(model, name, SimulatedConv2d(source, plan))
        elif isinstance(source, nn.Linear):
            replace_module(model, name, SimulatedLinear(source, plan))
    return model.eval()


def freeze(model: nn.Module) -> nn.Module:
    """Replace simulated layers by integer ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SimulatedLinear | SimulatedProducts):
            replace_module(model, name, module.freeze())
    return model.requires_grad_(False)


def _relative_error(output: Tensor, target: Tensor) -> float:
    return float((output - target).square().sum() / target.square().sum().clamp_min(1e-12))


@torch.no_grad()
def _observe(
    layers: Sequence[SimulatedLayer], unit: nn.Module, x: Tensor, kwargs: Mapping[str, Any]
) -> None:
    for layer in layers:
        layer.observing = True
    unit(x, **kwargs)
    for layer in layers:
        layer.observing = False


def _choose_ranges(
    layers: Sequence[SimulatedLayer],
    unit: nn.Module,
    x: Tensor,
    kwargs: Mapping[str, Any],
    feeds: Sequence[tuple[nn.LayerNorm, SimulatedLinear]],
) -> None:
    _observe(layers, unit, x, kwargs)
    if feeds:
        for norm, linear in feeds:
            linear.absorb(norm)
        _observe(layers, unit, x, kwargs)
    for layer in layers:
        layer.calibrate()
        layer.enabled = True


def choose_ranges(model: nn.Module, images: Tensor, layout: Layout) -> None:
    """Choose the ranges of all layers of a simulated model at once, from its float activations.

    Args:
        model: As `simulate` leaves it; LayerNorms are reparametrised, no layer is switched on.
        images: (N, 3, H, W), normalised.
        layout: The model's units and the LayerNorms that feed them.
    """
    layers = [m for m in model.modules() if isinstance(m, SimulatedLayer)]
    feeds = [
        f
        for unit in layout.units
        for f in feeds_within(model, unit, layout.norms, kind=SimulatedLinear)
    ]
    _choose_ranges(layers, model, images, {}, feeds)
    for layer in layers:
        layer.enabled = False


def feeds_within(
    model: nn.Module, unit: str, norms: Sequence[tuple[str, str]], *, kind: type[Layer]
) -> list[tuple[nn.LayerNorm, Layer]]:
    """The pairs of one unit, as modules; layers that stay in float are left out.

    Args:
        model: A simulated model.
        unit: Name of the unit.
        norms: Names of a LayerNorm and of the linear layer it feeds.
        kind: The class of its simulated linear layers.
    """
    found = []
    for norm_name, linear_name in norms:
        if norm_name.startswith(f"{unit}."):
            norm, linear = model.get_submodule(norm_name), model.get_submodule(linear_name)
            if isinstance(norm, nn.LayerNorm) and isinstance(linear, kind):
                found.append((norm, linear))
    return found


def _train(
    unit: nn.Module,
    layers: Sequence[SimulatedLayer],
    trained: Sequence[nn.Parameter],
    x: Tensor,
    kwargs: Mapping[str, Any],
    target: Tensor,
    config: ReconstructionConfig,
) -> None:
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    with dropping(layers, config.drop, seed=config.seed, device=x.device):
        for step in range(config.steps):
            rate = 0.5 * config.learning_rate * (1.0 + math.cos(math.pi * step / config.steps))
            optimizer.param_groups[0]["lr"] = rate
            chosen = torch.randperm(len(x), generator=generator)[: config.batch_size].to(x.device)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=config.bfloat16):
                output = unit(x[chosen], **kwargs)
            loss = (output.float() - target[chosen]).square().flatten(1).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter in trained:
        parameter.requires_grad_(False)


def reconstruct(
    model: nn.Module,
    reference: nn.Module,
    images: Tensor,
    units: Sequence[str],
    *,
    config: ReconstructionConfig,
    norms: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
) -> list[UnitRecord]:
    """Quantize a simulated model unit by unit, in forward order.

    Args:
        model: The simulated model, as `simulate` leaves it; changed in place.
        reference: The float model.
        images: Calibration images, (N, 3, H, W), normalised.
        units: Names of the units in forward order.
        config: Settings.
        norms: Pairs of a LayerNorm and the linear layer it feeds, to be reparametrised.
        progress: Told about every unit.

    Returns:
        One record per unit that holds a quantized layer.
    """
    records: list[UnitRecord] = []
    model.requires_grad_(False)
    calls = unit_calls(model, units, images[: config.batch_size])
    stream, target = (
        Stream(network, images, calls, batch_size=config.batch_size)
        for network in (model, reference)
    )
    for index, name in enumerate(units):
        layers = [m for m in model.get_submodule(name).modules() if isinstance(m, SimulatedLayer)]
        if layers:
            feeds = feeds_within(model, name, norms, kind=SimulatedLinear)
            records.append(_reconstruct_unit(name, layers, feeds, stream, target, config))
        else:
            stream.leave(None)
            target.leave(None)
        if progress is not None:
            progress("reconstruct", index + 1, len(units), name)
    return records


def _reconstruct_unit(
    name: str,
    layers: Sequence[SimulatedLayer],
    feeds: Sequence[tuple[nn.LayerNorm, SimulatedLinear]],
    stream: Stream,
    target: Stream,
    config: ReconstructionConfig,
) -> UnitRecord:
    """Choose the ranges of one unit, train it, and let all images through."""
    unit, kwargs = stream.model.get_submodule(name), stream.calls[name].kwargs
    x = stream.enter(name)
    wanted = target.apply(name, target.enter(name))
    _choose_ranges(layers, unit, x[:RANGE_IMAGES], kwargs, feeds)
    output = stream.apply(name, x)
    before = after = _relative_error(output, wanted)
    parameters = [p for m in layers if isinstance(m, SimulatedLinear) for p in m.parameters()]
    untrained = [parameter.detach().clone() for parameter in parameters]
    if parameters and config.steps:
        _train(unit, layers, parameters, x, kwargs, wanted, config)
        trained = stream.apply(name, x)
        after = _relative_error(trained, wanted)
        if after <= before:
            output = trained
        else:
            after = before
            with torch.no_grad():
                for parameter, value in zip(parameters, untrained, strict=True):
                    parameter.copy_(value)
    stream.leave(output)
    target.leave(wanted)
    return UnitRecord(name, before, after)
