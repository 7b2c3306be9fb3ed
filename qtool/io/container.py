"""The safetensors container, read with suspicion and written with the same bytes every time.

Layout: eight bytes with the header's length (little endian), the header in JSON (names to dtype,
shape and byte range, plus string metadata), then the tensors' bytes without a gap. The safetensors
library writes its metadata in random order and tells of a damaged file in words for programmers;
hence this one.

Two checksums in the metadata make any damage visible: `qtool.header_sha256` covers the metadata
and the table of tensors, `qtool.sha256` the tensors' bytes in the order of the file.

A container may have sections, told by `qtool.sections`: a JSON list of pairs, where each section
ends and the checksum of all bytes up to there. Such a file may be cut off behind any section; what
is left is whole. Its header has room to spare, so that metadata can be changed in place.

Reference: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from qtool.errors import CheckpointError, MissingCheckpointError, QtoolError
from qtool.io.atomic import Writer, write_file

# In the order in which the safetensors library stores them: wide elements first, so that every
# tensor lies aligned.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 16_000_000
_MAX_DIMENSIONS = 8
_SPARE_BYTES = 256
_DATA_HASH = "qtool.sha256"
_SECTIONS = "qtool.sections"
_HEADER_HASH = "qtool.header_sha256"
_DAMAGED = "the file is damaged: copy or write it again"
_FOREIGN = "give a .safetensors file that qtool wrote"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the table: where it lies and what it is.

    Attributes:
        name: Its name.
        dtype: Its element type.
        shape: Its shape.
        begin: First byte, counted from the end of the header.
        end: One past the last byte.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the header of a container says.

    Attributes:
        metadata: Free strings.
        entries: The tensors in the order of the file.
        data_start: Where the tensors' bytes begin in the file.
        intact: Whether metadata and table match their checksum.
        data_bytes: Bytes of tensors that are there, up to the end of a section.
        sections: Number of sections that are there; 1 for a container without any.
        cut: Whether later sections are missing.
    """

    metadata: dict[str, str]
    entries: tuple[Entry, ...]
    data_start: int
    intact: bool
    data_bytes: int
    sections: int
    cut: bool


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a file whose bytes cannot be what was written."""
    return CheckpointError(f"{path} is damaged: {reason}", remedy=_DAMAGED)


def foreign(path: Path, reason: str) -> CheckpointError:
    """The error for a file that is something else than a qtool checkpoint."""
    return CheckpointError(f"{path} is not a qtool checkpoint: {reason}", remedy=_FOREIGN)


def shown(text: str) -> str:
    """A name from a file, safe to put in one line: quoted, escaped, cut."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def strict_json(text: str | bytes) -> Any:  # noqa: ANN401
    """Parse JSON, refusing what Python would let pass: keys given twice, NaN, endless nesting.

    Raises:
        ValueError: The text is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"the key {shown(name)} is there twice")
            found[name] = value
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_container(
    path: Path,
    metadata: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    section_of: Callable[[str], int] | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write tensors and metadata; the same input gives the same bytes.

    Args:
        path: Where the file goes; it appears whole or not at all.
        metadata: As for `container_content`.
        tensors: As for `container_content`.
        section_of: As for `container_content`.
        overwrite: Whether an existing file may be replaced.
        check: As for `write_file`.

    Raises:
        CheckpointError: A name or an element type that the format cannot hold.
        OutputExistsError: The file exists and `overwrite` is false.
    """
    content = container_content(metadata, tensors, section_of=section_of)
    write_file(path, content, overwrite=overwrite, check=check)


