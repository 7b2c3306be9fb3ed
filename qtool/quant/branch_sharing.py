"""Levels and scales of all units of a network at once, shared by the widths of a training step.

The levels of a branch are the same at every width. Computed once a step, in one pass over the
weights of all units, they cost a few operations instead of a few thousand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.quant.branch_grid import weight_levels
from qtool.quant.branch_simulation import Held, SimulatedUnit


class _Group(NamedTuple):
    """The units with weights of the same bits.

    Attributes:
        bits: Bits of a weight.
        units: Those that have such weights.
        indices: Where these bits stand among the scales of each.
        row_of: For every weight, the number of its row among all rows.
    """

    bits: int
    units: list[SimulatedUnit]
    indices: list[int]
    row_of: Tensor


class SharedLevels:
    """What all widths of a training step have in common.

    Args:
        units: All units of a network.
        channels_last: Whether the channels of a weight lie next to each other in memory.
    """

    def __init__(self, units: Sequence[SimulatedUnit], *, channels_last: bool = False) -> None:
        self.units = list(units)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        every = sorted({bits for unit in self.units for bits in unit.plan.weight_bits})
        self.groups = [self._group(bits) for bits in every]

    def _group(self, bits: int) -> _Group:
        units = [unit for unit in self.units if bits in unit.plan.weight_bits]
        rows = torch.arange(sum(len(unit.weight) for unit in units))
        columns = torch.cat([torch.full((len(u.weight),), u.weight[0].numel()) for u in units])
        row_of = rows.repeat_interleave(columns).to(units[0].weight.device)
        return _Group(bits, units, [u.plan.weight_bits.index(bits) for u in units], row_of)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block units use shared levels; behind it, gradients have reached parameters.

        The block may run several forward and backward passes.
        """
        sources, leaves = self._hold()
        try:
            yield
        finally:
            for unit in self.units:
                unit.held = None
        gradients = [torch.cat([_gradient(leaf).flatten() for leaf in own]) for own in leaves]
        torch.autograd.backward(sources, gradients)

    def _hold(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Compute, and hand out to units what is cut off from the graph behind it.

        Returns:
            What was computed, flat, and the parts of each that units use.
        """
        inputs = torch.cat([unit.log_input_scale for unit in self.units]).exp()
        parts = [part.requires_grad_() for part in inputs.detach().unbind()]
        sources, leaves = [inputs], [parts]
        first = 0
        for unit in self.units:
            count = len(unit.plan.members)
            unit.held = Held({}, {}, parts[first : first + count])
            first += count
        for group in self.groups:
            weight = torch.cat([unit.weight.flatten() for unit in group.units])
            logs = [u.log_weight_scale[i] for u, i in zip(group.units, group.indices, strict=True)]
            scale = torch.cat(logs).exp()
            levels = weight_levels(weight, scale.index_select(0, group.row_of), bits=group.bits)
            own = []
            sizes = [unit.weight.numel() for unit in group.units]
            rows = [len(unit.weight) for unit in group.units]
            for unit, part, scales in zip(
                group.units, levels.detach().split(sizes), scale.detach().split(rows), strict=True
            ):
                if unit.held is None:
                    raise RuntimeError("a unit is used twice")
                shaped = part.view(unit.weight.shape).contiguous(memory_format=self.layout)
                leaf = shaped.requires_grad_()
                unit.held.weight_levels[group.bits] = leaf
                unit.held.weight_scales[group.bits] = scales
                own.append(leaf)
            sources.append(levels)
            leaves.append(own)
        return sources, leaves


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
