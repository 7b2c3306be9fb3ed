"""Quantized checkpoints: one safetensors file that describes itself.

The metadata hold `format=pt`, `qtool.format=1`, `qtool.config` (a `Header` in JSON) and two
checksums. A quantized layer NAME has these tensors; every other tensor keeps the name it has in
the model.

| tensor                   | type       | shape                                           |
|--------------------------|------------|-------------------------------------------------|
| `NAME.weight_packed`     | U8         | (N, row bytes)                                  |
| `NAME.weight_scale`      | F32 or F16 | (N,), one per output channel                    |
| `NAME.weight_zero_point` | U8 or I32  | (N,), in 0 .. 2^bits - 1                        |
| `NAME.weight_shape`      | I64        | holds (N, K) or (N, C, kernel H, kernel W)      |
| `NAME.input_scale`       | F32 or F16 | () or (1,); absent where the input stays float  |
| `NAME.input_zero_point`  | U8 or I32  | () or (1,); absent likewise                     |
| `NAME.input_table`       | U8         | (256,); only where the option `quantizer` says  |
| `NAME.bias`              | any        | (N,), optional                                  |

An attention NAME has `NAME.products.OPERAND_scale`, `..._zero_point` and `..._table`, of the types
and shapes of `input_scale`, `input_zero_point` and `input_table`. With a table, scale and zero
point are those of an 8-bit grid, and the table has at most 2^bits distinct entries.

A row of K codes takes the bytes of its planes one after the other, ceil(K * width / 8) each; the
widths are 2=[2] 3=[2,1] 4=[4] 5=[4,1] 6=[4,2] 7=[4,2,1] 8=[8].

With the engine `nested` a layer has several widths, and other tensors: see `nested_tensors`. With
the engine `branches` the whole network has: see `branch_tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from pydantic import ValidationError
from torch import Tensor

from qtool.errors import CheckpointError
from qtool.io import branch_tensors, nested_tensors
from qtool.io.atomic import Writer, write_file
from qtool.io.container import (
    change_metadata,
    container_content,
    damaged,
    foreign,
    open_container,
    read_table,
    read_tensors,
    shown,
    strict_json,
)
from qtool.io.header import (
    MIXED,
    SEES_PICTURE,
    Header,
    LayerBits,
    NestedWidths,
    activation_widths,
)

__all__ = [
    "FORMAT",
    "MIXED",
    "SEES_PICTURE",
    "Header",
    "LayerBits",
    "NestedWidths",
    "PlaneTable",
    "activation_widths",
    "change_header",
    "content",
    "read",
    "read_header",
    "read_planes",
    "write",
]

FORMAT = 1

Shapes = tuple[tuple[int, ...], ...]

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
_WEIGHT_RANKS = {"linear": 2, "conv": 4}
_WEIGHT_TENSORS = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"})
_INPUT_TENSORS = frozenset({"input_scale", "input_zero_point"})
_INPUT_TABLE = frozenset({"input_table"})
_TABLE: Shapes = ((256,),)
_SCALES = (torch.float32, torch.float16)
_ZERO_POINTS = (torch.uint8, torch.int32)
_ONE: Shapes = ((), (1,))


def write(
    path: Path,
    header: Header,
    tensors: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint; the same input gives the same bytes.

    Args:
        path: Where the file goes; it appears whole or not at all.
        header: What the file says about itself.
        tensors: All tensors of the quantized model by name.
        overwrite: Whether an existing file may be replaced.
        check: Given the complete file under a temporary name; nothing is written if it raises.

    Raises:
        CheckpointError: Header and tensors disagree; nothing is written.
        OutputExistsError: The file exists and `overwrite` is false.
    """
    write_file(path, content(header, tensors), overwrite=overwrite, check=check)


def content(header: Header, tensors: Mapping[str, Tensor]) -> Writer:
    """What writes a checkpoint to an open file; the same input gives the same bytes.

    Args:
        header: What the file says about itself.
        tensors: All tensors of the quantized model by name.

    Raises:
        CheckpointError: Header and tensors disagree.
    """
    problem = _disagreement(header, tensors)
    if problem:
        raise CheckpointError(f"cannot write a checkpoint: {problem}")
    return container_content(
        {"format": "pt", "qtool.format": str(FORMAT), "qtool.config": header.to_json()},
        tensors,
        section_of=None if header.engine == "fixed" else _section_of(header),
    )


