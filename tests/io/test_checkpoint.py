from __future__ import annotations

import contextlib
import json
import math
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qtool.errors import CheckpointError, OutputExistsError
from qtool.io import checkpoint
from qtool.io.checkpoint import Header, LayerBits
from qtool.io.container import write_container

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def _layer(name, shape, bits, input_bits):
    generator = torch.Generator().manual_seed(bits)
    columns = math.prod(shape[1:])
    row = sum(math.ceil(columns * width / 8) for width in PLANES[bits])
    tensors = {
        "weight_packed": torch.randint(0, 256, (shape[0], row), generator=generator).byte(),
        "weight_scale": torch.rand(shape[0], generator=generator) + 0.01,
        "weight_zero_point": torch.full((shape[0],), 2 ** (bits - 1), dtype=torch.int32),
        "weight_shape": torch.tensor(shape),
        "bias": torch.rand(shape[0], generator=generator),
    }
    if input_bits:
        tensors["input_scale"] = torch.tensor(0.1)
        tensors["input_zero_point"] = torch.tensor(2**input_bits - 1, dtype=torch.int32)
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def _model(bits=4):
    """A header and tensors with one layer of each kind."""
    header = Header(
        architecture="vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        model_args={"img_size": (32, 32), "depth": 1},
        data={"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "crop_pct": 0.9},
        engine="fixed",
        bits=[f"w{bits}a4"],
        active_bits=f"w{bits}a4",
        layers={
            "patch_embed.proj": LayerBits(kind="conv", weight_bits=bits, input_bits=None),
            "blocks.0.attn": LayerBits(
                kind="attention", weight_bits=None, input_bits=4, options={"probabilities": "log2"}
            ),
            "blocks.0.attn.qkv": LayerBits(kind="linear", weight_bits=bits, input_bits=4),
        },
        quantization_config={"quant_method": "qtool", "format": "pack-quantized"},
        provenance={"qtool": "0.1.0", "method": "spdfq", "seed": 0, "weights_sha256": "0" * 64},
    )
    tensors = {
        **_layer("patch_embed.proj", (6, 3, 3, 3), bits, None),
        **_layer("blocks.0.attn.qkv", (9, 7), bits, 4),
        "blocks.0.attn.products.query_scale": torch.tensor([0.5]),
        "blocks.0.attn.products.query_zero_point": torch.tensor([15], dtype=torch.int32),
        "blocks.0.norm1.weight": torch.rand(7, dtype=torch.float32).half(),
        "cls_token": torch.zeros(1, 1, 7),
    }
    return header, tensors


def _store(path, header, tensors, **metadata):
    """Write without the checks of `checkpoint.write`."""
    config = header if isinstance(header, str) else json.dumps(header.model_dump())
    full = {"format": "pt", "qtool.format": "1", "qtool.config": config, **metadata}
    write_container(path, full, tensors)
    return path


def _refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.read(path)
    assert caught.value.remedy
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("bits", range(2, 9))
def test_round_trip_at_every_width(tmp_path, bits):
    header, tensors = _model(bits)
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, header, tensors)
    found, values = checkpoint.read(path)
    assert found == header == checkpoint.read_header(path)
    assert found.model_args["img_size"] == [32, 32]
    assert values.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert values[name].dtype == tensor.dtype
        assert torch.equal(values[name], tensor)


def test_metadata_and_mode(tmp_path):
    header, tensors = _model()
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, header, tensors)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["qtool.format"] == "1"
    assert json.loads(metadata["qtool.config"])["quantization_config"]["quant_method"] == "qtool"
    assert path.stat().st_mode & 0o077 != 0


