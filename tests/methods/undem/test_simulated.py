"""Simulated pairs by number."""

import torch

from qtool.methods.undem.simulated import DRAWN, simulated_pair


def pair(index, pictures=(), **options):
    return simulated_pair(pictures, size=32, seed=5, index=index, page_share=0.3, **options)


def test_a_pair_is_the_same_whatever_came_before():
    alone = pair(4)
    for index in range(4):
        pair(index)
    again = pair(4)
    assert torch.equal(alone.moire, again.moire)
    assert torch.equal(alone.clean, again.clean)
    assert alone.capture == again.capture
    assert alone.source == DRAWN
    assert not torch.equal(alone.moire, pair(5).moire)


def test_pictures_are_shown_and_named():
    red = torch.tensor([0.8, 0.1, 0.1]).view(3, 1, 1).expand(3, 60, 70)
    blue = red.flip(0)
    made = [pair(index, [red, blue]) for index in range(12)]
    assert {each.source for each in made} >= {0, 1}
    for each in made:
        assert each.moire.shape == each.clean.shape == (3, 32, 32)
        if each.source == 0:
            assert float(each.clean[0].mean()) > 2 * float(each.clean[2].mean())


def test_photographs_are_about_as_sharp_as_what_was_shown():
    checks = (torch.arange(240)[:, None] // 4 + torch.arange(240) // 4) % 2
    board = (0.2 + 0.6 * checks).expand(3, -1, -1)
    sharp = sum(float(pair(index, [board]).clean.diff(dim=-1).abs().mean()) for index in range(24))
    # A board whose squares were blown up to the size of the result would show a few edges only.
    assert sharp / 24 > 0.02
