from __future__ import annotations

import json
import os
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import CheckpointError, OutputExistsError
from qtool.io.container import (
    DTYPES,
    open_container,
    read_table,
    read_tensors,
    shown,
    strict_json,
    write_container,
)


def _read(path):
    with open_container(path) as file:
        table = read_table(file, path)
        return table, read_tensors(file, path, table)


def _tensors():
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 100, (3, 5), generator=generator)
    tensors = {f"layer.{code.lower()}": whole.to(dtype) for code, dtype in DTYPES.items()}
    return {**tensors, "scalar": torch.tensor(2.5), "none": torch.empty(0, 4), "b": torch.ones(7)}


def _file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_round_trip(tmp_path):
    tensors = _tensors()
    write_container(tmp_path / "a.safetensors", {"x": "1"}, tensors)
    table, found = _read(tmp_path / "a.safetensors")
    assert table.intact
    assert table.metadata["x"] == "1"
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() % tensor.dtype.itemsize == 0


def test_the_safetensors_library_reads_it_and_orders_it_alike(tmp_path):
    path, theirs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {name: tensor for name, tensor in _tensors().items() if tensor.numel()}
    write_container(path, {"format": "pt"}, tensors)
    for name, tensor in safetensors.torch.load_file(path).items():
        assert torch.equal(tensor, tensors[name])
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
    safetensors.torch.save_file(tensors, theirs)
    orders = []
    for each in (path, theirs):
        with open_container(each) as file:
            orders.append([entry.name for entry in read_table(file, each).entries])
    assert orders[0] == orders[1]


def test_same_input_same_bytes(tmp_path):
    tensors = _tensors()
    metadata = {f"key{index}": str(index) for index in range(9)}
    write_container(tmp_path / "a", metadata, tensors)
    write_container(
        tmp_path / "b",
        dict(reversed(metadata.items())),
        {name: tensors[name].clone() for name in reversed(tensors)},
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_that_are_not_plain(tmp_path):
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    write_container(tmp_path / "a", {}, {"transposed": weight.t(), "row": weight[1]})
    _, found = _read(tmp_path / "a")
    assert torch.equal(found["transposed"], weight.t())
    assert torch.equal(found["row"], weight[1])


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a", torch.zeros(2, dtype=torch.complex64), "complex64"),
        ("a", torch.zeros(2, dtype=torch.bool), "bool"),
        ("a\nb", torch.zeros(2), "name of a tensor"),
        ("__metadata__", torch.zeros(2), "name of a tensor"),
        ("", torch.zeros(2), "name of a tensor"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_writing(tmp_path, name, tensor, message):
    with pytest.raises(CheckpointError, match=message):
        write_container(tmp_path / "a", {}, {name: tensor})
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_kept(tmp_path):
    write_container(tmp_path / "a", {}, {"x": torch.zeros(2)})
    with pytest.raises(OutputExistsError):
        write_container(tmp_path / "a", {}, {"x": torch.ones(2)})
    write_container(tmp_path / "a", {}, {"x": torch.ones(2)}, overwrite=True)
    assert _read(tmp_path / "a")[1]["x"].tolist() == [1.0, 1.0]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("absent", "does not exist"), (".", "is not a file"), ("pipe", "is not")):
        with (
            pytest.raises(CheckpointError, match=message) as caught,
            open_container(tmp_path / name),
        ):
            pass
        assert caught.value.remedy


def test_trouble_while_reading_is_a_checkpoint_error(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with (
        pytest.raises(CheckpointError, match="Input/output error"),
        open_container(tmp_path / "a"),
    ):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"[]", b"", "not a safetensors file"),
        (b"{", b"", "not a safetensors file"),
        (b"{]", b"", "not JSON"),
        (b'{"a": \xff\xfe}', b"", "not text"),
        (b'{"a": NaN}', b"", "NaN"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", b"", "in its header"),
        (b'{"a": {}, "a": {}}', b"", "the key 'a' is there twice"),
        ({"__metadata__": {"a": 1}}, b"", "metadata are not strings"),
        ({"__metadata__": []}, b"", "metadata are not strings"),
        ({"a": 1}, b"", "is not dtype, shape and data_offsets"),
        ({"a": {**_entry(), "more": 1}}, b"x" * 8, "is not dtype, shape and data_offsets"),
        ({"a\u202e": _entry()}, b"x" * 8, "cannot be the name"),
        ({"a": _entry(dtype="F4")}, b"x" * 8, "element type 'F4'"),
        ({"a": _entry(dtype=["F32"])}, b"x" * 8, "element type"),
        ({"a": _entry(shape=(-2,))}, b"x" * 8, "no valid shape"),
        ({"a": _entry(shape=(True, 2))}, b"x" * 8, "no valid shape"),
        ({"a": _entry(shape=(2.0,))}, b"x" * 8, "no valid shape"),
        ({"a": _entry(shape=(1,) * 99)}, b"x" * 8, "no valid shape"),
        ({"a": _entry(shape=(2**70,))}, b"x" * 8, "no valid shape"),
        ({"a": _entry(shape=(2**61, 8))}, b"x" * 8, "does not fit its shape"),
        ({"a": _entry(shape=(2**61,), offsets=(0, 2**63))}, b"x" * 8, "no valid byte range"),
        ({"a": _entry(shape=(2**40,), offsets=(0, 2**42))}, b"x" * 8, "8 are there"),
        ({"a": _entry(offsets=(8, 0))}, b"x" * 8, "does not fit its shape"),
        ({"a": _entry(offsets=(0, 8, 9))}, b"x" * 8, "no valid byte range"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, b"x" * 12, "'b' overlaps"),
        ({"a": _entry(), "b": _entry(offsets=(12, 20))}, b"x" * 20, "'b' follows a gap"),
        ({"a": _entry(offsets=(4, 12))}, b"x" * 12, "'a' follows a gap"),
        ({"a": _entry()}, b"x" * 7, "8 bytes of tensors are declared, 7 are there"),
        ({"a": _entry()}, b"x" * 9, "8 bytes of tensors are declared, 9 are there"),
    ],
)
def test_hostile_header(tmp_path, header, data, message):
    path = _file(tmp_path / "a", header, data)
    with pytest.raises(CheckpointError, match=message) as caught, open_container(path) as file:
        read_table(file, path)
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors"),
        (b"1234567", "not a safetensors"),
        (b"\x80\x02}q\x00" * 20, "not a safetensors"),
        (struct.pack("<Q", 2**63) + b"{}", "not a safetensors"),
        (struct.pack("<Q", 10_000_000) + b"{}", "ends inside its header"),
        (struct.pack("<Q", 0), "not a safetensors"),
    ],
)
def test_what_is_no_container(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with (
        pytest.raises(CheckpointError, match=message),
        open_container(tmp_path / "a") as file,
    ):
        read_table(file, tmp_path / "a")


@given(content=st.binary(max_size=200), length=st.integers(0, 220))
def test_any_bytes_raise_nothing_else(tmp_path_factory, content, length):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + content)
    with pytest.raises(CheckpointError):
        _read(path)


def test_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a"
    write_container(path, {}, {"x": torch.zeros(1_000_000)})
    with open_container(path) as file:
        table = read_table(file, path)
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match="became shorter"):
            read_tensors(file, path, table)


def test_strict_json_and_shown():
    assert strict_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
    assert shown("blocks.0") == "'blocks.0'"
    assert shown("\x1b[31m") == r"'\x1b[31m'"
    assert len(shown("x" * 10_000)) < 70
