"""Mixed precision of `qtool quantize`: bits per layer from measured sensitivity and a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qtool.errors import Progress
from qtool.methods.spdfq.sensitivity import layer_losses, multiply_adds
from qtool.models import vision
from qtool.quant.allocation import allocate, mean_bits
from qtool.quant.bits import WEIGHT_BITS, BitSpec
from qtool.quant.plan import LayerPlan, kept_bits, plan_layers
from qtool.settings.quantize import QuantizeSettings

Rules = tuple[tuple[str, BitSpec], ...]


@dataclass(frozen=True)
class Precision:
    """The plans of all layers and how they came about.

    Attributes:
        plans: By module name.
        losses: Per layer, the divergence that its rounding alone is estimated to cause before any
            training.
        summary: What is worth saying about the choice.
    """

    plans: dict[str, LayerPlan]
    losses: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


def uniform_plans(
    settings: QuantizeSettings,
    model: nn.Module,
    *,
    bits: BitSpec | None = None,
    rules: Rules = (),
) -> dict[str, LayerPlan]:
    """Plans with the same bits everywhere, but for `rules` and then the user's own.

    Raises:
        UsageError: A rule matches no layer.
    """
    layout = vision.layout(model)
    return plan_layers(
        model,
        attentions=[site.name for site in layout.attentions],
        bits=bits or settings.bit_spec,
        batch_norms=dict(layout.batch_norms),
        keep=(*rules, *settings.kept),
        skip=settings.skip,
        quantizer="table" if settings.recipe == "strong" else "uniform",
    )


def choose(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    pixels: Tensor,
    *,
    progress: Progress | None,
) -> Precision:
    """The plans that the settings ask for; of `mixed:AVG`, those with the least estimated loss.

    Args:
        settings: Bits, budget and rules. Layers with a rule of their own keep its bits, and count
            towards the mean.
        opened: The float model.
        pixels: Calibration images, (N, 3, H, W), normalised.
        progress: Told about every width that is judged.

    Raises:
        UsageError: No choice keeps the mean.
    """
    plans = uniform_plans(settings, opened.model)
    layout, average = vision.layout(opened.model), settings.average_bits
    if average is None:
        width = settings.bit_spec.weight
        own = layer_losses(opened.model, layout, lambda _: plans, pixels, widths=(width,))
        return Precision(plans, {name: losses[width] for name, losses in own.items()})
    losses = layer_losses(
        opened.model,
        layout,
        lambda bits: uniform_plans(settings, opened.model, bits=BitSpec(bits, bits)),
        pixels,
        widths=WEIGHT_BITS,
        seed=settings.seed,
        progress=progress,
    )
    sizes = _sizes(settings, opened, plans, pixels)
    fixed = {name: kept_bits(name, settings.kept) for name in plans}
    options = {
        name: {spec.weight: 0.0} if (spec := fixed[name]) else losses[name] for name in plans
    }
    chosen = allocate(options, sizes, average=average)
    rules = tuple((name, BitSpec(bits, bits)) for name, bits in chosen.items() if not fixed[name])
    return Precision(
        uniform_plans(settings, opened.model, rules=rules),
        {name: losses[name][bits] for name, bits in chosen.items() if bits in losses[name]},
        {
            "mean_bits": round(mean_bits(chosen, sizes), 3),
            "budget": settings.budget,
            "layers_per_width": {
                str(bits): list(chosen.values()).count(bits) for bits in sorted({*chosen.values()})
            },
        },
    )


def _sizes(
    settings: QuantizeSettings,
    opened: vision.OpenedModel,
    plans: Mapping[str, LayerPlan],
    pixels: Tensor,
) -> dict[str, int]:
    """What one bit costs in each layer.

    Attention's products hold no weights: their share of the multiply-adds counts as weights would,
    so that the budget binds them too.
    """
    products = multiply_adds(opened.model, plans, pixels[:1])
    if settings.budget == "macs":
        return products
    weights = {
        name: opened.model.get_submodule(name).get_parameter("weight").numel()
        for name, plan in plans.items()
        if plan.kind != "attention"
    }
    per_product = sum(weights.values()) / max(1, sum(products[name] for name in weights))
    return {name: weights.get(name, round(per_product * count)) for name, count in products.items()}
