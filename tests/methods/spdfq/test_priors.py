"""What is made up before a pixel is optimised."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.methods.spdfq.priors import (
    Box,
    attention_priors,
    natural_noise,
    patch_boxes,
    soft_labels,
)

seeds = st.integers(0, 2**32 - 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 9), st.integers(2, 14), st.integers(2, 14), seeds)
def test_priors_are_non_negative_and_sum_to_one(count, rows, columns, seed):
    maps = attention_priors(count, grid=(rows, columns), generator=seeded(seed))
    assert maps.shape == (count, rows * columns)
    assert bool(maps.isfinite().all())
    assert bool((maps >= 0).all())
    torch.testing.assert_close(maps.sum(1), torch.ones(count))


def test_priors_are_blobs_and_differ():
    maps = attention_priors(50, grid=(14, 14), generator=seeded(0))
    assert bool((maps.amax(1) > 2 / 196).all())
    assert float(maps.amax(1).median()) < 0.2
    assert len({tuple(row.tolist()) for row in maps}) == 50
    # Neighbours have more alike values than tokens far apart.
    grid = maps.view(-1, 14, 14)
    beside = (grid[:, :, 1:] - grid[:, :, :-1]).square().mean()
    apart = (grid[:, :, 7:] - grid[:, :, :7]).square().mean()
    assert float(beside) < 0.3 * float(apart)


def test_a_single_component_has_one_peak():
    maps = attention_priors(20, grid=(14, 14), generator=seeded(0), max_components=1)
    for flat in maps:
        padded = torch.nn.functional.pad(flat.view(14, 14), (1, 1, 1, 1), value=-1.0)
        around = torch.stack(
            [
                padded.roll((y, x), (0, 1))
                for y in (-1, 0, 1)
                for x in (-1, 0, 1)
                if (y, x) != (0, 0)
            ]
        ).amax(0)
        assert int((padded > around).sum()) <= 1 + int((flat == flat.max()).sum() > 1)


def test_the_same_seed_draws_the_same_priors():
    first, again = (attention_priors(3, grid=(7, 7), generator=seeded(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, attention_priors(3, grid=(7, 7), generator=seeded(6)))


@given(
    count=st.integers(1, 6),
    height=st.integers(16, 224),
    width=st.integers(16, 224),
    num_classes=st.integers(1, 12),
    seed=seeds,
)
def test_boxes_are_disjoint_and_inside(count, height, width, num_classes, seed):
    boxes = patch_boxes(
        count, size=(height, width), classes=torch.arange(num_classes), generator=seeded(seed)
    )
    shorter = min(height, width)
    for image in range(count):
        own = [box for box in boxes if box.image == image]
        assert 1 <= len(own) <= min(4, num_classes)
        assert len({box.label for box in own}) == len(own)
        covered = torch.zeros(height, width)
        for box in own:
            assert box.top >= 0
            assert box.left >= 0
            assert box.top + box.side <= height
            assert box.left + box.side <= width
            assert round(0.2 * shorter) <= box.side <= round(0.45 * shorter)
            covered[box.top : box.top + box.side, box.left : box.left + box.side] += 1
        assert float(covered.max()) == 1.0
    assert [box.image for box in boxes] == sorted(box.image for box in boxes)


def test_boxes_take_only_the_classes_given():
    boxes = patch_boxes(
        20, size=(64, 64), classes=torch.tensor([3, 17, 99]), generator=seeded(0), max_patches=4
    )
    assert {box.label for box in boxes} == {3, 17, 99}


@pytest.mark.parametrize(
    ("top", "left", "overlap"),
    [(0, 0, True), (9, 9, True), (10, 0, False), (0, 10, False), (-5, 3, True), (-6, 3, False)],
)
def test_boxes_that_touch_do_not_overlap(top, left, overlap):
    box, other = Box(0, 0, 0, 10, 1), Box(0, top, left, 6, 2)
    assert box.overlaps(other) is overlap
    assert other.overlaps(box) is overlap


@given(
    st.lists(
        st.lists(st.integers(0, 49), min_size=1, max_size=4, unique=True), min_size=1, max_size=6
    ),
    seeds,
)
def test_soft_labels_sum_to_one_and_peak_on_their_targets(targets, seed):
    labels = soft_labels(targets, num_classes=50, generator=seeded(seed))
    assert labels.shape == (len(targets), 50)
    torch.testing.assert_close(labels.sum(1), torch.ones(len(targets)))
    for row, names in zip(labels, targets, strict=True):
        others = torch.ones(50, dtype=torch.bool)
        others[names] = False
        assert float(row[names].min()) > float(row[others].max())
        assert bool((row > 0).all())


def test_soft_labels_have_the_mass_of_the_paper():
    """With 1000 classes a single target has half of the mass on average."""
    labels = soft_labels([[7]] * 2000, num_classes=1000, generator=seeded(0))
    assert float(labels[:, 7].mean()) == pytest.approx(0.51, abs=0.02)


def test_natural_noise_has_large_areas_where_white_noise_has_none():
    generator = torch.Generator().manual_seed(0)
    natural = natural_noise(4, size=(64, 96), generator=generator)
    assert natural.shape == (4, 3, 64, 96)
    assert 0.8 < natural.std(dim=(2, 3)).mean() < 1.1
    many = natural_noise(200, size=(16, 16), generator=generator)
    assert abs(float(many.mean())) < 0.15
    white = torch.randn(4, 3, 64, 96, generator=generator)
    coarse = [torch.nn.functional.avg_pool2d(x, 8).std() for x in (natural, white)]
    assert coarse[0] > 5 * coarse[1]
    red, green = natural[:, 0].flatten(), natural[:, 1].flatten()
    assert float(torch.corrcoef(torch.stack((red, green)))[0, 1]) > 0.6
    again = natural_noise(4, size=(64, 96), generator=torch.Generator().manual_seed(0))
    assert torch.equal(natural, again)
