"""Device, threads, backend and network, as every command sets them."""

import os

import pytest
import torch

from qtool.api.runtime import bfloat16_is_faster, choose_device, prepare
from qtool.engine import dispatch
from qtool.errors import BackendError, MissingError
from qtool.settings.base import CommonSettings


def test_the_cpu_is_always_there():
    assert choose_device("cpu") == torch.device("cpu")


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_missing(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingError, match=f"--device {name} .* no CUDA device"):
        choose_device(name)


def test_a_gpu_beyond_the_last_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(MissingError, match="2 CUDA devices"):
        choose_device("cuda:2")


def test_settings_are_applied(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(dispatch, "_default", None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        settings = CommonSettings(device="cpu", threads=1, backend="reference", seed=5)
        assert prepare(settings) == torch.device("cpu")
        assert torch.get_num_threads() == 1
        assert dispatch.current() == "reference"
        assert "HF_HUB_OFFLINE" not in os.environ
        assert torch.initial_seed() == 5
        prepare(CommonSettings(device="cpu", offline=True))
        assert dispatch.current() == "auto"
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    finally:
        torch.set_num_threads(threads)


def test_a_backend_that_is_not_there_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "available", lambda: {"triton": "no CUDA device was found"})
    with pytest.raises(BackendError, match="no triton here"):
        prepare(CommonSettings(device="cpu", backend="triton"))


def test_bfloat16_is_decided_by_capability_alone():
    cpu = torch.device("cpu")
    assert bfloat16_is_faster(cpu) is bfloat16_is_faster(cpu)


def test_other_systems_make_no_use_of_bfloat16_on_the_cpu(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert bfloat16_is_faster(torch.device("cpu")) is False