def change_header(path: Path, header: Header, *, copy: BinaryIO | None = None) -> None:
    """Replace what a checkpoint says about itself; no tensor byte changes.

    Args:
        path: The checkpoint.
        header: The new header, for the same tensors.
        copy: Where the changed file goes; None changes the file in place.

    Raises:
        CheckpointError: The file is damaged, or has no room for the header.
        QtoolError: It cannot be written.
    """
    change_metadata(path, {"qtool.config": header.to_json()}, copy=copy)


@dataclass(frozen=True, kw_only=True)
class PlaneTable:
    """What a switchable file holds, from its header alone.

    Attributes:
        header: What it says about itself.
        planes: Planes of weights that are whole, by layer; fewer in a file that was cut off.
        plane_bytes: Bytes of one plane, by layer.
        other_bytes: Bytes of everything that is no plane, the header among them.
    """

    header: Header
    planes: dict[str, int]
    plane_bytes: dict[str, int]
    other_bytes: int


def read_planes(path: Path) -> PlaneTable:
    """Read what a switchable checkpoint says about itself and how much of it is there.

    Raises:
        CheckpointError: The file is absent, damaged, foreign, hostile or of a newer format.
    """
    with open_container(path) as file:
        table = read_table(file, path)
    header = _header(path, table.metadata, intact=table.intact)
    planes: dict[str, int] = {}
    sizes: dict[str, int] = {}
    other = table.data_start
    for entry in table.entries:
        owner, _, leaf = entry.name.rpartition(".")
        number = _plane_of(header, leaf) if owner in header.layers else 0
        if not number:
            other += entry.end - entry.begin
            continue
        sizes[owner] = entry.end - entry.begin
        if entry.end <= table.data_bytes:
            planes[owner] = max(planes.get(owner, 0), number)
    return PlaneTable(header=header, planes=planes, plane_bytes=sizes, other_bytes=other)


def read_header(path: Path) -> Header:
    """Read what a checkpoint says about itself, without touching its tensors.

    Raises:
        CheckpointError: The file is absent, damaged, foreign, hostile or of a newer format.
    """
    with open_container(path) as file:
        table = read_table(file, path)
    return _header(path, table.metadata, intact=table.intact)


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read a checkpoint, on the CPU, after checking all of it.

    Returns:
        The header and all tensors by name, in the order of the file.

    Raises:
        CheckpointError: The file is absent, damaged, foreign, hostile or of a newer format.
    """
    with open_container(path) as file:
        table = read_table(file, path)
        header = _header(path, table.metadata, intact=table.intact)
        own_2bit = header.nested is not None and header.nested.dedicated_2bit
        if table.cut and table.sections < 2 and not own_2bit:
            raise damaged(path, "it ends before the first plane of weights")
        tensors = read_tensors(file, path, table)
    planes = table.sections - 1 if table.cut else branch_tensors.MAX_BRANCHES
    problem = _disagreement(header, tensors, planes=planes)
    if problem:
        raise damaged(path, problem)
    return header, tensors


def _header(path: Path, metadata: Mapping[str, str], *, intact: bool) -> Header:
    version = metadata.get("qtool.format", "")
    if "qtool.config" not in metadata or not (version.isascii() and version.isdigit()):
        raise foreign(path, "its metadata hold no qtool.format and qtool.config")
    if version != str(FORMAT):
        raise CheckpointError(
            f"{path} has checkpoint format {shown(version)}; this qtool reads format {FORMAT}",
            remedy="install the qtool that wrote it, or the newest: pip install -U qtool",
        )
    if not intact:
        raise damaged(path, "its header does not match its checksum")
    try:
        return Header.model_validate(strict_json(metadata["qtool.config"]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f"qtool.config: {shown(place)}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"qtool.config is not JSON: {error}") from error


def _plane_of(header: Header, leaf: str) -> int:
    """Number of the plane that a tensor's last name stands for; 0 for other tensors."""
    if header.branches is None:
        return nested_tensors.plane_of(leaf)
    return branch_tensors.plane_of(leaf)


