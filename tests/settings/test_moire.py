"""Settings of `synthesize moire`."""

from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.settings.moire import MoireSettings


def build(**values):
    return MoireSettings.build({"out": Path("pairs"), **values})


def test_simulation_needs_nothing_else():
    assert build(simulate=True).tone == "capture"
    assert build(simulate=True, clean=Path("c")).clean == Path("c")


@pytest.mark.parametrize("missing", ["moire", "clean"])
def test_learning_needs_both_folders(missing):
    folders = {"moire": Path("m"), "clean": Path("c")}
    build(**folders)
    del folders[missing]
    with pytest.raises(UsageError, match="learning moire"):
        build(**folders)


@pytest.mark.parametrize("extra", ["moire", "generator", "save_generator"])
def test_simulation_and_photographs_contradict(extra):
    with pytest.raises(UsageError, match="--simulate"):
        build(simulate=True, **{extra: Path("x")})


@pytest.mark.parametrize(
    "values", [{"groups": 3}, {"patch_size": 66}, {"count": 0}, {"pages": 1.5}, {"width": 9}]
)
def test_wrong_values_are_refused(values):
    with pytest.raises(UsageError):
        build(simulate=True, **values)
