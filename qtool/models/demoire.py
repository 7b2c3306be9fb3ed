"""The demoire networks qtool knows by name. Nothing here imports torch until one is built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qtool.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

BUNDLED = "demoire_bandgate.safetensors"
"""File below `assets/` with the weights that are used when none are named."""


@dataclass(frozen=True, kw_only=True)
class DemoireSpec:
    """A demoire network: what builds it, and what a caller must know before running it.

    Attributes:
        name: What people call it.
        builder: Module and class, "qtool.models.esdnet:ESDNet".
        arguments: Keyword arguments of the class.
        size_multiple: What height and width of its input must be multiples of.
        residual: Whether it predicts what to add to its input.
        scales: For each output, in order, by how much it is smaller than the input.
        parameters: Number of parameters in millions.
        bytes_per_pixel: Memory that a pixel of input takes at the peak, float32 on the CPU.
        cpu_tile: Side of the tiles that a CPU is fastest with, whose caches hold them; 0 for
            networks that see better when they see all of a picture.
        sees: Globs of the layers that look at the picture itself.
        writes: Globs of the layers whose output becomes the picture, or gates it.
        paper: Where it was published.
        bundled: File name below `assets/`, or "" when the user brings the weights.
    """

    name: str
    builder: str
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    size_multiple: int
    residual: bool
    scales: tuple[int, ...]
    parameters: float
    bytes_per_pixel: int
    cpu_tile: int = 0
    sees: tuple[str, ...]
    writes: tuple[str, ...]
    paper: str
    bundled: str = ""

    @property
    def result(self) -> int:
        """Index of the output that has the size of the input."""
        return self.scales.index(1)


_ESDNET = "Yu et al. 2022, arXiv:2207.09935"
_FINE_FIRST = (1, 2, 4)

NETWORKS: tuple[DemoireSpec, ...] = (
    DemoireSpec(
        name="bandgate",
        builder="qtool.models.bandgate:BandGate",
        arguments=MappingProxyType({"octaves": 5, "width": 32}),
        size_multiple=32,
        residual=True,
        scales=(1,),
        parameters=0.119,
        bytes_per_pixel=600,
        cpu_tile=512,
        sees=("looks.*.first",),
        writes=("gates.*",),
        paper="qtool",
        bundled=BUNDLED,
    ),
    DemoireSpec(
        name="esdnet_s",
        builder="qtool.models.esdnet:ESDNet",
        arguments=MappingProxyType(
            {
                "encoder_width": 24,
                "decoder_width": 24,
                "growth": 16,
                "sam_blocks": 1,
                "unshuffle": 4,
                "residual": True,
            }
        ),
        size_multiple=64,
        residual=True,
        scales=_FINE_FIRST,
        parameters=1.44,
        bytes_per_pixel=220,
        sees=("encoder.conv_first.*",),
        writes=("decoder.decoder_?.conv.*",),
        paper=f"{_ESDNET} (building blocks)",
    ),
    DemoireSpec(
        name="esdnet",
        builder="qtool.models.esdnet:ESDNet",
        size_multiple=32,
        residual=False,
        scales=_FINE_FIRST,
        parameters=5.93,
        bytes_per_pixel=1200,
        sees=("encoder.conv_first.*",),
        writes=("decoder.decoder_?.conv.*",),
        paper=_ESDNET,
    ),
    DemoireSpec(
        name="esdnet_l",
        builder="qtool.models.esdnet:ESDNet",
        arguments=MappingProxyType({"sam_blocks": 2}),
        size_multiple=32,
        residual=False,
        scales=_FINE_FIRST,
        parameters=10.62,
        bytes_per_pixel=1200,
        sees=("encoder.conv_first.*",),
        writes=("decoder.decoder_?.conv.*",),
        paper=_ESDNET,
    ),
    DemoireSpec(
        name="mbcnn",
        builder="qtool.models.mbcnn:MBCNN",
        size_multiple=32,
        residual=False,
        scales=(4, 2, 1),
        parameters=14.19,
        bytes_per_pixel=1400,
        sees=("conv_func1.*",),
        writes=("conv[123].*",),
        paper="Zheng et al. 2020, arXiv:2004.00406",
    ),
)


def find(name: str) -> DemoireSpec:
    """Return the network called `name`.

    Raises:
        UsageError: There is none.
    """
    for spec in NETWORKS:
        if spec.name == name:
            return spec
    raise UsageError(
        f"there is no demoire network {name!r}",
        remedy=f"choose {', '.join(spec.name for spec in NETWORKS)}",
    )


def build(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a network with untrained weights.

    Args:
        name: Its name.
        arguments: Keyword arguments that replace those of the registry.

    Raises:
        UsageError: There is no such network, or it takes no such arguments.
    """
    spec = find(name)
    module, _, kind = spec.builder.partition(":")
    try:
        built: nn.Module = getattr(importlib.import_module(module), kind)(
            **{**spec.arguments, **(arguments or {})}
        )
    except TypeError as error:
        raise UsageError(f"{name} cannot be built: {error}") from error
    return built
