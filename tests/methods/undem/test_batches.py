"""What batches are made of."""

import pytest
import torch

from qtool.methods.undem.batches import InTurn, MixedBatches, Shares
from qtool.methods.undem.capture import Draw


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(count=3, side=20):
    random = seeded(9)
    return [(torch.rand(3, side, side, generator=random), torch.zeros(3, side, side))] * count


def test_equal_seeds_draw_equal_batches():
    source = MixedBatches(
        pairs(),
        clean=[torch.rand(3, 40, 50)],
        patterns=[torch.ones(3, 24, 24)],
        crop=16,
        shares=Shares(),
    )
    first, second = source.draw(6, seeded()), source.draw(6, seeded())
    assert torch.equal(first.moire, second.moire)
    assert torch.equal(first.clean, second.clean)
    assert first.moire.shape == first.clean.shape == (6, 3, 16, 16)
    assert first.kept.tolist() == [1] * 6
    assert not torch.equal(first.moire, source.draw(6, seeded(1)).moire)


def test_identity_samples_are_equal_and_noise_is_near():
    clean = [torch.rand(3, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)]
    same = MixedBatches([], clean=clean, crop=16, shares=Shares(mixed=0, identity=1, noise=0))
    batch = same.draw(5, seeded())
    assert torch.equal(batch.moire, batch.clean)
    near = MixedBatches([], clean=clean, crop=16, shares=Shares(mixed=0, identity=0, noise=1))
    batch = near.draw(5, seeded())
    assert not torch.equal(batch.moire, batch.clean)
    assert float((batch.moire - batch.clean).abs().mean()) < 0.1


def test_bands_come_from_patterns():
    pattern = torch.full((3, 16, 16), 1.2)
    source = MixedBatches(
        [],
        clean=[torch.full((3, 32, 32), 0.4)],
        patterns=[pattern],
        crop=16,
        shares=Shares(mixed=1, identity=0, noise=0),
    )
    batch = source.draw(4, seeded())
    gain = batch.moire / batch.clean
    assert bool((gain > 1.05).all())
    assert bool((gain < 1.2 * 1.35).all())


def test_without_patterns_their_share_goes_to_pairs():
    source = MixedBatches(
        pairs(), crop=16, shares=Shares(mixed=1.0, identity=0, noise=0), augment=False
    )
    batch = source.draw(5, seeded())
    assert float(batch.clean.abs().max()) == 0 < float(batch.moire.min())


def test_sources_take_turns():
    class Constant:
        def __init__(self, value):
            self.value = value

        def draw(self, count, generator):
            return self.value

    generator = seeded()
    source = InTurn([Constant(1), Constant(2)])
    assert {source.draw(1, generator) for _ in range(20)} == {1, 2}


def test_augmentation_keeps_pairs_together():
    picture = torch.rand(3, 20, 20)
    source = MixedBatches(
        [(picture, picture)], crop=16, shares=Shares(mixed=0, identity=0, noise=0)
    )
    batch = source.draw(8, seeded())
    assert torch.equal(batch.moire, batch.clean)
    assert len({float(x.sum()) for x in batch.moire[:, 0]}) > 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_decide(share):
    draw = Draw(seeded())
    assert draw.chance(share) == bool(share)


def test_the_moire_of_faint_pairs_is_weaker():
    pair = torch.full((3, 20, 20), 0.8), torch.full((3, 20, 20), 0.3)
    for faint, least in ((0.0, 0.5), (1.0, 0.15 * 0.5)):
        shares = Shares(mixed=0, identity=0, noise=0, faint=faint)
        batch = MixedBatches([pair], crop=16, shares=shares).draw(12, seeded())
        gain = (batch.moire - batch.clean).mean((1, 2, 3))
        assert float(gain.min()) > least - 1e-4
        assert (float(gain.std()) > 0.05) == bool(faint)