def test_same_input_same_bytes(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(0)
        checkpoint.write(tmp_path / name, *_model())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_existing_file_is_kept(tmp_path):
    header, tensors = _model()
    checkpoint.write(tmp_path / "a", header, tensors)
    with pytest.raises(OutputExistsError):
        checkpoint.write(tmp_path / "a", header, tensors)
    checkpoint.write(tmp_path / "a", header, tensors, overwrite=True)


def test_layers_keep_their_order_and_nothing_else_does(tmp_path):
    header, tensors = _model()
    values = header.model_dump()
    attention = values["layers"]["blocks.0.attn"]
    values["layers"] |= {"blocks.2.attn": attention, "blocks.10.attn": attention}
    checkpoint.write(tmp_path / "a", Header(**values), tensors)
    found = checkpoint.read_header(tmp_path / "a")
    assert list(found.layers) == list(values["layers"])
    values["provenance"] = dict(reversed(values["provenance"].items()))
    checkpoint.write(tmp_path / "b", Header(**values), tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_byte_zero_points_of_eight_bits(tmp_path):
    header, tensors = _model(8)
    zero_point = torch.arange(9, dtype=torch.uint8) * 31
    tensors["blocks.0.attn.qkv.weight_zero_point"] = zero_point
    checkpoint.write(tmp_path / "a", header, tensors)
    found = checkpoint.read(tmp_path / "a")[1]["blocks.0.attn.qkv.weight_zero_point"]
    assert torch.equal(found, zero_point)


def test_zero_points_may_be_bytes_and_scales_half(tmp_path):
    header, tensors = _model()
    for name in list(tensors):
        if name.endswith("zero_point"):
            tensors[name] = tensors[name].to(torch.uint8)
        if name.endswith("_scale"):
            tensors[name] = tensors[name].half()
    tensors["blocks.0.attn.qkv.input_scale"] = torch.tensor([0.5])
    del tensors["blocks.0.attn.qkv.bias"]
    checkpoint.write(tmp_path / "a", header, tensors)
    assert checkpoint.read(tmp_path / "a")[0] == header


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight_packed", None, "weight_packed' is missing"),
        ("weight_scale", None, "weight_scale' is missing"),
        ("weight_zero_point", None, "weight_zero_point' is missing"),
        ("weight_shape", None, "weight_shape' is missing"),
        ("input_scale", None, "input_scale' is missing"),
        ("input_zero_point", None, "input_zero_point' is missing"),
        ("weight", torch.zeros(9, 7), "weight' does not belong"),
        ("weight_shape", torch.tensor([9, 7], dtype=torch.int32), "type I64"),
        ("weight_shape", torch.tensor([9, 7, 1, 1]), "2 integers"),
        ("weight_shape", torch.tensor([9, -7]), "impossible"),
        ("weight_shape", torch.tensor([9, 2**40]), "impossible"),
        ("weight_shape", torch.tensor([9, 9]), r"take uint8 \(9, 5\)"),
        ("weight_shape", torch.tensor([8, 7]), r"take uint8 \(8, 4\)"),
        ("weight_packed", torch.zeros(9, 4, dtype=torch.int32), "weight_packed is int32"),
        ("weight_packed", torch.zeros(36, dtype=torch.uint8), r"weight_packed is uint8 \(36,\)"),
        ("bias", torch.zeros(8), "bias is"),
        ("weight_scale", torch.ones(9, 1), "weight_scale is float32"),
        ("weight_scale", torch.ones(9, dtype=torch.float64), "weight_scale is float64"),
        ("weight_scale", torch.full((9,), float("inf")), "weight_scale is not positive"),
        ("weight_scale", torch.zeros(9), "weight_scale is not positive"),
        ("weight_zero_point", torch.full((9,), 16, dtype=torch.int32), r"leaves 0\.\.15"),
        ("weight_zero_point", torch.full((9,), -1, dtype=torch.int32), r"leaves 0\.\.15"),
        ("weight_zero_point", torch.zeros(9), "weight_zero_point is float32"),
        ("input_scale", torch.ones(2), "input_scale is"),
        ("input_scale", torch.tensor(float("nan")), "input_scale is not positive"),
        ("input_zero_point", torch.tensor(16, dtype=torch.int32), r"leaves 0\.\.15"),
    ],
)
def test_layer_that_does_not_fit_its_header(tmp_path, name, tensor, message):
    header, tensors = _model()
    full = f"blocks.0.attn.qkv.{name}"
    if tensor is None:
        del tensors[full]
    else:
        tensors[full] = tensor
    with pytest.raises(CheckpointError, match=message):
        checkpoint.write(tmp_path / "a", header, tensors)
    assert list(tmp_path.iterdir()) == []
    _refused(_store(tmp_path / "b", header, tensors), message)


