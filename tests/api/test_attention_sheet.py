"""Attention maps beside their priors."""

import io

import torch
from PIL import Image

from qtool.api.attention_sheet import attention_png
from qtool.models import vision


def test_images_attention_and_priors_lie_side_by_side(demo):
    opened = vision.open_model(demo)
    site = vision.layout(opened.model).attentions[-1]
    tokens = site.grid[0] * site.grid[1]
    priors = {site.name: torch.zeros(5, site.heads, tokens)}
    priors[site.name][:, :, 0] = 1.0
    pixels = torch.randn(5, *opened.data.input_size)
    png = attention_png(opened, pixels, priors)
    assert png is not None
    with Image.open(io.BytesIO(png)) as page:
        columns = 1 + 2 * min(2, site.heads)
        assert page.width > columns * 192
        # The first prior: a white square in the corner of a black picture.
        left, top = 16 + 2 * (192 + (page.width - 32 - columns * 192) // (columns - 1)), 16
        tile = page.crop((left, top, left + 192, top + 192)).convert("L")
        assert tile.getpixel((4, 4)) > 250
        assert tile.getpixel((150, 150)) < 5


def test_without_priors_there_is_no_sheet(demo):
    opened = vision.open_model(demo)
    pixels = torch.randn(2, *opened.data.input_size)
    assert attention_png(opened, pixels, {}) is None
    assert attention_png(opened, pixels, {"elsewhere": torch.ones(2, 1, 4)}) is None
