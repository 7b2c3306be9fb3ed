"""Damaged fakes are told from good ones."""

import pytest
import torch

from qtool.errors import CheckpointError
from qtool.methods.undem import denoise
from qtool.methods.undem.capture import Draw
from qtool.methods.undem.generator import FeatureEncoder, MoireGenerator


def painter(threshold=float("inf")):
    torch.manual_seed(0)
    return denoise.Painter(
        encoder=FeatureEncoder(), generator=MoireGenerator(width=8), threshold=threshold
    )


def batches(*painters, **options):
    random = torch.Generator().manual_seed(1)
    moire = [[torch.rand(3, 20, 20, generator=random)] for _ in painters]
    clean = [torch.rand(3, 24, 24, generator=random)]
    return denoise.PaintedBatches(painters, moire, clean, crop=16, **options)


def test_damage_is_the_difference_of_edges():
    flat = torch.full((1, 3, 7, 7), 0.5)
    dotted = flat.clone()
    dotted[..., 3, 3] += 10 / 255
    assert float(denoise.damage(flat, flat)) == 0
    assert float(denoise.damage(flat, dotted)) == pytest.approx(160 / 49, rel=0.1)


def test_values_outside_the_range_do_not_wrap():
    white = torch.ones(1, 3, 7, 7)
    assert float(denoise.damage(white, white + 0.3)) == 0


def test_the_threshold_cuts_off_its_share():
    scores = torch.arange(100.0)
    limit = denoise.threshold(scores, 0.3)
    assert int((scores > limit).sum()) == 30


def test_shares_of_merged_groups_are_means():
    assert [denoise.cut_share(group, 4) for group in range(4)] == [0.5, 0.4, 0.3, 0.2]
    assert [denoise.cut_share(group, 2) for group in range(2)] == pytest.approx([0.45, 0.25])
    assert denoise.cut_share(0, 1) == pytest.approx(0.35)


def test_painted_pairs_are_kept_by_their_threshold():
    draw = Draw(torch.Generator().manual_seed(0))
    batch = batches(painter()).draw_group(0, 3, draw)
    assert batch.moire.shape == batch.clean.shape == (3, 3, 16, 16)
    assert batch.kept.tolist() == [1, 1, 1]
    refused = batches(painter(threshold=-1.0)).draw_group(0, 3, draw)
    assert refused.kept.tolist() == [0, 0, 0]
    every = batches(painter(threshold=-1.0), denoise=False).draw_group(0, 3, draw)
    assert every.kept.tolist() == [1, 1, 1]


def test_equal_seeds_paint_equal_pairs_of_all_groups():
    source = batches(painter(), painter())
    first, second = (source.draw(2, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.moire, second.moire)


def test_the_measured_threshold_keeps_the_rest():
    source = batches(painter())
    limit = source.measured_threshold(0, samples=40, seed=2)
    draw = Draw(torch.Generator().manual_seed(2))
    scores = []
    for _ in range(3):
        batch = source.draw_group(0, 16, draw)
        scores.append(denoise.damage(batch.clean, batch.moire))
    kept = (torch.cat(scores)[:40] <= limit).float().mean()
    assert abs(float(kept) - 0.65) < 0.03


def test_a_painter_is_rebuilt_from_its_weights_alone():
    old = painter()
    weights = {f"encoder.{k}": v for k, v in old.encoder.state_dict().items()}
    weights |= {f"generator.{k}": v for k, v in old.generator.state_dict().items()}
    new = denoise.painter_from(weights, variant="own", threshold=3.0, device="cpu")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(old.paint(x, x), new.paint(x, x))
    assert new.threshold == 3.0
    weights.pop("generator.conv15_b.1.bias")
    with pytest.raises(CheckpointError, match="moire generator"):
        denoise.painter_from(weights, variant="own", threshold=1.0, device="cpu")
