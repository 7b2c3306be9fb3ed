"""Folders that moire training reads."""

from pathlib import Path

import pytest
import torch

from qtool.api.moire_data import Pairs, Pictures, near, read_generator, read_pairs, read_pictures
from qtool.errors import CheckpointError, UsageError
from qtool.io import container, images


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, height=20, width=24, value=0.5):
    images.save_png(Path(path), torch.full((3, height, width), value))


def test_pictures_are_split_without_overlap():
    pictures = Pictures([torch.full((3, 2, 2), 10 * i, dtype=torch.uint8) for i in range(7)])
    train, held = pictures.split(3)
    assert [round(float(x.mean()) * 25.5) for x in held] == [0, 3, 6]
    assert len(train) == 4
    lonely, also = pictures[:1].split(10)
    assert len(lonely) == len(also) == 1


def test_small_pictures_are_left_out_and_large_ones_cut():
    save("a/1.png", 20, 24)
    save("a/2.png", 10, 40)
    save("a/3.png", 1600, 20)
    found = read_pictures(Path("a"), smallest=16)
    assert [tuple(x.shape) for x in found] == [(3, 20, 24), (3, 1536, 20)]
    with pytest.raises(UsageError, match="30 pixels"):
        read_pictures(Path("a"), smallest=30)


def test_pairs_are_matched_by_name():
    for name in ("1", "2"):
        save(f"p/moire/{name}.png", value=0.8)
        save(f"p/clean/{name}.png", value=0.2)
    pairs = read_pairs(Path("p"), smallest=16)
    assert len(pairs) == 2
    moire, clean = pairs[1]
    assert float(moire.mean()) > float(clean.mean())
    save("p/moire/3.png")
    with pytest.raises(UsageError, match="'3'"):
        read_pairs(Path("p"), smallest=16)
    save("p/clean/3.png", 20, 30)
    with pytest.raises(UsageError, match="differ in size"):
        read_pairs(Path("p"), smallest=16)


@pytest.mark.parametrize("header", [{}, {"qtool.moire_generator": '{"grouping": null}'}])
def test_a_foreign_generator_is_refused(header):
    container.write_container(Path("g.safetensors"), header, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not a moire generator"):
        read_generator(Path("g.safetensors"), torch.device("cpu"))


def test_pictures_move_to_a_device_that_has_room(device):
    pictures = Pictures([torch.zeros(3, 4, 5, dtype=torch.uint8)] * 2)
    assert pictures.size == 120
    moved = near(Pairs(pictures, pictures), device)
    assert moved.size == 240
    assert moved[0][0].device.type == moved[0][1].device.type == device.type
