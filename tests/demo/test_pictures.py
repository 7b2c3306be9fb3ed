"""Drawn pictures: the same for the same seed, of any size, with labels as asked."""

import pytest
import torch

from qtool.demo import pictures
from qtool.errors import UsageError


def test_class_names():
    names = pictures.class_names()
    assert len(names) == len(set(names)) == 24
    assert names[0] == "plain disc"
    assert names[4 * 2 + 1] == "striped star"


def test_same_seed_same_bytes():
    first, second = (pictures.draw(30, seed=5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_other_seed_other_pictures():
    assert not torch.equal(pictures.draw(4, seed=1)[0], pictures.draw(4, seed=2)[0])


def test_a_picture_does_not_depend_on_its_batch():
    images, labels = pictures.draw(40, seed=3)
    part, part_labels = pictures.draw(7, seed=3, start=20)
    assert torch.equal(part_labels, labels[20:27])
    # The last bit of a sine may differ with its place in a vector: one level after rounding.
    assert (part - images[20:27]).abs().max() <= 1 / 255 + 1e-6
    assert (part != images[20:27]).float().mean() < 1e-3


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    images, _ = pictures.draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(pictures.draw(2)[0], images)


@pytest.mark.parametrize("size", [8, 32, 64, 97, 224])
def test_any_size(size):
    images, labels = pictures.draw(3, size=size)
    assert images.shape == (3, 3, size, size)
    assert images.dtype == torch.float32
    assert labels.shape == (3,)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1


def test_size_keeps_the_content():
    small, _ = pictures.held_out(12, 64)
    large, _ = pictures.held_out(12, 192)
    reduced = torch.nn.functional.avg_pool2d(large, 3)
    assert (reduced - small).abs().mean() < 0.06


def test_pictures_are_eight_bit():
    images, _ = pictures.draw(5)
    torch.testing.assert_close((images * 255).round() / 255, images, atol=1e-7, rtol=0)


def test_no_pictures():
    images, labels = pictures.draw(0)
    assert images.shape == (0, 3, 64, 64)
    assert labels.shape == (0,)
    assert pictures.held_out(0)[1].shape == (0,)


def test_labels_are_random_and_cover_all_classes():
    _, labels = pictures.draw(2400, size=8)
    counts = torch.bincount(labels, minlength=24)
    assert labels.dtype == torch.int64
    assert len(counts) == 24
    assert int(counts.min()) > 60
    assert int(counts.max()) < 150


def test_labels_may_be_chosen():
    wanted = torch.tensor([5, 0, 23])
    images, labels = pictures.draw(3, labels=wanted)
    assert torch.equal(labels, wanted)
    other, _ = pictures.draw(3, labels=torch.tensor([5, 0, 22]))
    assert torch.equal(images[:2], other[:2])
    assert not torch.equal(images[2], other[2])


def test_held_out_is_balanced_and_in_order():
    _, labels = pictures.held_out(100, 8)
    assert torch.equal(labels, torch.arange(100) % 24)
    images, _ = pictures.held_out(50)
    part, part_labels = pictures.held_out(10, start=30)
    assert torch.equal(part_labels, torch.arange(30, 40) % 24)
    assert (part - images[30:40]).abs().max() <= 1 / 255 + 1e-6


def test_held_out_keys_meet_no_seed():
    # The hash is a bijection of the key, so distinct keys draw distinct pictures.
    largest = (pictures.MAX_SEED << 31) + pictures._MAX_INDEX
    held_out = pictures._HELD_OUT_STREAM << 31
    assert largest < held_out
    keys = torch.tensor([0, 1, -1, largest, held_out, held_out + pictures._MAX_INDEX])
    assert len(set(pictures._mix(keys).tolist())) == len(keys)


def test_random_numbers_fill_the_unit_interval_evenly():
    numbers = pictures._uniform(pictures._mix(torch.arange(2000)), 50)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert float(numbers.mean()) == pytest.approx(0.5, abs=0.005)
    assert torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max() < 0.12


def test_no_picture_is_flat():
    images, _ = pictures.draw(200)
    assert float(images.flatten(1).std(1).min()) > 0.01


@pytest.mark.parametrize(
    "arguments",
    [
        {"count": -1},
        {"count": 1, "start": -1},
        {"count": 1, "start": 2**31},
        {"count": 1, "size": 4},
        {"count": 1, "seed": -1},
        {"count": 1, "seed": 2**31},
        {"count": 2, "labels": torch.tensor([0])},
        {"count": 1, "labels": torch.tensor([24])},
        {"count": 1, "labels": torch.tensor([-1])},
    ],
    ids=str,
)
def test_out_of_range_is_a_usage_error(arguments):
    with pytest.raises(UsageError):
        pictures.draw(**arguments)


def test_held_out_needs_no_negative_count():
    with pytest.raises(UsageError):
        pictures.held_out(-1)
