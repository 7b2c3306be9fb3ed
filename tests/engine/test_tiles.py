"""The tile of a product follows its shape and what the GPU can hold."""

from __future__ import annotations

import pytest
import torch

tiles = pytest.importorskip("qtool.engine.kernels.tiles")
CPU = torch.device("cpu")


@pytest.mark.parametrize("ending", tiles.Ending)
@pytest.mark.parametrize("features", [64, 97, 192, 768])
@pytest.mark.parametrize("channels", [7, 768, 2304, 3072])
@pytest.mark.parametrize("rows", [1, 512, 513, 4096, 99999])
def test_every_choice_is_one_that_was_compiled(rows, channels, features, ending):
    tile = tiles.linear_tile(rows, channels, features, ending, CPU)
    assert tile in tiles.of(ending, tiles.TUNED_CAPABILITY)
    assert features % tile.depth == 0 or tile.depth == 64


def test_a_gpu_with_little_shared_memory_takes_the_smallest(monkeypatch):
    monkeypatch.setattr(tiles, "_shared_bytes", lambda device: 48 * 1024)
    for ending in tiles.Ending:
        assert tiles.linear_tile(99999, 768, 768, ending, CPU) == tiles.SMALLEST


def test_a_gpu_that_nothing_was_tuned_on_takes_the_smallest(monkeypatch):
    monkeypatch.setattr(tiles, "is_tuned", lambda device: False)
    for ending in tiles.Ending:
        assert tiles.linear_tile(1, 768, 768, ending, CPU) == tiles.SMALLEST
        assert tiles.of(ending, 80) == {tiles.SMALLEST}
