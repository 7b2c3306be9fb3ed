"""The registry of demoire networks says what the networks are."""

import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from qtool.errors import UsageError
from qtool.models import demoire

names = pytest.mark.parametrize("spec", demoire.NETWORKS, ids=lambda spec: spec.name)


def on_meta(spec):
    with torch.device("meta"):
        return demoire.build(spec.name)


@names
def test_the_registry_describes_what_is_built(spec):
    network = on_meta(spec)
    assert network.size_multiple == spec.size_multiple
    assert network.residual == spec.residual
    parameters = sum(p.numel() for p in network.parameters())
    assert abs(parameters / 1e6 - spec.parameters) < 0.005
    side = 2 * spec.size_multiple
    outputs = network(torch.empty(1, 3, side, side, device="meta"))
    assert [side // out.shape[-1] for out in outputs] == list(spec.scales)
    assert outputs[spec.result].shape[-2:] == (side, side)


@names
def test_blocks_hold_every_layer_once_in_the_order_they_run_in(spec):
    network = on_meta(spec)
    blocks = network.blocks()
    layers = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name in layers:
        assert len([b for b in blocks if name == b or name.startswith(f"{b}.")]) == 1, name
    called = []
    for name in blocks:

        def note(module, inputs, output, name=name):
            assert len(inputs) == 1
            assert isinstance(inputs[0], torch.Tensor)
            assert isinstance(output, torch.Tensor)
            called.append(name)

        network.get_submodule(name).register_forward_hook(note)
    side = 2 * spec.size_multiple
    network(torch.empty(1, 3, side, side, device="meta"))
    assert called == blocks


@names
def test_both_ends_are_named(spec):
    network = on_meta(spec)
    called = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    side = 2 * spec.size_multiple
    network(torch.empty(1, 3, side, side, device="meta"))
    for globs, layer in ((spec.sees, called[0]), (spec.writes, called[-1])):
        found = [name for name in called if any(fnmatchcase(name, glob) for glob in globs)]
        assert layer in found
        assert len(found) <= 5  # ends, not everything


def test_names_are_unique_and_one_network_is_bundled():
    assert len({spec.name for spec in demoire.NETWORKS}) == len(demoire.NETWORKS)
    assert [spec.name for spec in demoire.NETWORKS if spec.bundled] == ["bandgate"]


def test_arguments_replace_those_of_the_registry():
    with torch.device("meta"):
        narrow = demoire.build("esdnet_s", {"growth": 8})
    assert narrow.encoder.encoder_1.rdb.conv_layers[0].conv[0].out_channels == 8
    assert narrow.size_multiple == 64


@pytest.mark.parametrize(("name", "arguments"), [("esdnett", {}), ("esdnet", {"depth": 3})])
def test_what_cannot_be_built_is_a_usage_error(name, arguments):
    with pytest.raises(UsageError):
        demoire.build(name, arguments)


def test_importing_the_registry_leaves_torch_alone():
    code = "import sys, qtool.models.demoire; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
