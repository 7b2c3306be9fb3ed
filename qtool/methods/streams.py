"""The tensors that enter a model's units, one unit after the other, without starting over.

Where a unit's input is the output of the unit before, as in a row of transformer blocks, it is kept
and passed on; elsewhere the model is run from the start and stopped at the unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtool.quant import widths
from qtool.quant.bits import BitSpec


@dataclass(frozen=True)
class UnitCall:
    """How a model calls one of its units.

    Attributes:
        chained: Whether the input is the output of the unit before, as it is.
        kwargs: Arguments beside the input; the same for every batch.
    """

    chained: bool
    kwargs: Mapping[str, Any]


class _Reached(Exception):  # noqa: N818 - a way out, not an error
    """Raised to leave a forward pass once the wanted tensor is in hand."""


@contextmanager
def _stopping_at(unit: nn.Module, caught: list[Tensor]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    handle = unit.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def unit_calls(model: nn.Module, units: Sequence[str], images: Tensor) -> dict[str, UnitCall]:
    """Run a few images and see how every unit is called.

    Args:
        model: The model.
        units: Names of its units in forward order.
        images: (B, 3, H, W).
    """
    calls: dict[str, UnitCall] = {}
    last: list[tuple[Any, int]] = [(None, 0)]
    handles = []
    for name in units:

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
        ) -> None:
            output, version = last[0]
            untouched = args[0] is output and args[0]._version == version
            calls.setdefault(name, UnitCall(untouched, dict(kwargs)))

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
            last[0] = (output, output._version if isinstance(output, Tensor) else 0)

        unit = model.get_submodule(name)
        handles.append(unit.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(unit.register_forward_hook(after))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if absent := [name for name in units if name not in calls]:
        raise AssertionError(f"{absent[0]} takes no part in the model's forward pass")
    return calls


class Stream:
    """One run of all images through a model, unit by unit, at one width.

    Args:
        model: The model; it may change between units, behind what has passed.
        images: (N, 3, H, W), normalised.
        calls: What `unit_calls` found.
        spec: The width to run at; None leaves the model as it is.
        batch_size: Images computed together.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        calls: Mapping[str, UnitCall],
        *,
        spec: BitSpec | None = None,
        batch_size: int = 8,
    ) -> None:
        self.model = model
        self.images = images
        self.calls = calls
        self.spec = spec
        self.batch_size = batch_size
        self._next: Tensor | None = None

    def running(self) -> AbstractContextManager[None]:
        """A context in which the model runs at the width of the stream."""
        return nullcontext() if self.spec is None else widths.bits(str(self.spec))

    @torch.no_grad()
    def enter(self, name: str) -> Tensor:
        """The inputs of a unit for all images."""
        if self._next is not None and self.calls[name].chained:
            return self._next
        caught: list[Tensor] = []
        with _stopping_at(self.model.get_submodule(name), caught), self.running():
            for batch in self.images.split(self.batch_size):
                with suppress(_Reached):
                    self.model(batch)
        return torch.cat(caught)

    @torch.no_grad()
    def apply(self, name: str, x: Tensor) -> Tensor:
        """The outputs of a unit for these inputs, which the next unit may take over."""
        unit, kwargs = self.model.get_submodule(name), self.calls[name].kwargs
        with self.running():
            outputs = [unit(batch, **kwargs) for batch in x.split(self.batch_size)]
        return torch.cat(outputs)

    def leave(self, output: Tensor | None) -> None:
        """Hand an output on to the next unit; None where a unit was left out."""
        self._next = output
