"""One picture, whole or in tiles: nothing is lost, and nothing bad is passed on."""

import logging

import pytest
import torch
from torch import nn

from qtool.methods.undem.restoration import (
    BadOutputError,
    Restorer,
    apply_change,
    colour_fit,
    is_out_of_memory,
)
from qtool.models import demoire


class Pointwise(nn.Module):
    """Adds a fixed function of each pixel, so that tiles make no difference at all."""

    def forward(self, x):
        return x[..., ::2, ::2], x + 0.1 * torch.sin(9 * x)


class Local(nn.Module):
    """A blur, which sees a few pixels around each."""

    def forward(self, x):
        padded = nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
        return x, nn.functional.avg_pool2d(padded, 5, 1)


def restorer(network, **settings):
    chosen = {"result": 1, "multiple": 32, "bytes_per_pixel": 100, **settings}
    return Restorer(network=network, device=torch.device("cpu"), **chosen)


def reader(picture):
    return lambda rows, columns: picture[:, rows][:, :, columns]


@pytest.fixture
def picture():
    return torch.rand(3, 150, 203, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tile", [0, 64, 96, 512])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pointwise_network_gives_the_same_in_any_tiles(picture, tile, batch_size):
    change = restorer(Pointwise(), batch_size=batch_size).change(
        reader(picture), 150, 203, tile=tile, overlap=16
    )
    expected = (picture + 0.1 * torch.sin(9 * picture)).clamp(0, 1) - picture
    assert torch.allclose(change.values, expected, atol=1e-6)
    assert change.tile == tile
    assert change.seam < 1e-6


def test_a_local_network_shows_no_seams(picture):
    whole = restorer(Local()).change(reader(picture), 150, 203, tile=0).values
    tiled = restorer(Local()).change(reader(picture), 150, 203, tile=64, overlap=16)
    assert (tiled.values - whole)[:, 8:-8, 8:-8].abs().mean() < 0.3 / 255


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (33, 1), (64, 64), (65, 31)])
def test_sizes_that_fit_no_multiple(size):
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    change = restorer(Pointwise()).change(reader(picture), *size)
    assert change.values.shape == picture.shape


def test_colours_outside_srgb_are_left_alone():
    picture = torch.full((3, 32, 32), 1.2)
    network = nn.Module()
    network.forward = lambda x: (x, x)
    assert restorer(network).change(reader(picture), 32, 32).values.abs().max() == 0


class Greedy(nn.Module):
    """Runs out of memory above a certain size."""

    def __init__(self, side):
        super().__init__()
        self.side, self.tried = side, []

    def forward(self, x):
        self.tried.append(x.shape[-1])
        if x.shape[-1] > self.side:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return x, x


def test_memory_that_runs_out_halves_tiles_down_to_the_smallest():
    picture = torch.rand(3, 1100, 1100)
    greedy = Greedy(512)
    change = restorer(greedy).change(reader(picture), 1100, 1100)
    assert change.tile == 512
    assert list(dict.fromkeys(greedy.tried)) == [1120, 640, 416]
    with pytest.raises(MemoryError):
        restorer(Greedy(100)).change(reader(picture), 1100, 1100)


def test_an_explicit_tile_is_never_replaced():
    picture = torch.rand(3, 1100, 1100)
    greedy = Greedy(512)
    with pytest.raises(MemoryError):
        restorer(greedy).change(reader(picture), 1100, 1100, tile=1024)
    assert greedy.tried == [1024]
    assert restorer(greedy).change(reader(picture), 1100, 1100, tile=256).tile == 256


def test_a_memory_bound_decides_the_tiles():
    picture = torch.rand(3, 1100, 1100)
    bounds = {200 * 2**20: 0, 110 * 10**6: 1024, 50 * 10**6: 512, 1: 512}
    for memory, tile in bounds.items():
        change = restorer(Pointwise()).change(reader(picture), 1100, 1100, memory=memory)
        assert change.tile == tile


@pytest.mark.parametrize(("size", "tile"), [((1100, 1100), 512), ((1024, 1024), 0), ((40, 99), 0)])
def test_large_pictures_go_in_the_tiles_that_are_fastest(size, tile):
    cut = restorer(Pointwise(), tile=512)
    assert cut.change(reader(torch.rand(3, *size)), *size).tile == tile
    assert cut.change(reader(torch.rand(3, *size)), *size, tile=0).tile == 0


def test_other_errors_are_not_taken_for_lack_of_memory():
    network = nn.Module()
    network.forward = lambda x: x.view(-1, 7)
    with pytest.raises(RuntimeError, match="invalid"):
        restorer(network).change(reader(torch.rand(3, 32, 32)), 32, 32)
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(ValueError("x"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(lambda x: x * float("nan"), "not numbers"), (lambda x: x * 0 + 0.3, "one colour")],
)
def test_output_that_is_no_picture_is_refused(picture, spoil, said):
    network = nn.Module()
    network.forward = lambda x: (x, spoil(x))
    with pytest.raises(BadOutputError, match=said):
        restorer(network).change(reader(picture), 150, 203)


