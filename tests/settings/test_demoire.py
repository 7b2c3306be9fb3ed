"""Settings of `qtool demoire`."""

from typing import get_args

import pytest

from qtool.errors import UsageError
from qtool.models import demoire
from qtool.models.mbcnn import Dct
from qtool.models.mbcnn import Head as MbcnnHead
from qtool.settings.demoire import DemoireSettings, Head, Network, Transform


def test_networks_and_variants_are_those_there_are():
    assert get_args(Network) == tuple(spec.name for spec in demoire.NETWORKS)
    assert get_args(Head) == get_args(MbcnnHead)
    assert get_args(Transform) == get_args(Dct)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2G", 2**31), ("800M", 800 * 2**20), ("1.5GiB", 3 * 2**29), ("100000000", 10**8)],
)
def test_amounts_of_memory(text, size):
    assert DemoireSettings(out="x", max_memory=text).memory_bytes == size


@pytest.mark.parametrize(
    "values",
    [
        {"max_memory": "much"},
        {"max_memory": "5"},
        {"tile": 10},
        {"preview": "page.pdf"},
        {"strength": 1.5},
        {"quality": 0},
        {"resume": True},
        {"overwrite": True, "skip_existing": True},
    ],
)
def test_what_makes_no_sense(values):
    with pytest.raises(UsageError):
        DemoireSettings.build({"out": "x", **values})