def _section_of(header: Header) -> Callable[[str], int]:
    """The section of every tensor of a switchable file: planes by their number, the rest first."""

    def section(name: str) -> int:
        owner, _, leaf = name.rpartition(".")
        return _plane_of(header, leaf) if owner in header.layers else 0

    return section


def _disagreement(
    header: Header, tensors: Mapping[str, Tensor], *, planes: int = branch_tensors.MAX_BRANCHES
) -> str:
    """Say in one line what is wrong between a header and its tensors, or nothing.

    Args:
        header: The header.
        tensors: The tensors that are there.
        planes: The planes that are, in a switchable file.
    """
    children: dict[str, set[str]] = {}
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        children.setdefault(owner, set()).add(leaf)
    if header.nested is not None:
        return _nested_disagreement(header, header.nested, tensors, children, planes)
    if header.branches is not None:
        return _branches_disagreement(header, header.branches, tensors, children, planes)
    for owner, leaves in children.items():
        surplus = leaves & (_WEIGHT_TENSORS | _INPUT_TENSORS | _INPUT_TABLE)
        if surplus and owner not in header.layers:
            name = shown(f"{owner}.{min(surplus)}")
            return f"tensor {name} belongs to no layer of the header"
    for name, layer in header.layers.items():
        if layer.kind == "attention":
            place = f"{name}.products"
            leaves = children.get(place, set())
            own = {leaf: tensors[f"{place}.{leaf}"] for leaf in leaves}
            if problem := _operand_problem(own, layer.input_bits or 8):
                return f"layer {shown(name)}: {problem}"
            continue
        leaves = children.get(name, set())
        needed = _WEIGHT_TENSORS | (_INPUT_TENSORS if layer.input_bits else frozenset())
        if layer.options.get("quantizer") == "table":
            needed |= _INPUT_TABLE
        if missing := needed - leaves:
            return f"tensor {shown(f'{name}.{min(missing)}')} is missing"
        if surplus := leaves - needed - {"bias"}:
            return f"tensor {shown(f'{name}.{min(surplus)}')} does not belong to its layer"
        own = {leaf: tensors[f"{name}.{leaf}"] for leaf in leaves}
        if problem := _layer_problem(layer, own):
            return f"layer {shown(name)}: {problem}"
    return ""


def _nested_disagreement(
    header: Header,
    widths: NestedWidths,
    tensors: Mapping[str, Tensor],
    children: Mapping[str, set[str]],
    planes: int,
) -> str:
    for name, layer in header.layers.items():
        place = f"{name}.products" if layer.kind == "attention" else name
        own = {leaf: tensors[f"{place}.{leaf}"] for leaf in children.get(place, set())}
        table = layer.options.get("quantizer") == "table"
        if layer.kind == "attention":
            problem = nested_tensors.products_problem(own, widths.activation_bits, table=table)
        else:
            stored = layer.options.get("planes")
            least = 0 if widths.dedicated_2bit else 1
            if type(stored) is not int or not least <= stored <= nested_tensors.MAX_PLANES:
                return f"layer {shown(name)}: planes is {shown(str(stored))}, not {least} to 4"
            problem = nested_tensors.layer_problem(
                own,
                widths.weight_bits,
                activation_widths(layer, widths),
                planes=min(stored, planes),
                table=table,
                dedicated=widths.dedicated_2bit,
            )
        if problem:
            return f"layer {shown(name)}: {problem}"
    return ""


def _branches_disagreement(
    header: Header,
    table: branch_tensors.BranchTable,
    tensors: Mapping[str, Tensor],
    children: Mapping[str, set[str]],
    planes: int,
) -> str:
    for name, layer in header.layers.items():
        own = {leaf: tensors[f"{name}.{leaf}"] for leaf in children.get(name, set())}
        problem = branch_tensors.unit_problem(
            own,
            table,
            rows=branch_tensors.size_of(layer.options, "rows"),
            columns=branch_tensors.size_of(layer.options, "columns"),
            narrow_rows=branch_tensors.size_of(layer.options, "narrow_rows"),
            branches=min(planes, len(table.weight_bits)),
        )
        if problem:
            return f"layer {shown(name)}: {problem}"
    return ""


