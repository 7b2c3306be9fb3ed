"""Colour filters, noise, and the ways to undo the mosaic."""

import pytest
import torch

from qtool.methods.undem import sensor

MOSAICS = ["rggb", "bggr", "grbg", "gbrg"]
METHODS = ["edge", "bilinear", "malvar"]


@pytest.mark.parametrize("quad", [False, True])
@pytest.mark.parametrize("mosaic", MOSAICS)
def test_every_sample_sees_one_colour_and_half_see_green(mosaic, quad):
    seen = sensor.masks(mosaic, 8, 12, quad=quad)
    assert torch.equal(seen.sum(0), torch.ones(8, 12))
    assert seen.mean((1, 2)).tolist() == [0.25, 0.5, 0.25]


def test_the_letters_are_read_row_by_row():
    seen = sensor.masks("grbg", 2, 2)
    assert seen.argmax(0).tolist() == [[1, 0], [2, 1]]
    quad = sensor.masks("rggb", 4, 4, quad=True)
    assert quad.argmax(0)[0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mosaic", MOSAICS)
def test_a_smooth_picture_comes_back(mosaic, method):
    ramp = torch.linspace(0.2, 0.8, 24)
    picture = torch.stack([ramp.expand(20, -1), ramp.flip(0).expand(20, -1), ramp.expand(20, -1)])
    seen = sensor.masks(mosaic, 20, 24)
    back = sensor.demosaic((picture * seen).sum(0), seen, method=method)
    inner = (back - picture)[:, 4:-4, 4:-4]
    assert float(inner.abs().max()) < 0.03


def test_a_quad_array_comes_back_where_it_is_flat():
    picture = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1).expand(3, 16, 16)
    seen = sensor.masks("rggb", 16, 16, quad=True)
    back = sensor.demosaic((picture * seen).sum(0), seen, method="edge", quad=True)
    torch.testing.assert_close(back, picture.contiguous(), atol=1e-5, rtol=0)


def test_edge_aware_follows_a_line_that_bilinear_smears():
    picture = torch.full((3, 16, 16), 0.2)
    picture[:, :, 8:] = 0.8
    seen = sensor.masks("rggb", 16, 16)
    raw = (picture * seen).sum(0)
    errors = {
        method: float((sensor.demosaic(raw, seen, method=method) - picture)[1, 4:-4, 4:-4].std())
        for method in ("edge", "bilinear")
    }
    assert errors["edge"] < 0.5 * errors["bilinear"]


def test_noise_has_its_variance_and_its_seed():
    flat = torch.full((200, 200), 0.5)
    draws = [
        sensor.noisy(flat, gain=2e-3, floor=1e-4, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert abs(float((draws[0] - flat).var()) - 1.1e-3) < 5e-5


def test_noise_is_drawn_on_the_device_of_the_picture(device):
    flat = torch.full((64, 64), 0.5, device=device)
    first, second = (
        sensor.noisy(flat, gain=0.0, floor=1e-4, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3)
    )
    assert first.device == flat.device
    assert torch.equal(first, second)
    assert abs(float((first - flat).std()) - 1e-2) < 1e-3
