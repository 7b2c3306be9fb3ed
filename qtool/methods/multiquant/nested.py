"""One code for every width: choose it block by block, for all widths together.

Every width has a stream of its own through the part of the model that is already quantized. A block
is coded once: ranges by the errors of all widths, scales and biases per width. Then its weights are
moved, and with them their codes, so that the block's output comes nearer to the float one at low
and high widths at once: crossing an interval of 4 bits moves an 8-bit value by one of its own
steps only, so low widths can be rounded with care at little cost to the others.

Reference: the multi-bit objective for ranges and the steps of calibration follow section 4.4 of
this project's notes on MultiQuant (arXiv 2305.08117); moving weights through straight-through
rounding is the block reconstruction of SPDFQ (arXiv 2412.16553), over several widths as in MatQuant
(arXiv 2502.06786); activations left unrounded in training are QDrop's (arXiv 2203.05740).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qtool.errors import Progress
from qtool.methods.spdfq.reconstruction import feeds_within
from qtool.methods.streams import Stream, unit_calls
from qtool.models.vision import AttentionSite
from qtool.quant.attention import ATTENTION_CLASSES
from qtool.quant.bits import BitSpec
from qtool.quant.nested_simulation import SimulatedNested, SimulatedNestedProducts
from qtool.quant.plan import LayerPlan, Quantizer, replace_module
from qtool.quant.reparametrisation import fold_into_norm
from qtool.quant.simulation import dropping
from qtool.quant.widths import Offer

RANGE_IMAGES = 32
"""Images whose activations set the ranges of a block."""

FOLD_BITS = 4
"""Width for which channel ranges are evened, the middle of what is served; done once for all."""

USUAL_ACTIVATION = 8
"""Bits of activations that a width of weights runs with when nothing else is said."""

Layer = SimulatedNested | SimulatedNestedProducts


@dataclass(frozen=True)
class NestedConfig:
    """How a switchable model is calibrated.

    Attributes:
        steps: Optimiser steps per block; each takes one low and one high width.
        learning_rate: Peak step size of Adam for weights and biases; cosine decay to zero.
        scale_rate: The same for the logarithms of the scales.
        batch_size: Images per step.
        seed: Order of images and widths.
        drop: Share of activations left unrounded in a training step.
        first: The width whose codes are chosen freely, as near to it as the widths served allow; 0
            rounds to nearest.
        emphasis: Weight of that width (of the lowest if codes are rounded to nearest) in the choice
            of ranges; others weigh 1.
        favour: How many times as often as others that width is trained.
    """

    steps: int = 100
    learning_rate: float = 5e-5
    scale_rate: float = 1e-3
    batch_size: int = 8
    seed: int = 0
    drop: float = 0.5
    first: int = 4
    emphasis: float = 2.0
    favour: float = 3.0


@dataclass(frozen=True)
class NestedRecord:
    """What happened to one block.

    Attributes:
        name: The block.
        before: Squared output error relative to the output's power after choosing ranges, by width.
        after: The same after training.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]


def simulate(
    model: nn.Module,
    plans: Mapping[str, LayerPlan],
    sites: Sequence[AttentionSite],
    *,
    offer: Offer,
    quantizer: Quantizer,
    pinned: Sequence[str] = (),
    sees_picture: Sequence[str] = (),
) -> nn.Module:
    """Replace planned layers by switchable ones that calibrate, in place.

    Args:
        model: The float model; parameters keep their names.
        plans: Plans by module name, with the width a layer runs at.
        sites: Attention modules and their kinds.
        offer: The widths that every layer is to have.
        quantizer: How activations of fewer than 8 bits are quantized.
        pinned: Layers that keep their width unless they are named.
        sees_picture: Layers whose input is the picture, and has one width.

    Returns:
        The same model.
    """
    kinds = {site.name: site.kind for site in sites}
    for name, plan in plans.items():
        source = model.get_submodule(name)
        if plan.kind == "attention":
            products = SimulatedNestedProducts(
                plan, name=name, offer=Offer((), offer.activation), quantizer=quantizer
            ).to(next(source.parameters()).device)
            replace_module(model, name, ATTENTION_CLASSES[kinds[name]](source, products))
        elif isinstance(source, nn.Linear | nn.Conv2d):
            sees = name in sees_picture
            layer = SimulatedNested(
                source,
                plan,
                name=name,
                offer=replace(offer, activation=(plan.input_bits,)) if sees else offer,
                table=quantizer == "table" and not sees,
                pinned=name in pinned,
            )
            replace_module(model, name, layer)
    return model.eval()