def _layer_problem(layer: LayerBits, own: Mapping[str, Tensor]) -> str:
    bits, rank = layer.weight_bits or 0, _WEIGHT_RANKS[layer.kind]
    shape_tensor, packed = own["weight_shape"], own["weight_packed"]
    if shape_tensor.dtype != torch.int64 or shape_tensor.shape != (rank,):
        return f"weight_shape is not {rank} integers of type I64"
    shape = shape_tensor.tolist()
    if not all(0 < size < 2**31 for size in shape):
        return f"weight_shape {shape} is impossible"
    rows, columns = shape[0], math.prod(shape[1:])
    expected = (rows, sum((columns * width + 7) // 8 for width in _PLANES[bits]))
    if packed.dtype != torch.uint8 or packed.shape != expected:
        return (
            f"weight_packed is {_described(packed)}, but weights of {bits} bits and shape "
            f"{tuple(shape)} take uint8 {expected}"
        )
    if "bias" in own and own["bias"].shape != (rows,):
        return f"bias is {_described(own['bias'])}, not of shape ({rows},)"
    if problem := _grid_problem("weight", own, bits, ((rows,),)):
        return problem
    if "input_table" in own:
        table, width = own["input_table"], layer.input_bits or 8
        return _grid_problem("input", own, 8, _ONE) or _table_problem("input_table", table, width)
    return _grid_problem("input", own, layer.input_bits, _ONE) if layer.input_bits else ""


def _operand_problem(own: Mapping[str, Tensor], bits: int) -> str:
    for leaf, tensor in sorted(own.items()):
        if leaf.endswith("_scale"):
            problem = _scale_problem(leaf, tensor, _ONE)
        elif leaf.endswith("_zero_point"):
            has_table = f"{leaf.removesuffix('_zero_point')}_table" in own
            problem = _zero_point_problem(leaf, tensor, 8 if has_table else bits, _ONE)
        elif leaf.endswith("_table"):
            problem = _table_problem(leaf, tensor, bits)
        else:
            problem = f"tensor {shown(leaf)} does not belong to it"
        if problem:
            return problem
    return ""


def _grid_problem(which: str, own: Mapping[str, Tensor], bits: int, shapes: Shapes) -> str:
    scale, zero_point = f"{which}_scale", f"{which}_zero_point"
    return _scale_problem(scale, own[scale], shapes) or _zero_point_problem(
        zero_point, own[zero_point], bits, shapes
    )


def _scale_problem(name: str, scale: Tensor, shapes: Shapes) -> str:
    if scale.dtype not in _SCALES or tuple(scale.shape) not in shapes:
        return f"{name} is {_described(scale)}, not float32 or float16 of shape {shapes[-1]}"
    if not bool((scale.isfinite() & (scale > 0)).all()):
        return f"{name} is not positive and finite everywhere"
    return ""


def _zero_point_problem(name: str, zero_point: Tensor, bits: int, shapes: Shapes) -> str:
    if zero_point.dtype not in _ZERO_POINTS or tuple(zero_point.shape) not in shapes:
        return f"{name} is {_described(zero_point)}, not uint8 or int32 of shape {shapes[-1]}"
    # As int32, because a uint8 would be compared with 2^8 taken as a uint8, which is 0.
    levels = zero_point.int()
    if not bool(((levels >= 0) & (levels < 2**bits)).all()):
        return f"{name} leaves 0..{2**bits - 1}"
    return ""


def _table_problem(name: str, table: Tensor, bits: int) -> str:
    if table.dtype != torch.uint8 or tuple(table.shape) not in _TABLE:
        return f"{name} is {_described(table)}, not uint8 of shape (256,)"
    if (found := len(table.unique())) > 2**bits:
        return f"{name} has {found} levels, but {bits} bits tell only {2**bits} apart"
    return ""


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
