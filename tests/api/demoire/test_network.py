"""Which weights a run takes, and how much memory its network may have."""

from dataclasses import replace

import pytest
import torch

from qtool.api.demoire import network as networks
from qtool.errors import CheckpointError, MissingError
from qtool.models import demoire, demoire_weights
from qtool.settings.demoire import DemoireSettings


def test_named_weights_are_taken_and_must_fit_the_model(weights):
    settings = DemoireSettings(out="x", weights=weights, model="esdnet")
    with pytest.raises(CheckpointError, match="weights of esdnet_s, not of esdnet"):
        networks.open_network(settings)
    opened = networks.open_network(settings.model_copy(update={"model": None}))
    restorer = networks.make_restorer(opened, torch.device("cpu"))
    assert restorer.multiple == 64
    assert restorer.result == 0


def test_variants_reach_the_network(tmp_path):
    torch.save(demoire.build("mbcnn").state_dict(), tmp_path / "m.pth")
    settings = DemoireSettings(
        out="x", weights=tmp_path / "m.pth", head="linear", transform="signed"
    )
    opened = networks.open_network(settings)
    assert opened.module.head == "linear"
    assert opened.spec.result == 2


def test_absent_weights(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file"):
        networks.weights_sha256(DemoireSettings(out="x", weights=tmp_path / "none.pth"))
    with pytest.raises(MissingError, match="57 MB"):
        networks.weights_path(DemoireSettings(out="x", model="mbcnn"))


def test_a_bound_counts_what_is_held_already():
    settings = DemoireSettings(out="x", max_memory="8G")
    cpu = torch.device("cpu")
    small = networks.memory_for_network(settings, cpu, 10**6)
    large = networks.memory_for_network(settings, cpu, 10**8)
    assert 0 < networks.resident_memory() < 8 * 2**30
    assert small - large == 99 * 10**6 * 48
    assert small < 8 * 2**30 - networks.resident_memory() + 2**28


def test_without_a_bound_a_share_of_free_memory_is_taken():
    free = networks.free_memory()
    share = networks.memory_for_network(DemoireSettings(out="x"), torch.device("cpu"), 0)
    assert 0 < share < free * 1.2


def test_a_quantized_network_is_what_its_file_says(quantize_network, gates, tmp_path):
    path = tmp_path / "q.safetensors"
    quantize_network(gates, out=path, bits="w4a8")
    opened = networks.open_network(DemoireSettings(out="x", weights=path, model="bandgate"))
    restorer = networks.make_restorer(opened, torch.device("cpu"))
    assert (restorer.multiple, restorer.result, restorer.bfloat16) == (4, 0, False)
    assert restorer.bytes_per_pixel > opened.spec.bytes_per_pixel
    with pytest.raises(CheckpointError, match="weights of bandgate, not of mbcnn"):
        networks.open_network(DemoireSettings(out="x", weights=path, model="mbcnn"))
    whole = path.read_bytes()
    for content, said in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged"),
        (whole[:-100], "not a readable safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            networks.open_network(DemoireSettings(out="x", weights=path))


def test_tiles_of_a_quantized_network_meet(quantize_network, gates, tmp_path):
    path = tmp_path / "q.safetensors"
    quantize_network(gates, out=path, bits="w4a8")
    opened = networks.open_network(DemoireSettings(out="x", weights=path))
    restorer = networks.make_restorer(opened, torch.device("cpu"))
    down, across = torch.meshgrid(torch.arange(150), torch.arange(201), indexing="ij")
    picture = 0.5 + 0.3 * torch.stack(
        [torch.sin(down / 2 + across / period) for period in (3, 7, 40)]
    )

    def read(rows, columns):
        return picture[:, rows][:, :, columns]

    whole = restorer.change(read, 150, 201, tile=0)
    tiled = restorer.change(read, 150, 201, tile=64, overlap=24)
    assert float(whole.values.abs().mean()) > 2 / 255
    assert float((whole.values - tiled.values).abs().mean()) < 1 / 255
    assert tiled.seam < 1 / 255


def test_bfloat16_changes_the_bundled_result_by_less_than_half_a_step():
    network = demoire_weights.load_network(demoire_weights.bundled_path())
    random = torch.Generator().manual_seed(0)
    wave = torch.linspace(0, 90, 320).sin() * 0.15
    picture = 0.5 + wave.view(-1, 1) * wave + 0.02 * torch.randn(3, 320, 320, generator=random)
    short, full = (
        replace(networks.make_restorer(network, torch.device("cpu")), bfloat16=bfloat16).change(
            lambda rows, columns: picture[:, rows][:, :, columns], 320, 320, tile=0
        )
        for bfloat16 in (True, False)
    )
    difference = 255 * (short.values - full.values).abs()
    assert float(255 * full.values.abs().mean()) > 1
    assert 0 < float(difference.mean()) < 0.5
    assert float(difference.max()) < 5


def test_the_bundled_network_in_its_tiles_is_near_whole():
    network = demoire_weights.load_network(demoire_weights.bundled_path())
    restorer = networks.make_restorer(network, torch.device("cpu"))
    wave = torch.linspace(0, 400, 1536).sin() * 0.2
    random = torch.Generator().manual_seed(0)
    picture = 0.5 + wave.view(-1, 1) * wave + 0.02 * torch.randn(3, 1536, 1536, generator=random)
    whole, tiled = (
        restorer.change(
            lambda rows, columns: picture[:, rows][:, :, columns], 1536, 1536, tile=tile
        )
        for tile in (0, None)
    )
    assert (whole.tile, tiled.tile) == (0, 512)
    assert float(whole.values.abs().mean()) > 1 / 255
    assert float((whole.values - tiled.values).abs().mean()) < 0.1 / 255
    assert tiled.seam < 1 / 255