def freeze(model: nn.Module) -> nn.Module:
    """Replace the layers that calibrate by integer ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Layer):
            replace_module(model, name, module.freeze())
    return model.requires_grad_(False)


def calibrate(
    model: nn.Module,
    reference: nn.Module,
    images: Tensor,
    units: Sequence[str],
    *,
    offer: Offer,
    config: NestedConfig,
    norms: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
) -> list[NestedRecord]:
    """Code a simulated model unit by unit, in forward order.

    Args:
        model: The simulated model, as `simulate` leaves it; changed in place.
        reference: The float model.
        images: Calibration images, (N, 3, H, W), normalised.
        units: Names of the units in forward order.
        offer: The widths it serves.
        config: Settings.
        norms: Pairs of a LayerNorm and the linear layer it feeds, to be reparametrised.
        progress: Told about every unit.

    Returns:
        One record per unit that holds a quantized layer.
    """
    model.requires_grad_(False)
    calls = unit_calls(reference, units, images[:1])
    batch = config.batch_size
    target = Stream(reference, images, calls, batch_size=batch)
    streams = [Stream(model, images, calls, spec=spec, batch_size=batch) for spec in _specs(offer)]
    records = []
    for index, name in enumerate(units):
        unit = model.get_submodule(name)
        layers = [
            m for m in unit.modules() if isinstance(m, SimulatedNested | SimulatedNestedProducts)
        ]
        if layers:
            feeds = feeds_within(model, name, norms, kind=SimulatedNested)
            records.append(_calibrate_unit(name, layers, feeds, streams, target, config))
        else:
            for stream in (target, *streams):
                stream.leave(None)
        if progress is not None:
            progress("calibrate", index + 1, len(units), name)
    return records


def _specs(offer: Offer) -> list[BitSpec]:
    """The widths that get a stream: weights alone narrow, and activations with them."""
    top = max(offer.activation)
    pairs = [(bits, width) for bits in reversed(offer.weight) for width in (top, bits)]
    return [BitSpec(*pair) for pair in dict.fromkeys(pairs) if pair[1] in offer.activation]


def _calibrate_unit(
    name: str,
    layers: Sequence[Layer],
    feeds: Sequence[tuple[nn.LayerNorm, SimulatedNested]],
    streams: Sequence[Stream],
    target: Stream,
    config: NestedConfig,
) -> NestedRecord:
    inputs = [stream.enter(name) for stream in streams]
    expected = target.apply(name, target.enter(name))
    _choose_ranges(name, layers, feeds, streams, inputs, config)
    outputs = [stream.apply(name, x) for stream, x in zip(streams, inputs, strict=True)]
    before = _errors(streams, outputs, expected)
    parameters = [p for m in layers if isinstance(m, SimulatedNested) for p in m.parameters()]
    untrained = [parameter.detach().clone() for parameter in parameters]
    _train(name, layers, streams, inputs, expected, before, config)
    trained = [stream.apply(name, x) for stream, x in zip(streams, inputs, strict=True)]
    after = _errors(streams, trained, expected)
    if _gain(before, after) >= 0.0:
        outputs = trained
    else:
        with torch.no_grad():
            for parameter, value in zip(parameters, untrained, strict=True):
                parameter.copy_(value)
        after = before
    for stream, output in zip(streams, outputs, strict=True):
        stream.leave(output)
    target.leave(expected)
    return NestedRecord(name, before, after)


def _gain(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Mean logarithm of the ratio of errors over the widths."""
    ratios = [math.log(max(before[k], 1e-20) / max(after[k], 1e-20)) for k in before]
    return sum(ratios) / len(ratios)


def _errors(
    streams: Sequence[Stream], outputs: Sequence[Tensor], expected: Tensor
) -> dict[str, float]:
    power = expected.square().sum().clamp_min(1e-12)
    return {
        str(stream.spec): float((output - expected).square().sum() / power)
        for stream, output in zip(streams, outputs, strict=True)
    }


def _observe(name: str, layers: Sequence[Layer], stream: Stream, x: Tensor) -> None:
    for layer in layers:
        layer.observing = True
    unit, kwargs = stream.model.get_submodule(name), stream.calls[name].kwargs
    with torch.no_grad():
        unit(x, **kwargs)
    for layer in layers:
        layer.observing = False


