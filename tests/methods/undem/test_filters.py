"""Small filters."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.methods.undem import filters


@given(st.floats(0, 1))
def test_the_srgb_curve_and_back(value):
    linear = filters.to_linear(torch.tensor(value))
    assert abs(float(filters.to_srgb(linear)) - value) < 1e-5


def test_known_points_of_the_srgb_curve():
    known = torch.tensor([0.0, 0.04045, 0.5, 1.0])
    linear = torch.tensor([0.0, 0.0031308, 0.2140411, 1.0])
    torch.testing.assert_close(filters.to_linear(known), linear, atol=1e-5, rtol=0)


@given(st.floats(0.2, 4.0), st.integers(3, 20), st.integers(3, 20))
def test_blur_keeps_a_constant(sigma, height, width):
    flat = torch.full((3, height, width), 0.4)
    torch.testing.assert_close(filters.gaussian_blur(flat, sigma), flat)


def test_blur_spreads_an_impulse_by_sigma():
    x = torch.zeros(1, 41, 41)
    x[0, 20, 20] = 1
    blurred = filters.gaussian_blur(x, 2.0)[0]
    axis = torch.arange(41) - 20.0
    assert abs(float(blurred.sum()) - 1) < 1e-5
    assert abs(float((blurred.sum(0) * axis**2).sum()) - 4) < 0.15


def test_bilateral_keeps_an_edge_and_removes_grain():
    random = torch.Generator().manual_seed(0)
    x = torch.full((3, 32, 32), 0.3)
    x[:, :, 16:] = 0.7
    grainy = x + 0.02 * torch.randn(x.shape, generator=random)
    smooth = filters.bilateral(grainy, tone=0.08, reach=2.0)
    assert float((smooth - x).std()) < 0.6 * float((grainy - x).std())
    assert float((smooth - x)[:, :, 14:18].abs().max()) < 0.08


def test_chroma_blur_leaves_brightness():
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    blurred = filters.blur_chroma(x, 2.0)
    torch.testing.assert_close(filters.luma(blurred), filters.luma(x))
    difference = blurred - filters.luma(blurred)
    assert float(difference.std()) < 0.5 * float((x - filters.luma(x)).std())


def test_sharpening_raises_contrast_and_keeps_flat_parts():
    flat = torch.full((3, 9, 9), 0.5)
    torch.testing.assert_close(filters.sharpen(flat, 0.6), flat)
    x = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert float(filters.sharpen(x, 0.6).std()) > float(x.std())
