"""How switchable layers lie in a checkpoint: planes, half precision, packed tables.

In memory the codes of a layer are one int8 tensor, in a file they are planes, so that a reader of
few bits needs only the first ones. The form of the tensors is told in `qtool.io.nested_tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qtool.quant import nested, tables
from qtool.quant.layers import OPERANDS
from qtool.quant.nested_layers import NestedLinear, NestedProducts
from qtool.quant.nested_simulation import SimulatedNested, SimulatedNestedProducts

_FINE = 2**tables.GRID_BITS
_BYTE = 8


def pack_table(table: Tensor, *, bits: int) -> Tensor:
    """A table that never falls, in 32 + 2^bits bytes.

    Args:
        table: Level of every fine code, uint8 (256,), with at most 2^bits distinct levels.
        bits: Width of a code.

    Returns:
        uint8: marks of the fine codes at which the next level begins, then the levels.
    """
    starts = torch.ones(_FINE, dtype=torch.bool, device=table.device)
    starts[1:] = table[1:] != table[:-1]
    found = table[starts]
    levels = found[-1:].repeat(2**bits)
    levels[: len(found)] = found
    starts[0] = False
    powers = 2 ** torch.arange(_BYTE, device=table.device)
    marks = (starts.view(-1, _BYTE) * powers).sum(dim=1).to(torch.uint8)
    return torch.cat([marks, levels])


def unpack_table(packed: Tensor) -> Tensor:
    """The table that `pack_table` packed, uint8 (256,)."""
    marks, levels = packed[: _FINE // _BYTE], packed[_FINE // _BYTE :]
    shifts = torch.arange(_BYTE, device=packed.device)
    starts = (marks.int()[:, None] >> shifts) & 1
    return levels[starts.flatten().cumsum(0)]


@torch.no_grad()
def round_to_storage(model: nn.Module) -> None:
    """Round what a file holds in half precision, in place, so that it computes what was calibrated.

    Args:
        model: A simulated switchable model, calibrated.
    """
    kept: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, SimulatedNested):
            layer.alpha.copy_(layer.scales().half())
            layer.gain.zero_()
            layer.bias.copy_(layer.bias.half())
        if isinstance(layer, SimulatedNested | SimulatedNestedProducts):
            kept |= {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in kept and tensor.dtype == torch.float32:
            tensor.copy_(tensor.half())


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a switchable model as a checkpoint holds them."""
    owners = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NestedLinear | NestedProducts)
    }
    prefixes = tuple(f"{name}." for name in owners)
    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(prefixes)
    }
    for name, module in owners.items():
        own = _linear(module) if isinstance(module, NestedLinear) else _products(module)
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in own.items()}
    return tensors


def fill(module: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a switchable layer from its tensors in a checkpoint.

    Args:
        module: The layer, of the right shape; only looked at.
        own: Its tensors by their last name.

    Raises:
        ValueError: The planes are not those of a layer of this shape.
    """
    if isinstance(module, NestedProducts):
        return _products_state(module, own)
    if not isinstance(module, NestedLinear):
        raise TypeError(f"{type(module).__name__} is no switchable layer")
    planes = [own[leaf] for leaf in ("p1", "p2", "p3", "p4") if leaf in own]
    low = [own["d2"]] if module.low_codes is not None else []
    rows, columns = module.shape[0], module.in_features
    for plane in (*low, *planes)[:1]:
        if tuple(plane.shape) != (rows, nested.plane_bytes(columns)):
            raise ValueError(
                f"{module.name} has planes of shape {tuple(plane.shape)}, not those of "
                f"{rows} rows of {columns} weights"
            )
    state = {
        "codes": nested.join_planes(planes or low, columns),
        "alpha": own["alpha"].float(),
        "bias": own["delta"].float(),
        "input_scale": own["act"][:, 0].contiguous(),
        "input_zero_point": own["act"][:, 1].int(),
    }
    if low:
        state["low_codes"] = nested.join_planes(low, columns) if planes else state["codes"]
    if module.input_table is not None:
        packed = _cut(own["act_table"], module.offer.activation, 1)
        state["input_table"] = torch.stack([unpack_table(part) for part in packed])
    return state


def _linear(module: NestedLinear) -> dict[str, Tensor]:
    planes = nested.split_planes(module.codes)[: nested.planes_for(max(module.offer.weight))]
    act = torch.stack([module.input_scale, module.input_zero_point.float()], dim=1)
    own = {f"p{number + 1}": plane for number, plane in enumerate(planes)}
    if module.low_codes is not None:
        own["d2"] = nested.split_planes(module.low_codes)[0]
    own |= {"alpha": module.alpha.half(), "delta": module.bias.half(), "act": act}
    if module.input_table is not None:
        narrow = _narrow(module.offer.activation)
        pairs = zip(module.input_table, narrow, strict=True)
        own["act_table"] = torch.cat([pack_table(table, bits=bits) for table, bits in pairs])
    return own


def _products(module: NestedProducts) -> dict[str, Tensor]:
    acts, packed = [], []
    for bits in module.offer.activation:
        products = module.at(bits)
        for operand in OPERANDS:
            scale, zero = products.parameters_of(operand)
            whole = zero if zero is not scale else torch.zeros_like(scale)
            acts += [scale, whole.float()]
            table = products.table_of(operand)
            if table is not None:
                packed.append(pack_table(table, bits=bits))
    own = {"act": torch.cat(acts).view(-1, len(OPERANDS), 2)}
    return own | ({"act_table": torch.cat(packed)} if packed else {})


def _products_state(module: NestedProducts, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    parts: list[Tensor] = []
    if "act_table" in own:
        parts = _cut(own["act_table"], module.offer.activation, len(OPERANDS))
    packed = iter(parts)
    for index, bits in enumerate(module.offer.activation):
        products = module.at(bits)
        for number, operand in enumerate(OPERANDS):
            scale, zero = own["act"][index, number]
            for leaf, value in (("scale", scale), ("zero_point", zero.int())):
                if hasattr(products, f"{operand}_{leaf}"):
                    state[f"a{bits}.{operand}_{leaf}"] = value.reshape(1).clone()
            if products.table_of(operand) is not None:
                state[f"a{bits}.{operand}_table"] = unpack_table(next(packed))
    return state


def _narrow(activation: Sequence[int]) -> list[int]:
    return [bits for bits in activation if bits < tables.GRID_BITS]


def _cut(packed: Tensor, activation: Sequence[int], operands: int) -> list[Tensor]:
    sizes = [_FINE // _BYTE + 2**bits for bits in _narrow(activation) for _ in range(operands)]
    return list(packed.split(sizes))