def _choose_ranges(
    name: str,
    layers: Sequence[Layer],
    feeds: Sequence[tuple[nn.LayerNorm, SimulatedNested]],
    streams: Sequence[Stream],
    inputs: Sequence[Tensor],
    config: NestedConfig,
) -> None:
    """Even channel ranges once, code the weights once, choose activations at every width."""
    top = inputs[0][:RANGE_IMAGES]
    if feeds:
        _observe(name, layers, streams[0], top)
        for norm, linear in feeds:
            fold_into_norm(
                norm,
                linear.weight,
                linear.float_bias,
                linear.seen["input"],
                weight_bits=FOLD_BITS,
                input_bits=FOLD_BITS,
            )
    _observe(name, layers, streams[0], top)
    for layer in layers:
        if isinstance(layer, SimulatedNested):
            free = _first(layer.offer.nested, config)
            emphasis = dict.fromkeys(layer.offer.weight, 1.0)
            emphasis[free or min(emphasis)] = config.emphasis
            layer.code_weights(emphasis, first=free)
    for bits in sorted({bits for layer in layers for bits in layer.offer.activation}):
        nearest = min(range(len(streams)), key=lambda index: _distance(streams[index].spec, bits))
        _observe(name, layers, streams[nearest], inputs[nearest][:RANGE_IMAGES])
        for layer in layers:
            if bits in layer.offer.activation:
                layer.choose_input(bits)
    for layer in layers:
        layer.seen = {}
        layer.enabled = True


def _first(weight: Sequence[int], config: NestedConfig) -> int | None:
    """The width among those served whose codes are chosen freely, None for no such width."""
    return max(min(config.first, max(weight)), min(weight)) if config.first else None


def _distance(spec: BitSpec | None, bits: int) -> tuple[int, int]:
    """How far a stream is from one with activations and weights of so many bits."""
    if spec is None:
        raise AssertionError("streams of a switchable model have a width")
    return abs(spec.activation - bits), abs(spec.weight - bits)


def _train(
    name: str,
    layers: Sequence[Layer],
    streams: Sequence[Stream],
    inputs: Sequence[Tensor],
    expected: Tensor,
    errors: Mapping[str, float],
    config: NestedConfig,
) -> None:
    linears = [layer for layer in layers if isinstance(layer, SimulatedNested)]
    if not linears or config.steps == 0:
        return
    gains = [layer.gain for layer in linears]
    others = [p for layer in linears for p in layer.parameters() if p is not layer.gain]
    for parameter in (*gains, *others):
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": others}, {"params": gains}])
    peaks = (config.learning_rate, config.scale_rate)
    device = expected.device
    generator = torch.Generator().manual_seed(config.seed)
    unit, kwargs = streams[0].model.get_submodule(name), streams[0].calls[name].kwargs
    power = float(expected.square().mean())
    groups = _halves(streams)
    first = _first(linears[0].offer.nested, config)
    often = torch.tensor([_how_often(stream.spec, first, config.favour) for stream in streams])
    with dropping(layers, config.drop, seed=config.seed, device=device):
        for step in range(config.steps):
            decay = 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * decay
            order = torch.randperm(len(expected), generator=generator)
            chosen = order[: config.batch_size].to(device)
            optimizer.zero_grad()
            for group_of_streams in groups:
                draw = torch.multinomial(often[group_of_streams], 1, generator=generator)
                number = group_of_streams[int(draw)]
                stream = streams[number]
                with stream.running():
                    output = unit(inputs[number][chosen], **kwargs)
                share = max(errors[str(stream.spec)], 1e-8) * power
                ((output - expected[chosen]).square().mean() / share).backward()
            optimizer.step()
    for parameter in (*gains, *others):
        parameter.requires_grad_(False)
        parameter.grad = None


def _how_often(spec: BitSpec | None, first: int | None, favour: float) -> float:
    """How often a stream is trained: activations of 8 bits twice, being the usual ones."""
    if spec is None:
        return 1.0
    usual = 2.0 if spec.activation >= USUAL_ACTIVATION else 1.0
    return usual * (favour if spec.weight == first else 1.0)


def _halves(streams: Sequence[Stream]) -> list[list[int]]:
    """Numbers of the streams of high and of low weight widths."""
    widths = sorted({stream.spec.weight for stream in streams if stream.spec is not None})
    low = set(widths[: (len(widths) + 1) // 2])
    numbers: dict[bool, list[int]] = {False: [], True: []}
    for index, stream in enumerate(streams):
        if stream.spec is not None:
            numbers[stream.spec.weight in low].append(index)
    return [group for group in numbers.values() if group]
