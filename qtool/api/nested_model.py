"""Switchable checkpoints into models: the part of `qtool.load` that the engine `nested` needs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.io import checkpoint, nested_tensors
from qtool.quant.attention import ATTENTION_CLASSES
from qtool.quant.bits import BitSpec
from qtool.quant.convolution import without_norm
from qtool.quant.layers import Geometry
from qtool.quant.nested_layers import NestedConv2d, NestedLinear, NestedProducts
from qtool.quant.nested_storage import fill
from qtool.quant.plan import Quantizer, replace_module
from qtool.quant.switchable import Switchable, make_switchable
from qtool.quant.widths import Offer, Request


def install(
    model: nn.Module,
    header: checkpoint.Header,
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str],
) -> dict[str, Tensor]:
    """Put switchable layers into a float model built on the meta device.

    Args:
        model: The float model; changed in place.
        header: The header of a file with the engine `nested`.
        tensors: The file's tensors, of all planes that are there.
        kinds: Kind of attention by the name of its module.

    Returns:
        The model's state, to be loaded by assignment.

    Raises:
        ValueError: The tensors do not fit the model.
    """
    state = dict(tensors)
    for name, layer in header.layers.items():
        source = model.get_submodule(name)
        place = f"{name}.products" if layer.kind == "attention" else name
        own = {
            leaf: state.pop(f"{place}.{leaf}")
            for leaf in ("d2", "p1", "p2", "p3", "p4", "alpha", "delta", "act", "act_table")
            if f"{place}.{leaf}" in state
        }
        module = _module(source, name, layer, header, planes=_planes(own))
        if layer.kind == "attention":
            replace_module(model, name, ATTENTION_CLASSES[kinds[name]](source, module))
        else:
            replace_module(model, name, module)
        if norm := str(layer.options.get("norm") or ""):
            replace_module(model, norm, without_norm(model.get_submodule(norm)))
        state |= {f"{place}.{leaf}": tensor for leaf, tensor in fill(module, own).items()}
    return state


def _planes(own: Mapping[str, Tensor]) -> int:
    return sum(nested_tensors.plane_of(leaf) > 0 for leaf in own)


def _module(
    source: nn.Module,
    name: str,
    layer: checkpoint.LayerBits,
    header: checkpoint.Header,
    *,
    planes: int,
) -> nn.Module:
    widths = header.nested
    if widths is None:
        raise ValueError("the header has no nested widths")
    quantizer: Quantizer = "table" if layer.options.get("quantizer") == "table" else "uniform"
    active = BitSpec(layer.weight_bits or max(widths.weight_bits), layer.input_bits or 8)
    activation = tuple(widths.activation_bits)
    if layer.kind == "attention":
        return NestedProducts(
            name=name,
            offer=Offer((), activation),
            active=active,
            quantizer=quantizer,
            device="meta",
        )
    kind = NestedConv2d if layer.kind == "conv" else NestedLinear
    own = tuple(checkpoint.activation_widths(layer, widths))
    module = kind(
        tuple(source.get_parameter("weight").shape),
        name=name,
        offer=Offer(tuple(widths.weight_bits), own, planes=planes, dedicated=widths.dedicated_2bit),
        active=active,
        table=quantizer == "table",
        pinned=bool(layer.options.get("pinned")),
        device="meta",
    )
    if isinstance(module, NestedConv2d):
        if not isinstance(source, nn.Conv2d):
            raise TypeError(f"{name} is no convolution")
        module.geometry = Geometry.of(source)
    return module


def choose_bits(
    model: nn.Module, header: checkpoint.Header, request: Request | None, *, path: str
) -> nn.Module:
    """Make a loaded model switchable and set the widths it starts at.

    Args:
        model: The model, as restored.
        header: Its header.
        request: Widths, or None for those of the file.
        path: The file, for messages.

    Raises:
        UsageError: The file lacks one of the widths.
    """
    switchable = make_switchable(model)
    if not isinstance(switchable, Switchable):
        raise AssertionError("the model was just made switchable")
    if request is None and header.engine == "branches":
        request = header.active_bits
    elif request is None:
        request = {
            name: f"w{layer.weight_bits}a{layer.input_bits}"
            for name, layer in header.layers.items()
            if layer.weight_bits
        }
    try:
        switchable.set_bits(request)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", remedy=error.remedy) from error
    return model
