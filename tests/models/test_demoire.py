"""The registry of demoire networks says what the networks are."""

import subprocess
import sys

import pytest
import torch

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
