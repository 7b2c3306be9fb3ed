"""Fidelity against scikit-image, hand-made pictures, and values published for real pairs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qtool.metrics import fidelity


def picture(seed, height=40, width=52):
    noise = np.random.default_rng(seed).random((height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0))
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def pair():
    first = picture(0)
    return first, np.clip(0.9 * first + 0.05 + 0.1 * (picture(1) - 0.5), 0, 1)


def eight_bits(array):
    return np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)


def test_psnr_is_that_of_scikit_image(pair):
    output, target = pair
    expected = peak_signal_noise_ratio(target, output, data_range=1)
    measured = fidelity.measure(tensor(output), tensor(target), protocol="uhdm", metrics=("psnr",))
    assert math.isclose(measured["psnr"], expected, rel_tol=1e-9)


@pytest.mark.parametrize("protocol", ["plain", "uhdm", "fhdmi", "lcdmoire"])
def test_ssim_is_that_of_scikit_image(pair, protocol):
    output, target = pair
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    settings = {
        "plain": {**gaussian, "data_range": 255},
        "uhdm": {**gaussian, "data_range": 1},
        "fhdmi": {"data_range": 255},
        "lcdmoire": {"data_range": 2},
    }[protocol]
    first, second = output, target
    if protocol != "uhdm":
        first, second = eight_bits(output).astype(float), eight_bits(target).astype(float)
    if protocol == "lcdmoire":
        first, second = first / 255, second / 255
    expected = structural_similarity(first, second, channel_axis=2, **settings)
    measured = fidelity.measure(
        tensor(output), tensor(target), protocol=protocol, metrics=("ssim",)
    )
    assert math.isclose(measured["ssim"], expected, rel_tol=1e-7)


def test_the_volume_window_is_that_of_scipy(pair):
    output, target = pair

    def smooth(x):
        return ndimage.gaussian_filter(x, 1.5, mode="nearest", radius=5)

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = smooth(output), smooth(target)
    var_x, var_y = smooth(output**2) - mean_x**2, smooth(target**2) - mean_y**2
    covariance = smooth(output * target) - mean_x * mean_y
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    measured = fidelity.ssim_volume(tensor(output), tensor(target))
    assert math.isclose(measured, (above / below).mean(), rel_tol=1e-9)


def test_the_central_square():
    ramp = torch.linspace(0, 1, 600).expand(3, 300, 600)
    square = fidelity.central_square(ramp)
    assert square.shape == (3, 256, 256)
    assert math.isclose(square.mean().item(), 0.5, abs_tol=1e-3)
    assert math.isclose(square[0, 0, 0].item(), 1 / 6, abs_tol=2e-3)
    assert fidelity.central_square(square) is square


def test_values_are_clipped_and_rounded_where_the_protocol_says_so():
    output = torch.full((3, 12, 12), 1.3)
    assert fidelity.measure(output, torch.ones(3, 12, 12), metrics=("psnr",))["psnr"] == math.inf
    nearly = torch.full((3, 12, 12), 0.4 / 255)
    dark = torch.zeros(3, 12, 12)
    assert fidelity.measure(nearly, dark, metrics=("psnr",))["psnr"] == math.inf
    exact = fidelity.measure(nearly, dark, protocol="uhdm", metrics=("psnr",))["psnr"]
    assert math.isclose(exact, -20 * math.log10(0.4 / 255), rel_tol=1e-6)


def test_colour_is_forgiven_exactly(pair):
    target = tensor(pair[0])
    matrix = torch.tensor([[0.6, 0.1, 0.0, 0.1], [0.0, 0.8, 0.1, 0.0], [0.1, 0.0, 0.7, 0.05]])
    output = fidelity.recoloured(target, matrix.double())
    assert fidelity.psnr(output, target) < 25
    assert fidelity.psnr_aligned(output, target) > 80
    luma, chroma = fidelity.moire_energy(output, target)
    assert luma < 0.01
    assert chroma < 0.01


def test_a_flat_picture_has_a_colour_fit():
    flat = torch.full((3, 20, 20), 0.4)
    assert fidelity.psnr_aligned(flat, torch.full((3, 20, 20), 0.7)) > 60


def test_the_energy_of_a_grey_wave_is_its_deviation():
    """A sine of period 20 passes: exp(-2 pi² f² s²) is 0.89 for sigma 1.5 and 0.007 for 10."""
    position = torch.arange(400, dtype=torch.float64)
    wave = 2 / 255 * torch.sin(2 * math.pi * position / 20)
    noise = np.random.default_rng(0).random((3, 400, 400))
    target = torch.from_numpy(noise) * 0.9
    luma, chroma = fidelity.moire_energy(target + 0.05 + wave, target + 0.05)
    gain = math.exp(-2 * (math.pi * 1.5 / 20) ** 2) - math.exp(-2 * (math.pi * 10 / 20) ** 2)
    assert math.isclose(luma, 2 / math.sqrt(2) * gain, rel_tol=0.03)
    assert chroma < 0.05
    red = torch.stack((wave.expand(400, 400), *torch.zeros(2, 400, 400, dtype=torch.float64)))
    luma, chroma = fidelity.moire_energy(target + 0.05 + red, target + 0.05)
    amplitude = 2 / math.sqrt(2) * gain
    expected = amplitude * math.sqrt((0.701**2 + 0.299**2) / 2)
    assert math.isclose(chroma, expected, rel_tol=0.05)


def test_a_blur_keeps_a_flat_picture_and_small_ones():
    assert torch.allclose(fidelity.blurred(torch.ones(2, 5, 3), 10.0), torch.ones(2, 5, 3))


def test_what_cannot_be_measured_is_an_error():
    small = torch.zeros(3, 6, 6)
    with pytest.raises(ValueError, match="disagree"):
        fidelity.measure(small, torch.zeros(3, 6, 7))
    with pytest.raises(ValueError, match="smaller than the window"):
        fidelity.measure(small, small, metrics=("ssim",))
    with pytest.raises(ValueError, match="no protocol"):
        fidelity.measure(small, small, protocol="other")


def test_reference_values_of_a_real_pair(shared_data):
    folder = shared_data / "moire_pairs" / "fhdmi"
    photo, target = (
        tensor(np.asarray(Image.open(folder / f"00033_{side}.png").convert("RGB")) / 255)
        for side in ("moire", "gt")
    )
    fhdmi = fidelity.measure(photo, target, protocol="fhdmi", metrics=("psnr", "ssim"))
    plain = fidelity.measure(photo, target, protocol="plain", metrics=("psnr", "ssim"))
    assert round(fhdmi["psnr"], 4) == round(plain["psnr"], 4) == 20.5885
    assert round(fhdmi["ssim"], 4) == 0.7687
    assert round(plain["ssim"], 4) == 0.7728
