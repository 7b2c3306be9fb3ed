"""A classifier whose body exists several times, in branches of 2-bit weights.

Stem and head are shared and stay in float. At b bits some of the branches run on activations of
b bits, and the mean of their last feature maps goes to the head. Nothing is quantized again when
the width changes.

Reference: MBQuant, arXiv 2305.08117; decisions A1 to A14 of this project's notes.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.methods.multiquant.selection import (
    BRANCH_BITS,
    NarrowWidths,
    Selection,
    branch_count,
    narrow_widths,
    select,
)
from qtool.models.residual import Convolution, ResidualBlock, ResidualLayout
from qtool.quant.bits import BitSpec
from qtool.quant.branch_grid import Member, UnitPlan, dithered, initial_weight_scale
from qtool.quant.branch_simulation import SimulatedUnit
from qtool.quant.layers import Geometry
from qtool.quant.widths import Offer, SwitchableLayer

BODY = "body"
"""The name under which all branches are switched together."""


class Body(nn.Module):
    """One branch: (B, C, H, W) from the stem and a width to (B, C', H', W') for the head.

    Args:
        blocks: The blocks of the network.
        units: What computes each convolution with its BatchNorm, by the convolution's path.
    """

    def __init__(self, blocks: Sequence[ResidualBlock], units: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        self.units = nn.ModuleDict({_key(name): unit for name, unit in units.items()})

    def unit(self, name: str) -> nn.Module:
        """What computes a convolution."""
        return self.units[_key(name)]

    def forward(self, x: Tensor, width: int) -> Tensor:
        """Compute all blocks at a width."""
        for block in self.blocks:
            y = x
            for convolution in block.convolutions:
                # The ReLU between two of them is in how the second one quantizes what it reads.
                y = self.unit(convolution.name)(y, width)
            x = F.relu(y + self._shortcut(block, x, width, channels=y.shape[1]))
        return x

    def _shortcut(self, block: ResidualBlock, x: Tensor, width: int, *, channels: int) -> Tensor:
        if block.shortcut is not None:
            converted: Tensor = self.unit(block.shortcut.name)(x, width)
            return converted
        if block.stride == 1 and channels == x.shape[1]:
            return x
        kept = x[:, :, :: block.stride, :: block.stride]
        # A slice has other channels in than out: what is missing is zero, as in the whole branch.
        after = channels - kept.shape[1] - block.before
        return F.pad(kept, (0, 0, 0, 0, block.before, after))


class BranchWidths(SwitchableLayer, nn.Module):
    """The width at which all branches run.

    Args:
        widths: Those that there are.
        active: The one to start at.
    """

    def __init__(self, widths: Sequence[int], active: int) -> None:
        super().__init__()
        self.name, self.pinned = BODY, False
        self.offer = Offer(tuple(widths), tuple(widths), tied=True)
        self.active = BitSpec(active, active)


class BranchedClassifier(nn.Module):
    """A classifier with several branches: (B, 3, H, W) to (B, classes).

    Args:
        stem: What all branches read from.
        bodies: The branches.
        head: What reads the mean of the branches.
        selection: Which branches compute at which width.
        active: Width to start at.
        num_classes: Width of the output.
    """

    def __init__(
        self,
        stem: nn.Sequential,
        bodies: Sequence[Body],
        head: nn.Sequential,
        *,
        selection: Mapping[int, Selection],
        active: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.stem, self.head = stem, head
        self.bodies = nn.ModuleList(bodies)
        self.widths = BranchWidths(sorted(selection), active)
        self.selection = dict(selection)
        self.num_classes = num_classes

    def body(self, branch: int) -> Body:
        """One branch."""
        return cast(Body, self.bodies[branch])

    def forward(self, x: Tensor) -> Tensor:
        """Classify at the width that is chosen."""
        return self.at(x, self.widths.width().activation)

    def at(self, x: Tensor, width: int) -> Tensor:
        """Classify at a width."""
        features = self.stem(x)
        branches = self.selection[width].branches
        total: Tensor = self.body(branches[0])(features, width)
        for branch in branches[1:]:
            total = total + self.body(branch)(features, width)
        logits: Tensor = self.head(total / len(branches))
        return logits


def branched(
    model: nn.Module,
    layout: ResidualLayout,
    *,
    widths: Sequence[int],
    amortized: bool = True,
    one_set: bool = False,
    seed: int = 0,
) -> tuple[BranchedClassifier, NarrowWidths]:
    """Make a network to train from a float one.

    Every branch starts from the float weights, moved a little by chance: see
    `branch_grid.dithered`.

    Args:
        model: A residual network; it is copied.
        layout: Its description, with counted places.
        widths: The widths to serve.
        amortized: Spread the branches over the widths.
        one_set: Instead of branches, one body whose weights are rounded anew to every width.
        seed: Of the moves.

    Returns:
        The network, and the channels of narrow branches.
    """
    narrow = narrow_widths(layout)
    rising = sorted(widths)
    if one_set:
        selection = {width: Selection((0,)) for width in rising}
        members = [tuple(Member(width, width) for width in rising)]
    else:
        selection = select(rising, amortized=amortized)
        members = [members_of(branch, selection) for branch in range(branch_count(rising))]
    generator = torch.Generator().manual_seed(seed)
    bodies = [
        Body(
            layout.blocks,
            {
                conv.name: _unit(model, conv, own, narrow, None if one_set else generator)
                for conv in layout.convolutions
            },
        )
        for own in members
    ]
    network = BranchedClassifier(
        part(model, layout.stem),
        bodies,
        part(model, layout.head),
        selection=selection,
        active=rising[-1],
        num_classes=int(getattr(model, "num_classes", 0)),
    )
    return network.requires_grad_(True), narrow


def members_of(branch: int, selection: Mapping[int, Selection]) -> tuple[Member, ...]:
    """The widths that select a branch."""
    return tuple(
        Member(width, BRANCH_BITS, chosen.narrow == branch)
        for width, chosen in sorted(selection.items())
        if branch in chosen.branches
    )


def unit_plan(
    convolution: Convolution, members: tuple[Member, ...], narrow: tuple[int, int]
) -> UnitPlan:
    """The plan of a convolution in a branch."""
    shape = (convolution.outputs, convolution.inputs, *convolution.kernel)
    geometry = Geometry(convolution.stride, convolution.padding, convolution.dilation)
    return UnitPlan(shape, geometry, narrow, members)


def part(model: nn.Module, names: Sequence[str]) -> nn.Sequential:
    """A copy of some modules of a model, to be run one after the other."""
    return nn.Sequential(
        OrderedDict((_key(name), copy.deepcopy(model.get_submodule(name))) for name in names)
    )


@torch.no_grad()
def observe(network: BranchedClassifier, images: Tensor) -> None:
    """Choose the scales of activations of every branch and width from a batch of pictures.

    The statistics of that batch are also what the BatchNorms of the branches start from: those of
    the float network belong to other sums.
    """
    units = [unit for unit in network.modules() if isinstance(unit, SimulatedUnit)]
    norms = [norm for unit in units for norm in unit.modules() if isinstance(norm, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    training = network.training
    network.train()
    for unit in units:
        unit.observing = True
    for norm in norms:
        norm.momentum = 1.0
    try:
        for width in network.selection:
            network.at(images, width)
    finally:
        for unit in units:
            unit.observing = False
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.train(training)


def freeze(network: BranchedClassifier) -> BranchedClassifier:
    """The network on the integer engine; of one set of weights, one branch per width."""
    one_set = any(
        len(unit.plan.weight_bits) > 1
        for unit in network.modules()
        if isinstance(unit, SimulatedUnit)
    )
    widths = sorted(network.selection)
    if one_set:
        bodies = [_frozen(network.body(0), width) for width in widths]
        selection = {width: Selection((index,)) for index, width in enumerate(widths)}
    else:
        bodies = [_frozen(network.body(k)) for k in range(len(network.bodies))]
        selection = network.selection
    frozen = BranchedClassifier(
        copy.deepcopy(network.stem),
        bodies,
        copy.deepcopy(network.head),
        selection=selection,
        active=network.widths.active.activation,
        num_classes=network.num_classes,
    )
    return frozen.requires_grad_(False).eval()


def _frozen(body: Body, weight_bits: int | None = None) -> Body:
    units = {}
    for block in body.blocks:
        for convolution in block.all_convolutions:
            unit = body.unit(convolution.name)
            if not isinstance(unit, SimulatedUnit):
                raise TypeError(f"{convolution.name} was frozen before")
            bits = unit.plan.weight_bits[0] if weight_bits is None else weight_bits
            units[convolution.name] = unit.freeze(bits)
    return Body(body.blocks, units)


def _unit(
    model: nn.Module,
    convolution: Convolution,
    members: tuple[Member, ...],
    narrow: NarrowWidths,
    generator: torch.Generator | None,
) -> SimulatedUnit:
    weight = model.get_parameter(f"{convolution.name}.weight").detach()
    norm = model.get_submodule(convolution.norm)
    if not isinstance(norm, nn.BatchNorm2d):
        raise TypeError(f"{convolution.norm} is no BatchNorm")
    if generator is not None:
        scale = initial_weight_scale(weight, bits=BRANCH_BITS)
        weight = dithered(weight, scale, generator=generator)
    plan = unit_plan(convolution, members, narrow.channels[convolution.name])
    return SimulatedUnit(plan, weight, norm)


def _key(name: str) -> str:
    """The path of a part of the float model as the name of a child."""
    return name.replace(".", "_")