def container_content(
    metadata: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    section_of: Callable[[str], int] | None = None,
) -> Writer:
    """What writes tensors and metadata to an open file; the same input gives the same bytes.

    Args:
        metadata: Strings to store beside the tensors.
        tensors: The tensors by name, on any device.
        section_of: The section each tensor belongs to, 0, 1, ...; None for no sections.

    Raises:
        CheckpointError: A name or an element type that the format cannot hold.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if tensor.dtype not in _CODES:
            raise CheckpointError(
                f"tensor {shown(name)} has type {tensor.dtype}, which a checkpoint cannot hold",
                remedy=f"convert it to one of {', '.join(DTYPES)}",
            )
        if not _is_plain(name) or name == "__metadata__":
            raise CheckpointError(f"{shown(name)} cannot be the name of a tensor")
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
    part = section_of if section_of is not None else lambda _: 0
    order = sorted(plain, key=lambda name: (part(name), ranks[plain[name].dtype], name))
    table: dict[str, Any] = {}
    digest = hashlib.sha256()
    position = 0
    ends: dict[int, list[Any]] = {}
    for name in order:
        tensor = plain[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        table[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
        digest.update(_bytes_of(tensor))
        ends[part(name)] = [end, digest.copy().hexdigest()]
    full = {**metadata, _DATA_HASH: digest.hexdigest()}
    if section_of is not None:
        full[_SECTIONS] = json.dumps([ends[number] for number in sorted(ends)])
    header = _header_bytes(full, table)
    header += b" " * (0 if section_of is None else _SPARE_BYTES)
    header += b" " * (-len(header) % _ALIGNMENT)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
        file.write(header)
        for name in order:
            file.write(_bytes_of(plain[name]))

    return write


def change_metadata(
    path: Path, changes: Mapping[str, str], *, copy: BinaryIO | None = None
) -> None:
    """Change metadata of a container, in place or on the way into a copy.

    The header is put down in one write and keeps its length, so that no tensor byte moves.

    Args:
        path: The container.
        changes: Metadata to replace.
        copy: Where the changed container goes; None changes the file itself.

    Raises:
        CheckpointError: The container is damaged, or its header has no room for the change.
        QtoolError: The file cannot be written.
    """
    with open_container(path) as file:
        table = read_table(file, path)
        entries = {
            entry.name: {
                "dtype": _CODES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [entry.begin, entry.end],
            }
            for entry in table.entries
        }
        metadata = {k: v for k, v in table.metadata.items() if k != _HEADER_HASH} | dict(changes)
        header = _header_bytes(metadata, entries)
        room = table.data_start - _LENGTH_BYTES
        if copy is None and len(header) > room:
            raise CheckpointError(
                f"the header of {path} has no room for the change", remedy="write a copy with -o"
            )
        header += b" " * max(room - len(header), -len(header) % _ALIGNMENT)
        if copy is not None:
            copy.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
            copy.write(header)
            file.seek(table.data_start)
            shutil.copyfileobj(file, copy)
            return
    try:
        with path.open("r+b") as writable:
            writable.seek(_LENGTH_BYTES)
            writable.write(header)
            writable.flush()
            os.fsync(writable.fileno())
    except OSError as error:
        raise QtoolError(
            f"cannot write {path}: {error.strerror}", remedy="write a copy with -o"
        ) from error


def _header_bytes(metadata: Mapping[str, str], table: Mapping[str, Any]) -> bytes:
    """The header in JSON with its checksum, without padding."""
    full = {**metadata, _HEADER_HASH: _header_hash(metadata, table)}
    content = {"__metadata__": dict(sorted(full.items())), **table}
    return json.dumps(content, separators=(",", ":")).encode()


@contextmanager
def open_container(path: Path) -> Iterator[BufferedReader]:
    """Open a container for reading; trouble inside the block is told as trouble with the file.

    Raises:
        CheckpointError: There is no such file (`MissingCheckpointError`), or the system cannot read
            it.
    """
    # Checked first because opening a pipe would wait for its other end.
    if not path.exists():
        raise MissingCheckpointError(f"{path} does not exist", remedy="check the path")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", remedy="check the path")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}", remedy="check the permissions of the file"
        ) from error


def read_table(file: BufferedReader, path: Path) -> Table:
    """Read and check the header of an open container; no tensor is touched.

    Args:
        file: The container, open at its start.
        path: Its path, for messages.

    Raises:
        CheckpointError: The header is damaged, foreign or hostile.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_take(file, min(_LENGTH_BYTES, size), path), "little")
    if size < _LENGTH_BYTES or not 2 <= length <= _MAX_HEADER_BYTES:
        raise foreign(path, "it is not a safetensors file")
    data_start = _LENGTH_BYTES + length
    if data_start > size:
        raise damaged(path, f"it ends inside its header, after {size:,} of {data_start:,} bytes")
    raw = _take(file, length, path)
    if raw[:1] != b"{":
        raise foreign(path, "it is not a safetensors file")
    try:
        header = strict_json(raw.rstrip(b" "))
        metadata, table = _split(header)
        entries = tuple(sorted(_entries(table), key=lambda entry: (entry.begin, entry.end)))
        sections = _sections(metadata)
        whole = [end for end, _ in sections if end <= size - data_start]
        cut = 0 < len(whole) < len(sections)
        _check_ranges(entries, size - data_start, cut_at=whole[-1] if cut else None)
    except ValueError as error:
        reason = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not text"
        raise damaged(path, f"in its header, {reason}") from error
    return Table(
        metadata=metadata,
        entries=entries,
        data_start=data_start,
        intact=metadata.get(_HEADER_HASH) == _header_hash(metadata, table),
        data_bytes=whole[-1] if cut else size - data_start,
        sections=len(whole) if sections else 1,
        cut=cut,
    )