def test_a_flat_picture_may_stay_flat():
    flat = torch.full((3, 64, 64), 0.4)
    assert restorer(Pointwise()).change(reader(flat), 64, 64).values.std() < 1e-6


class Moody(nn.Module):
    """Gives each tile another brightness."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return x, x + 0.1 * (self.count % 2)


def test_tiles_that_disagree_are_reported(picture, caplog):
    with caplog.at_level(logging.WARNING):
        dark = reader(picture * 0.5)
        change = restorer(Moody()).change(dark, 150, 203, tile=96, overlap=12)
    assert change.seam == pytest.approx(0.1, abs=0.02)
    assert "disagree" in caplog.text


class Narrow(nn.Module):
    """Sees the left and right ends of a tile, and says so where tiles are small."""

    def __init__(self, small, *, most=2048):
        super().__init__()
        self.small, self.most, self.tried = small, most, []

    def forward(self, x):
        side = x.shape[-1]
        self.tried.append(side)
        if side > self.most:
            raise MemoryError
        slope = torch.linspace(0, 0.2, side) if side <= self.small else torch.zeros(side)
        return x, x + slope


def test_tiles_that_disagree_are_tried_larger(caplog):
    dark = reader(torch.rand(3, 1100, 2100) * 0.5)
    room = 105 * 10**6
    narrow = Narrow(small=600)
    change = restorer(narrow, tile=512).change(dark, 1100, 2100, memory=room)
    assert (change.tile, change.seam) == (1024, 0)
    assert "disagree" not in caplog.text
    named = restorer(Narrow(small=600)).change(dark, 1100, 2100, tile=512)
    assert named.tile == 512
    assert named.seam > 2 / 255


@pytest.mark.parametrize("case", ["little room", "no memory", "no better"])
def test_what_larger_tiles_cannot_mend_is_reported(case, caplog):
    dark = reader(torch.rand(3, 1100, 2100) * 0.5)
    room = (40 if case == "little room" else 105) * 10**6
    narrow = Narrow(small=2000, most=600 if case == "no memory" else 2048)
    with caplog.at_level(logging.WARNING):
        change = restorer(narrow, tile=512).change(dark, 1100, 2100, memory=room)
    assert change.tile == (1024 if case == "no better" else 512)
    assert (max(narrow.tried) > 600) == (case != "little room")
    assert "disagree" in caplog.text


def test_tone_is_kept_and_bands_stay_removed():
    """The network darkens everything and takes out a band; the fit undoes the first alone."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(3, 10_000, generator=generator) * 0.6 + 0.2
    band = torch.zeros(3, 10_000)
    band[:, ::12] = 0.15
    picture = clean + band
    restored = 0.8 * clean + 0.05
    matrix = colour_fit(picture, restored - picture)
    change = apply_change(picture, restored - picture, matrix=matrix, strength=1.0)
    assert (picture + change - clean).abs().max() < 0.01


def test_nothing_changed_means_the_identity():
    picture = torch.rand(3, 500)
    assert torch.equal(colour_fit(picture, torch.zeros(3, 500)), torch.eye(3, 4))


def test_a_picture_of_one_colour_has_a_fit():
    picture = torch.full((3, 500), 0.5)
    matrix = colour_fit(picture, torch.full((3, 500), -0.1))
    assert matrix.isfinite().all()
    change = apply_change(picture, torch.full((3, 500), -0.1), matrix=matrix, strength=1.0)
    assert change.abs().max() < 0.02


def test_strength_is_a_share_of_the_change():
    picture, change = torch.rand(3, 4, 4), torch.rand(3, 4, 4)
    half = apply_change(picture, change, matrix=None, strength=0.5)
    assert torch.allclose(half, change / 2)
    assert apply_change(picture, change, matrix=torch.rand(3, 4), strength=0.0).abs().max() == 0


def test_the_small_network_tiled_is_near_whole():
    """Real blocks with global averages; weights as small as training leaves heads."""
    torch.manual_seed(0)
    small = {"encoder_width": 8, "decoder_width": 8, "growth": 4}
    network = demoire.build("esdnet_s", small).eval()
    head = network.decoder.decoder_1.conv.conv
    nn.init.normal_(head.weight, std=0.02)
    wave = torch.linspace(0, 40, 1536).sin() * 0.2 + 0.5
    picture = (wave.view(-1, 1) * wave).expand(3, 1536, 1536) + 0.1
    runner = restorer(network, result=0, multiple=64)
    whole = runner.change(reader(picture), 1536, 1536, tile=0)
    tiled = runner.change(reader(picture), 1536, 1536, tile=1024)
    assert whole.values.abs().mean() > 2 / 255
    assert (whole.values - tiled.values).abs().mean() < 1 / 255
