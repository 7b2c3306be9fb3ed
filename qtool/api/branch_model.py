"""Networks of branches into checkpoints and back: the engine `branches` of `qtool.load`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qtool.engine import ops
from qtool.io import branch_tensors, checkpoint
from qtool.io.branch_tensors import BranchTable, BranchWidth, first_rows, size_of
from qtool.methods.multiquant.branches import Body, BranchedClassifier, part, unit_plan
from qtool.methods.multiquant.selection import NarrowWidths, Selection
from qtool.models import vision
from qtool.models.residual import Convolution, ResidualLayout, residual_layout
from qtool.quant.branch_grid import Member
from qtool.quant.branch_layers import IntegerUnit

_SHARED = ("stem", "head")


def table_of(network: BranchedClassifier, layout: ResidualLayout) -> BranchTable:
    """What a file says about the widths of a frozen network."""
    first = layout.convolutions[0].name
    units = [_unit_of(network, branch, first) for branch in range(len(network.bodies))]
    return BranchTable(
        weight_bits=[unit.weight_bits for unit in units],
        widths=[
            BranchWidth(
                bits=bits,
                branches=[branch + 1 for branch in chosen.branches],
                narrow=None if chosen.narrow is None else chosen.narrow + 1,
            )
            for bits, chosen in sorted(network.selection.items())
        ],
    )


def layers_of(
    layout: ResidualLayout, narrow: NarrowWidths, table: BranchTable, active: int
) -> dict[str, checkpoint.LayerBits]:
    """What a file says about every convolution of the body."""
    weight_bits = _active_weight_bits(table, active)
    layers = {}
    for conv in layout.convolutions:
        inputs, outputs = narrow.channels[conv.name]
        area = conv.kernel[0] * conv.kernel[1]
        layers[conv.name] = checkpoint.LayerBits(
            kind="conv",
            weight_bits=weight_bits,
            input_bits=active,
            options={
                "rows": conv.outputs,
                "columns": conv.inputs * area,
                "narrow_rows": outputs,
                "narrow_inputs": inputs,
                "macs": conv.multiplications(),
                "narrow_macs": conv.multiplications(inputs, outputs),
            },
        )
    return layers


def at_width(header: checkpoint.Header, bits: int) -> checkpoint.Header:
    """The header of a file that runs at another of its widths."""
    if header.branches is None:
        raise ValueError("the header has no branches")
    update = {
        "weight_bits": _active_weight_bits(header.branches, bits),
        "input_bits": bits,
    }
    layers = {name: layer.model_copy(update=update) for name, layer in header.layers.items()}
    return header.model_copy(update={"layers": layers, "active_bits": f"w{bits}a{bits}"})


def _active_weight_bits(table: BranchTable, bits: int) -> int:
    """Bits of the weights that run at a width."""
    chosen = next(width for width in table.widths if width.bits == bits)
    return table.weight_bits[chosen.branches[0] - 1]


@torch.no_grad()
def round_shared(network: BranchedClassifier) -> None:
    """Round stem and head to the half precision that a file holds them in."""
    for name in _SHARED:
        shared = network.get_submodule(name)
        for tensor in (*shared.parameters(), *shared.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


def stored(network: BranchedClassifier, layout: ResidualLayout) -> dict[str, Tensor]:
    """The tensors of a frozen network as a checkpoint holds them."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
        if name.partition(".")[0] in _SHARED
    }
    table = table_of(network, layout)
    for conv in layout.convolutions:
        units = [_unit_of(network, branch, conv.name) for branch in range(len(network.bodies))]
        for number, unit in enumerate(units):
            packed = ops.pack_codes(unit.weight_codes(), unit.weight_bits)
            tensors[f"{conv.name}.p{number + 1}"] = packed
        scales = [units[branch - 1].scales(bits) for bits, branch, _ in table.members()]
        for index, leaf in enumerate(("alpha", "delta", "act")):
            tensors[f"{conv.name}.{leaf}"] = torch.cat([own[index] for own in scales])
    return tensors


