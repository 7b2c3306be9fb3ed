"""Estimated seconds follow from operations and a measured rate."""

import pytest
import torch

from qtool.api import estimate as api
from qtool.api.estimate import Estimate
from qtool.errors import MissingError


@pytest.fixture
def rate(monkeypatch):
    """A machine that does one billion operations a second."""
    monkeypatch.setattr(api, "_operations_per_second", lambda device: 1e9)


def estimated(name="deit_t", **options):
    return Estimate(name, **{"weights": "pretrained", "device": "cpu", **options})


@pytest.mark.usefixtures("rate")
def test_a_forward_pass_has_the_operations_that_are_published():
    # DeiT-tiny: 1.26 billion multiplications and as many additions (timm's table, attention too).
    assert estimated().forward == pytest.approx(2 * 1.26, rel=0.03)
    assert estimated("resnet50").forward == pytest.approx(2 * 4.1, rel=0.03)


@pytest.mark.usefixtures("rate")
def test_time_grows_with_the_work():
    whole = estimated()
    one = whole.synthesis(count=32, patches=32, steps=200)
    assert whole.synthesis(count=32, patches=32, steps=400) == pytest.approx(2 * one)
    assert whole.synthesis(count=64, patches=64, steps=200) == pytest.approx(2 * one)
    assert whole.synthesis(count=32, patches=32, steps=0) == 0
    less = whole.reconstruction(count=32, steps=10)
    assert 0 < less < whole.reconstruction(count=32, steps=100)
    assert whole.training(pictures=10, passes=17.5) == pytest.approx(
        1.75 * whole.training(pictures=100, passes=1)
    )


def test_a_model_of_the_hub_is_not_known_before_it_is_fetched():
    nothing = estimated("hf-hub:someone/something")
    assert nothing.forward is None
    assert nothing.synthesis(count=1, patches=1, steps=1) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_refused():
    with pytest.raises(MissingError):
        estimated(device="cuda")


def test_the_rate_of_this_machine_is_measured():
    assert 1e8 < api._operations_per_second(torch.device("cpu")) < 1e15
