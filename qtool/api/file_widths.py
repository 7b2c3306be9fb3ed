"""What the widths of a switchable file mean: its layers as objects, sizes, bit operations."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.io import checkpoint, nested_tensors
from qtool.quant.bits import BitSpec
from qtool.quant.switchable import common_width
from qtool.quant.widths import Choice, Offer, SwitchableLayer


def layers_in(table: checkpoint.PlaneTable) -> dict[str, SwitchableLayer]:
    """The layers that a file describes, with their widths, without their tensors."""
    header = table.header
    widths = header.nested
    if widths is None:
        return {}
    layers = {}
    for name, layer in header.layers.items():
        entry = SwitchableLayer()
        entry.name = name
        entry.pinned = bool(layer.options.get("pinned"))
        weights = () if layer.kind == "attention" else tuple(widths.weight_bits)
        activation = tuple(checkpoint.activation_widths(layer, widths))
        entry.offer = Offer(
            weights,
            activation,
            planes=table.planes.get(name, 0),
            dedicated=widths.dedicated_2bit,
        )
        entry.active = BitSpec(layer.weight_bits or max(widths.weight_bits), layer.input_bits or 8)
        layers[name] = entry
    return layers


def chosen(layers: Mapping[str, SwitchableLayer], choice: Choice) -> dict[str, BitSpec]:
    """The widths of layers after a choice.

    Raises:
        UsageError: A layer lacks the width that was chosen for it.
    """
    specs = {}
    for name, layer in layers.items():
        asked = choice.width(name, pinned=layer.pinned)
        specs[name] = layer.active if asked is None else layer.offer.fit(name, asked)
    return specs


def with_bits(table: checkpoint.PlaneTable, specs: Mapping[str, BitSpec]) -> checkpoint.Header:
    """The header of a file whose layers run at these widths."""
    entries = layers_in(table)
    for name, entry in entries.items():
        entry.active = specs[name]
    layers = {
        name: layer.model_copy(
            update={
                "weight_bits": specs[name].weight if layer.weight_bits else None,
                "input_bits": specs[name].activation,
            }
        )
        for name, layer in table.header.layers.items()
    }
    update = {"layers": layers, "active_bits": common_width(entries)}
    changed = table.header.model_copy(update=update)
    if changed.active_bits not in (*changed.bits, checkpoint.MIXED):
        names = [*changed.bits, changed.active_bits]
        changed = changed.model_copy(update={"bits": names})
    return changed


def needed_bytes(table: checkpoint.PlaneTable, specs: Mapping[str, BitSpec]) -> int:
    """Bytes of a file with the planes that these widths need, and no others."""
    planes = sum(
        size * planes_needed(table.header, specs[name].weight)
        for name, size in table.plane_bytes.items()
    )
    return table.other_bytes + planes


def planes_needed(header: checkpoint.Header, bits: int) -> int:
    """Number of planes of a file that a layer with weights of so many bits reads."""
    own = header.nested is not None and header.nested.dedicated_2bit
    return nested_tensors.planes_for(bits, dedicated=own)


def bit_operations(header: checkpoint.Header, specs: Mapping[str, BitSpec]) -> int:
    """Multiplications for one picture times the bits of both factors, over quantized layers."""
    total = 0
    for name, layer in header.layers.items():
        macs, spec = layer.options.get("macs"), specs[name]
        left = spec.weight if layer.weight_bits else spec.activation
        total += (macs if isinstance(macs, int) else 0) * left * spec.activation
    return total