def restore(header: checkpoint.Header, tensors: Mapping[str, Tensor]) -> BranchedClassifier:
    """Build a network of branches around the tensors of a file.

    Args:
        header: The header of a file with the engine `branches`.
        tensors: The file's tensors; of one that was cut off, the branches that are there.

    Raises:
        ValueError: The tensors do not fit the architecture.
        KeyError: The header tells of other convolutions than the architecture has.
    """
    table = header.branches
    if table is None:
        raise ValueError("the header has no branches")
    model = vision.build(header.architecture, header.model_args, device="meta")
    layout = residual_layout(model)
    state = dict(tensors)
    first = layout.convolutions[0].name
    there = sum(bool(branch_tensors.plane_of(name.removeprefix(f"{first}."))) for name in state)
    widths = [width for width in table.widths if width.bits in table.there(there)]
    if not widths:
        raise ValueError("it ends before the branches of its narrowest width")
    used = sorted({branch for width in widths for branch in width.branches})
    units: dict[int, dict[str, nn.Module]] = {branch: {} for branch in used}
    for conv in layout.convolutions:
        own = {
            leaf: state.pop(f"{conv.name}.{leaf}")
            for leaf in ("alpha", "delta", "act", *(f"p{n + 1}" for n in range(there)))
        }
        for branch in used:
            bits = [width.bits for width in widths if branch in width.branches]
            units[branch][conv.name] = _filled(conv, header, table, own, branch, bits)
    network = BranchedClassifier(
        part(model, layout.stem),
        [Body(layout.blocks, units[branch]) for branch in used],
        part(model, layout.head),
        selection={
            width.bits: Selection(
                tuple(used.index(branch) for branch in width.branches),
                None if width.narrow is None else used.index(width.narrow),
            )
            for width in widths
        },
        active=widths[-1].bits,
        num_classes=int(getattr(model, "num_classes", 0)),
    )
    for name in _SHARED:
        prefix = f"{name}."
        own = {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
        network.get_submodule(name).load_state_dict(own, strict=True, assign=True)
    if state:
        raise ValueError(f"tensor {min(state)!r} belongs to no part of it")
    return network


def _filled(
    conv: Convolution,
    header: checkpoint.Header,
    table: BranchTable,
    own: Mapping[str, Tensor],
    branch: int,
    widths: list[int],
) -> IntegerUnit:
    """The unit of a convolution in one branch, at the widths that are there."""
    options = header.layers[conv.name].options
    narrow = (size_of(options, "narrow_inputs"), size_of(options, "narrow_rows"))
    rows, columns = size_of(options, "rows"), size_of(options, "columns")
    expected = (conv.outputs, conv.inputs * conv.kernel[0] * conv.kernel[1])
    if (rows, columns) != expected or narrow[0] > conv.inputs or narrow[1] > conv.outputs:
        raise ValueError(f"{conv.name} has codes of {rows} x {columns}, not {expected}")
    bits = table.weight_bits[branch - 1]
    spans = first_rows(table, rows, narrow[1])
    found = {
        width: (index, is_narrow)
        for index, (width, number, is_narrow) in enumerate(table.members())
        if number == branch and width in widths
    }
    members = tuple(Member(width, bits, is_narrow) for width, (_, is_narrow) in found.items())
    unit = IntegerUnit(unit_plan(conv, members, narrow))
    unit.set_codes(ops.unpack_codes(own[f"p{branch}"], bits, columns))
    for width, (index, _) in found.items():
        rows_here = slice(*spans[index])
        unit.set_scales(width, own["alpha"][rows_here], own["delta"][rows_here], own["act"][index])
    return unit


def _unit_of(network: BranchedClassifier, branch: int, name: str) -> IntegerUnit:
    unit = network.body(branch).unit(name)
    if not isinstance(unit, IntegerUnit):
        raise TypeError(f"{name} of branch {branch} is not frozen")
    return unit
