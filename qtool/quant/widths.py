"""Which of its bit-widths a switchable layer runs at: for good, for a block of code, for a call.

A layer has an active width that belongs to the model. `bits` overrides it for the current thread or
task, by a context variable, so that two threads can run one model at two widths at once. Nothing is
copied and nothing is quantized again: a width is an index into rows of scales and a shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec, parse_width

Request = int | str | Mapping[str, int | str]
"""A width for all layers, or widths by glob over layer names; see `bits.parse_width`."""

DEDICATED_BITS = 2
"""The width that may have codes of its own, for it loses most by sharing those of 8 bits."""

_EVERY = ""


@dataclass(frozen=True)
class Choice:
    """Widths by glob, the last match wins; the glob "" is every layer that is not pinned.

    Attributes:
        rules: Pairs of glob and width.
    """

    rules: tuple[tuple[str, BitSpec], ...]
    _found: dict[tuple[str, bool], BitSpec | None] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, request: Request) -> Choice:
        """Read a request.

        Raises:
            UsageError: It is no width, or not a mapping of globs to widths.
        """
        if isinstance(request, Mapping):
            return cls(tuple((str(glob), parse_width(width)) for glob, width in request.items()))
        return cls(((_EVERY, parse_width(request)),))

    def after(self, earlier: Choice | None) -> Choice:
        """This choice where it says something, else the earlier one."""
        return self if earlier is None else Choice((*earlier.rules, *self.rules))

    def width(self, name: str, *, pinned: bool) -> BitSpec | None:
        """The width of a layer, None where no rule speaks of it."""
        key = (name, pinned)
        if key not in self._found:
            matches = [
                spec
                for glob, spec in self.rules
                if (not pinned if glob == _EVERY else fnmatchcase(name, glob))
            ]
            self._found[key] = matches[-1] if matches else None
        return self._found[key]


_chosen: ContextVar[Choice | None] = ContextVar("qtool_bits", default=None)


@contextmanager
def bits(request: Request) -> Iterator[None]:
    """Run switchable models at other widths inside a `with` block, in this thread or task only.

    Args:
        request: A width such as 4 (weights; activations stay at 8 bits) or "w4a4", or a mapping
            such as {"blocks.0.*": 8, "*.mlp.fc1": 4}. Blocks nest; the inner one has the last word.

    Raises:
        UsageError: The request is no width.
    """
    token = _chosen.set(Choice.of(request).after(_chosen.get()))
    try:
        yield
    finally:
        _chosen.reset(token)


@dataclass(frozen=True)
class Offer:
    """The widths a layer has.

    Attributes:
        weight: Bits of weights that there are scales for, rising; empty for attention's products.
        activation: Bits of activations, rising.
        planes: Number of 2-bit planes of weights that are there; widths beyond them are not.
        tied: Weights and activations have one width together, as in a network of branches.
        dedicated: Weights of 2 bits have codes of their own, and need no planes.
    """

    weight: tuple[int, ...]
    activation: tuple[int, ...]
    planes: int = 4
    tied: bool = False
    dedicated: bool = False

    @property
    def present(self) -> tuple[int, ...]:
        """The weight bits that the planes reach."""
        reached = max(2 * self.planes, DEDICATED_BITS if self.dedicated else 0)
        return tuple(bits for bits in self.weight if bits <= reached)

    def has_own_codes(self, bits: int) -> bool:
        """Whether weights of this width have codes of their own."""
        return self.dedicated and bits == DEDICATED_BITS

    @property
    def nested(self) -> tuple[int, ...]:
        """The weight bits that are leading bits of the 8-bit codes."""
        return tuple(bits for bits in self.weight if not self.has_own_codes(bits))

    def fit(self, name: str, spec: BitSpec) -> BitSpec:
        """The width a layer runs at when `spec` is asked for.

        A layer whose input has one width only, as the first one has, keeps it. Where widths are
        tied, N alone, which elsewhere leaves activations at 8 bits, means wNaN.

        Raises:
            UsageError: The layer lacks the width.
        """
        if self.tied:
            return self._fit_tied(name, spec)
        if len(self.activation) == 1:
            spec = BitSpec(spec.weight, self.activation[0])
        if self.weight and spec.weight not in self.present:
            beyond = spec.weight in self.weight
            last = f"plane p{self.planes}" if self.planes else "those of 2 bits"
            reason = f", its weights end after {last}" if beyond else ""
            raise UsageError(
                f"layer {name} cannot run at {spec}{reason}",
                remedy=f"its weights have {', '.join(map(str, self.present))} bits",
            )
        if spec.activation not in self.activation:
            raise UsageError(
                f"layer {name} cannot run at {spec}",
                remedy=f"its activations have {', '.join(map(str, self.activation))} bits",
            )
        return spec

    def _fit_tied(self, name: str, spec: BitSpec) -> BitSpec:
        if spec.activation == parse_width(spec.weight).activation:
            spec = BitSpec(spec.weight, spec.weight)
        if spec.activation != spec.weight or spec.weight not in self.weight:
            raise UsageError(
                f"{name} cannot run at {spec}",
                remedy=f"it has {', '.join(f'w{bits}a{bits}' for bits in self.weight)}",
            )
        return spec


class SwitchableLayer:
    """What layers with several widths share.

    Attributes:
        name: The layer's path in its model.
        offer: The widths it has.
        active: The width it runs at unless `bits` says otherwise.
        pinned: Only a glob that names the layer changes its width.
    """

    name: str
    offer: Offer
    active: BitSpec
    pinned: bool

    def width(self) -> BitSpec:
        """The width to run at now.

        Raises:
            UsageError: The layer lacks the width that was asked for.
        """
        choice = _chosen.get()
        asked = None if choice is None else choice.width(self.name, pinned=self.pinned)
        return self.active if asked is None else self.offer.fit(self.name, asked)