@pytest.mark.parametrize(
    ("leaf", "tensor", "message"),
    [
        ("query_scale", torch.tensor([float("nan")]), "query_scale is not positive"),
        ("query_scale", torch.ones(3), "query_scale is float32"),
        ("query_zero_point", torch.tensor([16], dtype=torch.int32), r"query_zero_point leaves 0"),
        ("query", torch.ones(1), "'query' does not belong"),
        ("query_table", torch.zeros(16, dtype=torch.uint8), "query_table is uint8"),
        ("query_table", torch.arange(256).to(torch.uint8), "256 levels, but 4 bits"),
    ],
)
def test_attention_that_does_not_fit_its_header(tmp_path, leaf, tensor, message):
    header, tensors = _model()
    tensors[f"blocks.0.attn.products.{leaf}"] = tensor
    _refused(_store(tmp_path / "a", header, tensors), message)


def test_a_table_belongs_to_a_layer_that_has_one(tmp_path):
    header, tensors = _model()
    name = "blocks.0.attn.qkv"
    table = torch.arange(256) // 16 * 16
    tensors[f"{name}.input_table"] = table.to(torch.uint8)
    _refused(_store(tmp_path / "a", header, tensors), "input_table' does not belong")
    layers = dict(header.layers)
    layers[name] = layers[name].model_copy(update={"options": {"quantizer": "table"}})
    header = header.model_copy(update={"layers": layers})
    tensors[f"{name}.input_zero_point"] = torch.tensor([200], dtype=torch.int32)
    checkpoint.write(tmp_path / "b", header, tensors)
    assert torch.equal(checkpoint.read(tmp_path / "b")[1][f"{name}.input_table"].long(), table)
    tensors[f"{name}.input_table"] = torch.arange(256).to(torch.uint8)
    _refused(_store(tmp_path / "c", header, tensors), "256 levels, but 4 bits")
    del tensors[f"{name}.input_table"]
    _refused(_store(tmp_path / "d", header, tensors), "input_table' is missing")


def test_tensors_of_a_layer_that_the_header_does_not_have(tmp_path):
    header, tensors = _model()
    tensors.update(_layer("head", (5, 7), 4, 4))
    _refused(_store(tmp_path / "a", header, tensors), "belongs to no layer of the header")


def test_input_tensors_of_a_float_input_are_surplus(tmp_path):
    header, tensors = _model()
    tensors["patch_embed.proj.input_scale"] = torch.tensor(1.0)
    _refused(_store(tmp_path / "a", header, tensors), "input_scale' does not belong")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "magic"}, "engine"),
        ({"engine": None}, "engine"),
        ({"surplus": 1}, "surplus"),
        ({"bits": []}, "bits"),
        ({"bits": ["w9a9"]}, "bits"),
        ({"active_bits": "w8a8"}, "active_bits w8a8 is not one of bits"),
        ({"architecture": "rm -rf /"}, "architecture"),
        ({"architecture": 7}, "architecture"),
        ({"model_args": []}, "model_args"),
        ({"layers": {"a\x1b": {"kind": "linear", "weight_bits": 4, "input_bits": 4}}}, "layers"),
        ({"layers": {"a": {"kind": "pickle", "weight_bits": 4, "input_bits": 4}}}, "kind"),
        ({"layers": {"a": {"kind": "linear", "weight_bits": 99, "input_bits": 4}}}, "weight_bits"),
        ({"layers": {"a": {"kind": "linear", "weight_bits": "4", "input_bits": 4}}}, "weight_bits"),
        (
            {"layers": {"a": {"kind": "linear", "weight_bits": None, "input_bits": 4}}},
            "weight_bits",
        ),
        ({"layers": {"a": {"kind": "linear", "weight_bits": 4}}}, "input_bits"),
    ],
)
def test_wrong_config(tmp_path, change, message):
    header, tensors = _model()
    path = _store(tmp_path / "a", json.dumps({**header.model_dump(), **change}), tensors)
    _refused(path, message)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_header(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "damaged"),
        ('{"a": 1, "a": 2}', "there twice"),
        ('{"a": Infinity}', "Infinity"),
        ("[" * 100_000, "nested"),
        ("9" * 10_000, "damaged"),
    ],
)
def test_config_that_is_no_json(tmp_path, config, message):
    _refused(_store(tmp_path / "a", config, _model()[1]), message)


