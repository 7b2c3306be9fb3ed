"""Networks of branches in checkpoints: whole, cut off, damaged."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch

from qtool.api import branch_model
from qtool.api.load import load
from qtool.api.switch_bits import switch_bits
from qtool.engine import ops
from qtool.errors import CheckpointError, QtoolError, UsageError
from qtool.io import checkpoint
from qtool.io.container import change_metadata, read_table
from qtool.quant.widths import bits as at_bits
from qtool.settings.switch_bits import SwitchBitsSettings


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def changed(path, name, change):
    """Write a file again with one tensor changed."""
    header, tensors = checkpoint.read(path)
    tensors[name] = change(tensors[name])
    checkpoint.write(path, header, tensors, overwrite=True)
    return path


@torch.no_grad()
def test_switching_back_equals_a_fresh_load(branch_file, images):
    model = load(branch_file)
    assert model.active_bits == "w8a8"
    fresh = model(images)
    model.set_bits(3)
    low = model(images)
    model.set_bits(8)
    assert torch.equal(model(images), fresh)
    assert torch.equal(load(branch_file, bits=3)(images), low)
    assert torch.equal(load(branch_file)(images, bits="w3a3"), low)
    with at_bits(3):
        assert torch.equal(model(images), low)
    assert not torch.equal(low, fresh)
    assert model.qtool_config.engine == "branches"
    assert model.num_classes == 3


def test_branches_have_codes_of_two_bits_and_sections_of_their_own(branch_file):
    header, tensors = checkpoint.read(branch_file)
    name = "layer2.0.conv1"
    assert header.branches.weight_bits == [2, 2, 2, 2]
    options = header.layers[name].options
    for number in range(1, 5):
        packed = tensors[f"{name}.p{number}"]
        assert packed.shape == (16, 8 * 9 // 4)
        assert int(ops.unpack_codes(packed, 2, 72).max()) <= 3
    assert not torch.equal(tensors[f"{name}.p2"], tensors[f"{name}.p3"])
    assert 0.4 < options["narrow_macs"] / options["macs"] < 0.6 or options["narrow_macs"] > 0
    with branch_file.open("rb") as file:
        assert read_table(file, branch_file).sections == 5


@torch.no_grad()
def test_a_file_cut_off_behind_a_branch_serves_the_widths_of_the_rest(branch_file, images):
    whole = load(branch_file)
    with branch_file.open("rb") as file:
        table = read_table(file, branch_file)
    end = table.data_start + json.loads(table.metadata["qtool.sections"])[3][0]
    cut = Path("cut.safetensors")
    cut.write_bytes(branch_file.read_bytes()[:end])
    with pytest.raises(UsageError, match="cannot run at w8a8"):
        load(cut)
    for bits in (2, 3, 4, 6, 7, 8, 5):
        name = f"w{bits}a{bits}"
        if bits in (2, 3, 4):
            assert torch.equal(load(cut, bits=bits)(images), whole(images, bits=bits))
        else:
            with pytest.raises(UsageError, match=f"cannot run at {name}"):
                load(cut, bits=bits)
    # Of four branches the first alone computes 2 bits; the second has no width without the third.
    end = table.data_start + json.loads(table.metadata["qtool.sections"])[1][0]
    cut.write_bytes(branch_file.read_bytes()[:end])
    assert torch.equal(load(cut, bits=2)(images), whole(images, bits=2))


def test_a_file_without_any_branch_is_damaged(branch_file):
    with branch_file.open("rb") as file:
        table = read_table(file, branch_file)
    end = table.data_start + json.loads(table.metadata["qtool.sections"])[0][0]
    branch_file.write_bytes(branch_file.read_bytes()[:end])
    with pytest.raises(CheckpointError, match="ends before the first plane"):
        load(branch_file)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("layer1.0.conv1.act", lambda t: t * 0, "act is not finite and, for act, positive"),
        ("layer1.0.conv1.p2", lambda t: t[:, :-1], "p2 is uint8"),
        ("layer3.0.conv2.alpha", lambda t: t[1:], "alpha is float32"),
    ],
)
def test_what_does_not_fit_the_header_is_not_written(branch_file, name, change, words):
    with pytest.raises(CheckpointError, match=words):
        changed(branch_file, name, change)


@pytest.mark.parametrize("name", ["head.linear.weight", "stem.conv1.weight"])
def test_shared_parts_of_another_shape_do_not_load(branch_file, name):
    changed(branch_file, name, lambda tensor: tensor[1:])
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load(branch_file)


def test_headers_of_other_networks_do_not_load(branch_file):
    header, tensors = checkpoint.read(branch_file)
    for update in ({"architecture": "resnet20"}, {"model_args": {"width": 16, "num_classes": 3}}):
        other = header.model_copy(update=update)
        checkpoint.write(branch_file, other, tensors, overwrite=True)
        with pytest.raises(CheckpointError, match="does not fit the architecture"):
            load(branch_file)


def test_tensors_that_belong_to_nothing_do_not_load(branch_file):
    header, tensors = checkpoint.read(branch_file)
    tensors["surplus"] = torch.zeros(1)
    checkpoint.write(branch_file, header, tensors, overwrite=True)
    with pytest.raises(CheckpointError, match="surplus"):
        load(branch_file)


def test_only_frozen_networks_are_stored(branch_file):
    model = load(branch_file)
    model.bodies[0].units["layer1_0_conv1"] = torch.nn.Identity()
    with pytest.raises(TypeError, match="not frozen"):
        branch_model._unit_of(model, 0, "layer1.0.conv1")


ODD = [None, True, -1, 0, 1, 7, 2**63, "", "w2a2", [], {}, [0, 0], [9, 1], {"a": 1}]


def places(value, path=()):
    """Every place in a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from places(value[key], (*path, key))


def test_odd_headers_are_refused_or_work(branch_file):
    random_numbers = random.Random(0)
    config = json.loads(checkpoint.read_header(branch_file).to_json())
    interesting = [p for p in places(config) if p[0] in ("branches", "layers", "bits", "engine")]
    refused = []
    for _ in range(60):
        changed_config = copy.deepcopy(config)
        *way, last = random_numbers.choice(interesting)
        inner = changed_config
        for key in way:
            inner = inner[key]
        inner[last] = random_numbers.choice(ODD)
        odd = Path("odd.safetensors")
        with odd.open("wb") as file:
            change_metadata(branch_file, {"qtool.config": json.dumps(changed_config)}, copy=file)
        for use in (load, listed):
            try:
                use(odd)
            except QtoolError as error:
                refused.append(error.message)
    assert len(refused) > 60
    assert not [message for message in refused if "\n" in message]


def listed(path):
    return switch_bits(SwitchBitsSettings.build({"target": path, "listing": True}))
