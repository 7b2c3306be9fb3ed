"""Drawn screen contents."""

import pytest
import torch

from qtool.methods.undem import content


def test_pages_have_their_size_and_their_seed():
    for seed in range(12):
        first, second = (
            content.page(40, 56, torch.Generator().manual_seed(seed)) for _ in range(2)
        )
        assert first.shape == (3, 40, 56)
        assert torch.equal(first, second)
        assert 0 <= float(first.min()) <= float(first.max()) <= 1


def test_contents_differ_in_kind():
    pages = [content.page(64, 64, torch.Generator().manual_seed(seed)) for seed in range(40)]
    spread = torch.stack([page.std() for page in pages])
    assert bool((spread == 0).any())  # flat colours
    assert bool((spread > 0.15).any())  # text and plots


def test_without_system_fonts_text_is_latin(monkeypatch):
    monkeypatch.setattr(content, "_font", lambda name, size: None)
    draw = content.Draw(torch.Generator().manual_seed(0))
    for _ in range(20):
        alphabet, font = content._type(draw, 12)
        assert alphabet == content._LATIN
        assert font.getlength("word") > 0
    page = content.page(96, 96, torch.Generator().manual_seed(1))
    assert page.shape == (3, 96, 96)


@pytest.mark.parametrize("dark", [False, True])
def test_ink_can_be_read_on_its_ground(dark):
    draw = content.Draw(torch.Generator().manual_seed(0))
    for _ in range(30):
        ground, ink = content._colours(draw, dark=dark)
        assert abs(sum(ground) - sum(ink)) > 3 * 100
        assert (sum(ground) < sum(ink)) == dark