def test_newer_format_names_what_is_needed(tmp_path):
    header, tensors = _model()
    path = _store(tmp_path / "a", header, tensors, **{"qtool.format": "2"})
    _refused(path, "format '2'; this qtool reads format 1")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_header(path)
    assert "pip install" in caught.value.remedy


@pytest.mark.parametrize("version", ["", "one", "-1", "²"])
def test_format_that_is_no_number(tmp_path, version):
    header, tensors = _model()
    path = _store(tmp_path / "a", header, tensors, **{"qtool.format": version})
    _refused(path, "not a qtool checkpoint")


def test_foreign_safetensors(tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "a")
    _refused(tmp_path / "a", "not a qtool checkpoint")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "b", {"format": "pt"})
    _refused(tmp_path / "b", "not a qtool checkpoint")


def test_pickle_is_not_opened(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "a.pth")
    _refused(tmp_path / "a.pth", "not a safetensors file")


def test_engine_of_a_later_version_is_named(tmp_path):
    header, tensors = _model()
    later = header.model_copy(update={"engine": "branches"})
    path = _store(tmp_path / "a", later, tensors)
    assert checkpoint.read_header(path).engine == "branches"
    _refused(path, "engine 'branches'")
    with pytest.raises(CheckpointError, match="engine 'branches'"):
        checkpoint.write(tmp_path / "b", later, tensors)


def test_missing_file(tmp_path):
    _refused(tmp_path / "absent", "does not exist")


def test_header_that_json_cannot_hold():
    header, _ = _model()
    for value in (float("nan"), torch.float32, {1, 2}):
        with pytest.raises(ValidationError):
            Header(**{**header.model_dump(), "provenance": {"value": value}})


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a"
    checkpoint.write(path, *_model())
    return path.read_bytes()


def _fails_cleanly(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    assert caught.value.message.isprintable()
    with contextlib.suppress(CheckpointError):
        checkpoint.read_header(path)


@given(data=st.data())
def test_truncation_is_always_noticed(tmp_path_factory, content, data):
    length = data.draw(st.integers(0, len(content) - 1))
    _fails_cleanly(tmp_path_factory.getbasetemp() / "cut", content[:length])


@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, content, data):
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    place = data.draw(st.integers(0, header_end - 1) | st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    _fails_cleanly(tmp_path_factory.getbasetemp() / "flipped", bytes(changed))


@given(data=st.data())
def test_many_changed_bytes_raise_nothing_else(tmp_path_factory, content, data):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(2, 12))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if bytes(changed) != content:
        _fails_cleanly(tmp_path_factory.getbasetemp() / "mangled", bytes(changed))


@given(data=st.data())
def test_changed_numbers_in_the_header_are_noticed(tmp_path_factory, content, data):
    """Digits stay digits here, so that the header stays JSON and its checksum has to speak."""
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    digits = [place for place in range(8, header_end) if chr(content[place]).isdigit()]
    changed = bytearray(content)
    place = data.draw(st.sampled_from(digits))
    changed[place] = data.draw(st.sampled_from([d for d in b"123456789" if d != content[place]]))
    _fails_cleanly(tmp_path_factory.getbasetemp() / "digits", bytes(changed))


def test_a_task_is_written_where_it_is_not_classification(tmp_path):
    header, tensors = _model()
    assert "task" not in header.to_json()
    values = header.model_dump()
    restoring = Header(**{**values, "task": "restoration"})
    checkpoint.write(tmp_path / "r.safetensors", restoring, tensors)
    assert checkpoint.read_header(tmp_path / "r.safetensors").task == "restoration"
    checkpoint.write(tmp_path / "c.safetensors", header, tensors)
    assert checkpoint.read_header(tmp_path / "c.safetensors").task == "classification"
    with pytest.raises(ValidationError):
        Header(**{**values, "task": "segmentation"})
    with pytest.raises(ValidationError):
        Header(**{**values, "task": "restoration", "engine": "branches"})
