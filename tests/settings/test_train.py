"""Settings of `train demoire`."""

from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.settings.train import TrainDemoireSettings


def build(**values):
    return TrainDemoireSettings.build({"out": Path("w.safetensors"), **values})


def test_pairs_or_both_folders_are_enough():
    assert build(pairs=Path("p")).model == "bandgate"
    assert build(moire=Path("m"), clean=Path("c")).init == "bundled"


@pytest.mark.parametrize("values", [{}, {"moire": Path("m")}, {"clean": Path("c")}])
def test_nothing_to_learn_from_is_refused(values):
    with pytest.raises(UsageError, match="nothing to learn from"):
        build(**values)


def test_a_generator_needs_photographs():
    with pytest.raises(UsageError, match="--generator"):
        build(pairs=Path("p"), generator=Path("g"))


@pytest.mark.parametrize("values", [{"crop": 100}, {"budget": 0}, {"steps": 0}, {"model": "unet"}])
def test_wrong_values_are_refused(values):
    with pytest.raises(UsageError):
        build(pairs=Path("p"), **values)


@pytest.mark.parametrize("out", ["w", "w.pth", "folder/w.json"])
def test_only_what_can_be_loaded_again_is_written(out):
    with pytest.raises(UsageError, match=r"does not end in \.safetensors"):
        build(pairs=Path("p"), out=Path(out))
    assert build(pairs=Path("p"), out=Path("W.SafeTensors")).out.name == "W.SafeTensors"
