"""Bands cut from photographs and laid on other pictures."""

import torch

from qtool.methods.undem.capture import Draw
from qtool.methods.undem.mixer import flat_patterns, mixed, spread, turned


def banded(side=128, strength=0.1):
    """A flat grey photograph with coloured bands."""
    x = torch.arange(side) * 0.9
    wave = torch.stack([x.sin(), (x + 2).sin(), (x + 4).sin()])[:, None, :]
    return (0.5 * (1 + strength * wave)).expand(3, side, side)


def test_bands_on_grey_are_found_as_gains():
    patterns = flat_patterns(banded(), size=64)
    assert patterns
    for pattern in patterns:
        assert pattern.shape == (3, 64, 64)
        assert abs(float(pattern.mean()) - 1) < 0.01
        assert abs(float(pattern.std()) - 0.1 / 2**0.5) < 0.02


def test_nothing_is_cut_from_content():
    busy = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert flat_patterns(busy, size=64) == []
    edge = banded(strength=0.02).clone()
    edge[:, 30:34] = 0.9
    assert all(float(p.max()) < 1.3 for p in flat_patterns(edge, size=48))
    coloured = banded() * torch.tensor([1.0, 0.4, 0.2]).view(3, 1, 1)
    assert flat_patterns(coloured, size=64) == []
    assert flat_patterns(banded(32), size=64) == []


def test_the_number_of_patterns_is_limited_and_they_lie_apart():
    assert len(flat_patterns(banded(256), size=64, most=3)) == 3


def test_mixing_multiplies_and_clips():
    clean = torch.full((3, 4, 4), 0.6)
    pattern = torch.full((3, 4, 4), 1.5)
    torch.testing.assert_close(mixed(clean, pattern, strength=0.5), clean * 1.25)
    assert torch.equal(mixed(clean, pattern, strength=0.0), clean)
    assert float(mixed(clean, pattern, strength=3.0).max()) == 1.0


def test_eight_turns_all_come_up():
    square = torch.arange(9.0).view(1, 3, 3)
    draw = Draw(torch.Generator().manual_seed(0))
    seen = {tuple(turned(square, draw).flatten().tolist()) for _ in range(100)}
    assert len(seen) == 8


def test_bands_are_mirrored_until_they_fill_a_square():
    pattern = torch.arange(6.0).view(1, 1, 6).expand(3, 6, 6)
    wide = spread(pattern, 15, zoom=1.0)
    assert wide.shape == (3, 15, 15)
    assert wide[0, 3].tolist() == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0, 0, 1, 2]
    assert spread(pattern, 4, zoom=1.0) is pattern
    coarse = spread(pattern, 8, zoom=2.0)
    assert coarse.shape == (3, 12, 12)
    assert float(coarse[0, 0].diff().max()) < 0.6