def read_tensors(file: BufferedReader, path: Path, table: Table) -> dict[str, Tensor]:
    """Read all tensors that an open container holds and check them against the checksum.

    Args:
        file: The container, as `read_table` left it.
        path: Its path, for messages.
        table: What `read_table` returned.

    Raises:
        CheckpointError: The file changed or the bytes do not match their checksum.
    """
    digest = hashlib.sha256()
    tensors = {}
    file.seek(table.data_start)
    for entry in table.entries:
        if entry.end > table.data_bytes:
            break
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        view = _bytes_of(tensor)
        if file.readinto(view) != len(view):
            raise damaged(path, "it became shorter while it was read")
        digest.update(view)
        tensors[entry.name] = tensor
    expected = table.metadata.get(_DATA_HASH)
    if table.cut:
        expected = _sections(table.metadata)[table.sections - 1][1]
    if expected != digest.hexdigest():
        raise damaged(path, "its tensors do not match their checksum")
    return tensors


def _is_plain(name: str) -> bool:
    return bool(name) and name.isprintable()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _take(file: BinaryIO, count: int, path: Path) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise damaged(path, "it became shorter while it was read")
    return data


def _header_hash(metadata: Mapping[str, str], table: Mapping[str, Any]) -> str:
    others = {name: value for name, value in metadata.items() if name != _HEADER_HASH}
    text = json.dumps([others, table], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _split(header: object) -> tuple[dict[str, str], dict[str, Any]]:
    if not isinstance(header, dict):
        raise ValueError("the outermost value is not an object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the metadata are not strings")
    return metadata, {name: value for name, value in header.items() if name != "__metadata__"}


def _entries(table: Mapping[str, Any]) -> Iterable[Entry]:
    for name, value in table.items():
        if not _is_plain(name):
            raise ValueError(f"{shown(name)} cannot be the name of a tensor")
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of {shown(name)} is not dtype, shape and data_offsets")
        code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(f"{shown(name)} has the element type {shown(str(code))}")
        if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"{shown(name)} has no valid shape")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{shown(name)} has no valid byte range")
        dtype = DTYPES[code]
        begin, end = offsets
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the byte range of {shown(name)} does not fit its shape and type")
        yield Entry(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )


def _sections(metadata: Mapping[str, str]) -> list[tuple[int, str]]:
    """Where the sections end, rising, and the checksums of all bytes up to there."""
    if _SECTIONS not in metadata:
        return []
    pairs = strict_json(metadata[_SECTIONS])
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) for pair in pairs
    ):
        raise ValueError(f"{_SECTIONS} is not a list of pairs")
    ends = [pair[0] for pair in pairs]
    if not _are_sizes(ends) or ends != sorted(ends):
        raise ValueError(f"the ends in {_SECTIONS} are not sizes that rise")
    return [(end, digest) for end, digest in pairs]


def _check_ranges(entries: Iterable[Entry], data_bytes: int, *, cut_at: int | None) -> None:
    position = 0
    ends = {0}
    for entry in entries:
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "follows a gap"
            raise ValueError(f"{shown(entry.name)} {problem}")
        position = entry.end
        ends.add(position)
    if cut_at is not None:
        if cut_at not in ends or position <= data_bytes:
            raise ValueError(f"{_SECTIONS} does not fit the tensors")
    elif position != data_bytes:
        raise ValueError(f"{position:,} bytes of tensors are declared, {data_bytes:,} are there")
