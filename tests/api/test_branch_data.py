"""Labelled pictures for training: split, batches that repeat, files that cannot be read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qtool.api import branch_data
from qtool.api.branch_data import Pictures
from qtool.errors import ImageError, UsageError
from qtool.io import images
from qtool.models.vision import DataConfig

SMALL = DataConfig((3, 16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)
LARGE = replace(SMALL, input_size=(3, 80, 80))


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in each of two classes; how bright they are tells which they are."""
    for label in range(2):
        for index in range(12):
            level = (12 * label + index) / 24
            image = torch.full((3, 20, 20), level)
            images.save_png(tmp_path / f"set/{label}/{index:02d}.png", image)
    return tmp_path / "set"


@pytest.fixture
def pictures(folder):
    return Pictures(branch_data.find(folder, classes=2).train, SMALL)


def batches(pictures, **options):
    return list(branch_data.training_batches(pictures, **{"batch_size": 6, "seed": 0, **options}))


def test_every_tenth_picture_is_kept_for_measuring(folder):
    split = branch_data.find(folder, classes=2)
    assert [path.name for path, _ in split.held_out] == ["00.png", "10.png", "08.png"]
    assert len(split.train) == 21
    assert not {path for path, _ in split.train} & {path for path, _ in split.held_out}


def test_too_few_pictures_are_refused(tmp_path):
    for label in range(2):
        images.save_png(tmp_path / f"{label}/a.png", torch.zeros(3, 4, 4))
    with pytest.raises(UsageError, match="has only 2 pictures"):
        branch_data.find(tmp_path, classes=2)


@pytest.mark.parametrize("data", [SMALL, LARGE])
def test_batches_are_the_same_for_the_same_epoch_and_seed(folder, data):
    pictures = Pictures(branch_data.find(folder, classes=2).train, data)
    assert (pictures.small is None) == (data is LARGE)
    first = batches(pictures, epoch=1)
    assert len(first) == branch_data.batches_in(len(pictures), 6) == 3
    assert first[0][0].shape == (6, *data.input_size)
    for (x, y), (again, labels) in zip(first, batches(pictures, epoch=1), strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
    assert not torch.equal(batches(pictures, epoch=2)[0][0], first[0][0])
    assert not torch.equal(batches(pictures, epoch=1, seed=1)[0][0], first[0][0])


def test_an_epoch_can_be_taken_up_in_the_middle(pictures):
    rest = batches(pictures, epoch=0, first=2)
    assert len(rest) == 1
    assert torch.equal(rest[0][0], batches(pictures, epoch=0)[2][0])


def test_processes_take_their_parts_of_every_batch(pictures):
    (whole, labels), *_ = batches(pictures, epoch=0)
    (even, one), *_ = batches(pictures, epoch=0, share=(0, 2))
    (odd, other), *_ = batches(pictures, epoch=0, share=(1, 2))
    assert torch.equal(whole[::2], even)
    assert torch.equal(whole[1::2], odd)
    assert torch.equal(labels[::2], one)
    assert torch.equal(labels[1::2], other)


def test_a_batch_larger_than_the_set_is_the_set(pictures):
    ((x, _),) = batches(pictures, epoch=0, batch_size=100)
    assert len(x) == 21


def test_measuring_reads_every_picture_in_order(pictures):
    found = list(branch_data.measuring_batches(pictures, batch_size=8))
    assert [len(y) for _, y in found] == [8, 8, 5]
    pixels = torch.cat([x for x, _ in found])
    levels = pixels[:, 0, 0, 0] * 0.25 + 0.5
    assert torch.equal(levels, levels.sort().values)


def test_files_that_cannot_be_read_are_left_out(folder):
    (folder / "1/03.png").write_bytes(b"no picture")
    split = branch_data.find(folder, classes=2)
    pictures = Pictures(split.train, SMALL)
    assert len(pictures) == 20
    assert [path.name for path, _ in pictures.failed] == ["03.png"]
    large = Pictures(split.train, LARGE)
    assert len(large) == 21
    assert sum(len(y) for _, y in branch_data.measuring_batches(large, batch_size=30)) == 20
    with pytest.raises(ImageError, match="no picture could be read"):
        Pictures([(folder / "1/03.png", 1)], SMALL)


def test_reading_tells_how_far_it_is(folder):
    told = []
    split = branch_data.find(folder, classes=2)
    Pictures(split.train, SMALL, lambda *words: told.append(words))
    assert told == [("read pictures", 21, 21)]


def test_processes_that_read_give_the_same_batches(pictures):
    ((x, _), *_) = batches(pictures, epoch=0, workers=1, batch_size=21)
    ((plain, _), *_) = batches(pictures, epoch=0, batch_size=21)
    assert torch.equal(x, plain)


def test_class_names_of_imagenet_are_understood(tmp_path):
    for name in ("n02", "n01"):
        for index in range(3):
            images.save_png(Path(tmp_path / name / f"{index}.png"), torch.zeros(3, 4, 4))
    split = branch_data.find(tmp_path, classes=9, wnids=["n00", "n01", "n02"])
    assert {label for _, label in split.train} == {1, 2}
