"""A model whose layers have several widths, and the three ways to choose among them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec
from qtool.quant.widths import Choice, Request, SwitchableLayer, bits

MIXED = "mixed"
"""What `active_bits` says where layers run at different widths."""


class Switchable:
    """Mixed into the class of a model: `set_bits`, and the argument `bits` of a call."""

    def set_bits(self, request: Request) -> None:
        """Choose the widths the model runs at from now on; nothing is copied or quantized again.

        Args:
            request: A width such as 4 or "w4a4" for all layers that are not pinned, or a mapping of
                globs over layer names to widths, of which the last match wins; layers that no glob
                matches stay as they are.

        Raises:
            UsageError: A layer lacks the width, or a glob matches none; nothing is changed.
        """
        layers = layers_of(self)
        if isinstance(request, Mapping):
            for glob in request:
                if not any(fnmatchcase(name, glob) for name in layers):
                    raise UsageError(
                        f"no layer matches {glob!r}",
                        remedy=f"layers are named like {', '.join(list(layers)[:4])}",
                    )
        choice = Choice.of(request)
        fitting = {}
        for name, layer in layers.items():
            asked = choice.width(name, pinned=layer.pinned)
            if asked is not None:
                fitting[name] = layer.offer.fit(name, asked)
        for name, spec in fitting.items():
            layers[name].active = spec

    @property
    def layer_bits(self) -> dict[str, BitSpec]:
        """The active width of every switchable layer, by name."""
        return {name: layer.active for name, layer in layers_of(self).items()}

    @property
    def active_bits(self) -> str:
        """The width of all layers that are not pinned, for example "w4a8", or "mixed"."""
        return common_width(layers_of(self))

    def forward(self, *args: Any, bits: Request | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        """The model's own forward pass, at the widths of `bits` for this call alone."""
        with nullcontext() if bits is None else _bits(bits):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


_bits = bits  # the argument of `forward` has the same name


def make_switchable(model: nn.Module) -> nn.Module:
    """Give a model with switchable layers the methods of `Switchable`, in place."""
    if not isinstance(model, Switchable):
        model.__class__ = _with_switch(type(model))
    return model


def layers_of(model: object) -> dict[str, SwitchableLayer]:
    """The layers of a model that have several widths, by the name they go by."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return {module.name: module for module in modules if isinstance(module, SwitchableLayer)}


def common_width(layers: Mapping[str, SwitchableLayer]) -> str:
    """The width that all layers which are not pinned run at, or "mixed"."""
    free = [layer for layer in layers.values() if not layer.pinned]
    weights = {layer.active.weight for layer in free if layer.offer.weight}
    activations = {layer.active.activation for layer in free if len(layer.offer.activation) > 1}
    if len(weights) != 1 or len(activations) != 1:
        return MIXED
    return str(BitSpec(weights.pop(), activations.pop()))


_classes: dict[type, type] = {}


def _with_switch(kind: type) -> type:
    if kind not in _classes:
        name, body = f"Switchable{kind.__name__}", {"__module__": kind.__module__}
        _classes[kind] = type(name, (Switchable, kind), body)
    return _classes[kind]
