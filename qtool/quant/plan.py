"""Which layers of a model are quantized and to how many bits, decided before any pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec
from qtool.quant.tables import GRID_BITS

LayerKind = Literal["linear", "conv", "attention"]
Quantizer = Literal["uniform", "table"]

FIRST_INPUT_BITS = 8
"""The first layer sees the picture, which is 8-bit already (RepQ-ViT, AdaLog)."""

LOG2_MAX_BITS = 6
"""Beyond this width a log2 code gains nothing: its steps stay a factor of 2 apart."""


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized.

    Attributes:
        kind: "linear", "conv" or "attention" (its two products).
        weight_bits: Bits of a weight code; 0 for attention, which has no weights of its own.
        input_bits: Bits of an activation code.
        quantizer: How activations are quantized: "uniform" or "table".
        probabilities: For attention, the quantizer after softmax: "log2", "uniform" or "table".
        norm: For a convolution, the BatchNorm that is folded into it, "" for none.
    """

    kind: LayerKind
    weight_bits: int
    input_bits: int
    quantizer: Quantizer = "uniform"
    probabilities: str = ""
    norm: str = ""

    def options(self) -> dict[str, str | int | float | bool | None]:
        """What a checkpoint records beside kind and bits, to make the layer again."""
        options: dict[str, str | int | float | bool | None] = {"quantizer": self.quantizer}
        if self.kind == "attention":
            options["probabilities"] = self.probabilities
        if self.norm:
            options["norm"] = self.norm
        return options


def is_convolution(module: nn.Module) -> bool:
    """Tell whether a module convolves pictures with fixed zeros around them, and nothing else."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and module.padding != "same"


def plan_layers(
    model: nn.Module,
    *,
    attentions: Iterable[str],
    bits: BitSpec,
    batch_norms: Mapping[str, str] | None = None,
    keep: Sequence[tuple[str, BitSpec]] = (),
    skip: Sequence[str] = (),
    quantizer: Quantizer = "uniform",
) -> dict[str, LayerPlan]:
    """Decide the bits of every linear layer, convolution and attention product.

    Args:
        model: The float model.
        attentions: Names of its attention modules.
        bits: Width for everything not named in `keep`.
        batch_norms: BatchNorms that can be folded, by the convolution before them.
        keep: Pairs of glob and bits; the last match wins.
        skip: Globs of layers that stay in float.
        quantizer: How activations of fewer than 8 bits are quantized.

    Returns:
        Plans by module name, in the order of `model.named_modules()`.

    Raises:
        UsageError: A glob matches no layer, or nothing is left to quantize.
    """
    sites = set(attentions)
    names: dict[str, LayerKind] = {}
    for name, module in model.named_modules():
        if name in sites:
            names[name] = "attention"
        elif isinstance(module, nn.Linear):
            names[name] = "linear"
        elif is_convolution(module):
            names[name] = "conv"
    first = next((name for name, kind in names.items() if kind == "conv"), "")
    norms = batch_norms or {}
    for glob in [*skip, *(glob for glob, _ in keep)]:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(
                f"no layer matches {glob!r}",
                remedy=f"layers are named like {', '.join(list(names)[:4])}",
            )
    plans = {
        name: _layer_plan(
            kind,
            kept_bits(name, keep) or bits,
            quantizer,
            sees_picture=name == first,
            norm=norms.get(name, ""),
        )
        for name, kind in names.items()
        if not any(fnmatchcase(name, glob) for glob in skip)
    }
    if not plans:
        raise UsageError("every layer is skipped", remedy="give --skip fewer layers")
    return plans


def kept_bits(name: str, keep: Sequence[tuple[str, BitSpec]]) -> BitSpec | None:
    """The bits of the last rule that matches a layer, or None."""
    return next((kept for glob, kept in reversed(keep) if fnmatchcase(name, glob)), None)


def products_quantizers(activation_bits: int, quantizer: Quantizer) -> tuple[Quantizer, str]:
    """How the operands of attention are quantized at a width.

    Args:
        activation_bits: Bits of all four operands.
        quantizer: How activations of fewer than 8 bits are quantized.

    Returns:
        The quantizer of queries, keys and values, and the one of probabilities.
    """
    if quantizer == "table" and activation_bits < GRID_BITS:
        return "table", "table"
    return "uniform", "log2" if activation_bits <= LOG2_MAX_BITS else "uniform"


def _layer_plan(
    kind: LayerKind, bits: BitSpec, quantizer: Quantizer, *, sees_picture: bool, norm: str
) -> LayerPlan:
    width = FIRST_INPUT_BITS if sees_picture else bits.activation
    if width >= GRID_BITS:
        quantizer = "uniform"
    if kind != "attention":
        return LayerPlan(kind, bits.weight, width, quantizer, norm=norm)
    operands, probabilities = products_quantizers(width, quantizer)
    return LayerPlan(kind, 0, width, operands, probabilities)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def weight_parameters(model: nn.Module, plans: Mapping[str, LayerPlan]) -> int:
    """Number of weights in the planned layers of the float model."""
    total = 0
    for name, plan in plans.items():
        if plan.kind != "attention":
            weight = model.get_submodule(name).weight
            total += weight.numel() if isinstance(weight, nn.Parameter) else 0
    return total
