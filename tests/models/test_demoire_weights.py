"""Weights load key for key, whatever form they come in, or not at all."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool.errors import CheckpointError, QtoolError
from qtool.io.container import write_container
from qtool.models import demoire
from qtool.models.demoire_weights import load_network, metadata

TINY = {"encoder_width": 4, "decoder_width": 4, "growth": 4}


@pytest.fixture(scope="module")
def esdnet():
    torch.manual_seed(0)
    return demoire.build("esdnet").eval()


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return demoire.build("esdnet_s", TINY)


def write(path, state, **header):
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=header)
    return path


def as_pth(path, state):
    torch.save(state, path)


def as_tar(path, state):
    torch.save({"state_dict": state, "optimizer": {"lr": 1.0}, "iters": 5}, path)


def as_parallel(path, state):
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, path)


def as_safetensors(path, state):
    write(path, state)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("w.pth", as_pth),
        ("w.tar", as_tar),
        ("w.pth.tar", as_parallel),
        ("w.safetensors", as_safetensors),
    ],
)
def test_published_forms_load_with_equal_outputs(tmp_path, esdnet, name, form):
    form(tmp_path / name, esdnet.state_dict())
    network = load_network(tmp_path / name)
    assert network.spec.name == "esdnet"
    assert not network.residual
    picture = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(network.module(picture), esdnet(picture), strict=True):
            assert torch.equal(ours, theirs)


def test_a_file_of_ours_brings_its_arguments(tmp_path, tiny):
    path = tmp_path / "tiny.safetensors"
    header = metadata("esdnet_s", TINY, {"licence": "Apache-2.0"})
    write_container(path, header, tiny.state_dict())
    network = load_network(path)
    assert network.arguments["growth"] == 4
    assert network.residual
    assert network.size_multiple == 64
    assert network.provenance == {"licence": "Apache-2.0"}
    assert len(network.sha256) == 64


def test_half_precision_files_become_float32(tmp_path, tiny):
    state = {key: tensor.half() for key, tensor in tiny.state_dict().items()}
    path = write(tmp_path / "h.safetensors", state, **metadata("esdnet_s", TINY, {}))
    assert all(p.dtype == torch.float32 for p in load_network(path).module.parameters())


@pytest.mark.parametrize(
    ("blocks", "wanted", "found"), [(1, "esdnet_l", "esdnet"), (2, "esdnet", "esdnet_l")]
)
def test_the_wrong_depth_is_refused_by_name(tmp_path, blocks, wanted, found):
    state = demoire.build("esdnet", {"sam_blocks": blocks}).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=f"weights of {found}, not of {wanted}"):
        load_network(tmp_path / "w.pth", name=wanted)


def test_mbcnn_variants_are_arguments(tmp_path):
    torch.save(demoire.build("mbcnn").state_dict(), tmp_path / "m.pth")
    network = load_network(tmp_path / "m.pth", arguments={"head": "linear", "dct": "signed"})
    assert network.spec.name == "mbcnn"
    assert network.module.head == "linear"
    assert network.module.pre_block1.adaptive_implicit_trans1.dct == "signed"


def test_nothing_is_loaded_in_part(tmp_path, esdnet):
    state = dict(esdnet.state_dict())
    first, second, third = list(state)[-3:]
    del state[first]
    state["extra.weight"] = torch.zeros(1)
    state[second] = torch.zeros(3)
    state[third] = torch.full_like(state[third], float("nan"))
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load_network(tmp_path / "w.pth")
    for problem in ("missing", "unknown", "another shape", "not finite"):
        assert f"1 tensor {problem}" in caught.value.message.replace("of another", "another")


def test_widths_nobody_published_are_refused(tmp_path):
    torch.save(demoire.build("esdnet", TINY).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="growth 4"):
        load_network(tmp_path / "w.pth")


class _Danger:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("w.pth", b""),
        ("w.pth", b"PK\x03\x04 cut"),
        ("w.tar", pickle.dumps({"state_dict": _Danger()})),
        ("w.safetensors", b"\x08\x00"),
        ("w.txt", b"weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError):
        load_network(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_absent_files_and_empty_dicts(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_network(tmp_path / "none.pth")
    for content in ({}, [1], {"a": 1}, {"a": torch.zeros(2, dtype=torch.int64)}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError):
            load_network(tmp_path / "w.pth")


def test_a_flipped_bit_is_noticed(tmp_path, tiny):
    path = tmp_path / "tiny.safetensors"
    write_container(path, metadata("esdnet_s", TINY, {}), tiny.state_dict())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="checksum"):
        load_network(path)


@settings(max_examples=25)
@given(
    st.dictionaries(
        st.sampled_from(["network", "network_args", "provenance"]),
        st.one_of(
            st.sampled_from(["esdnet_s", "mbcnn", {}, {"growth": 512}, {"growth": 10**9}]),
            st.recursive(st.none() | st.booleans() | st.text(max_size=5), st.lists, max_leaves=4),
        ),
    )
)
def test_any_description_loads_or_is_a_qtool_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "described.safetensors"
    write(path, {"a": torch.zeros(1)}, **{"format": "pt", "qtool.demoire": json.dumps(content)})
    with pytest.raises(QtoolError):
        load_network(path)
