"""A replayed pass returns what the layers return, whatever changes between two calls."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from qtool.engine import dispatch
from qtool.quant import graphs


class Model(nn.Module):
    """Adds a learned number, and counts how often Python got there."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
        type(self).calls += 1
        y: torch.Tensor = self.inner(x) * (2 if twice else 1)
        return y


@pytest.fixture
def model(device) -> Model:
    torch.manual_seed(0)
    Model.calls = 0
    model = Model().to(device).eval().requires_grad_(False)
    graphs.replay(model)
    return model


@pytest.fixture
def on_gpu(device) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU here")


def test_it_computes_what_the_model_does(model, device):
    for rows in (2, 5, 2, 5, 2):
        x = torch.randn(rows, 4, device=device)
        assert torch.equal(model(x), model.inner(x))
        assert torch.equal(model(x, twice=True), 2 * model.inner(x))


def test_without_a_gpu_every_call_runs(model):
    for _ in range(3):
        model.forward(torch.randn(2, 4, device=model.inner.weight.device), twice=True)
    assert Model.calls == 3


def test_copies_run_their_own_layers(model, device):
    x = torch.randn(2, 4, device=device)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.inner.weight.zero_()
        twin.inner.bias.fill_(7)
        assert torch.equal(twin(x), torch.full((2, 3), 7.0, device=device))
        assert torch.equal(model(x), model.inner(x))
        assert isinstance(twin.forward, graphs.GraphedForward)


def test_what_cannot_be_captured_runs_as_ever(model, device, monkeypatch):
    def fails(x):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(model.forward, "_captured", fails)
    monkeypatch.setattr(graphs.GraphedForward, "_watched", lambda self: False)
    possible = graphs.GraphedForward._possible
    monkeypatch.setattr(
        graphs.GraphedForward, "_possible", lambda self, x: not self._refused or possible(self, x)
    )
    x = torch.randn(2, 4, device=device)
    for _ in range(4):
        assert torch.equal(model(x), model.inner(x))
    assert Model.calls == 4
    assert model.forward._refused


@pytest.mark.usefixtures("on_gpu")
class TestOnGpu:
    def test_the_third_call_replays(self, model, device):
        x = torch.randn(2, 4, device=device)
        expected = model.inner(x)
        for _ in range(5):
            assert torch.equal(model(x), expected)
        assert Model.calls == 3  # as ever, before the capture, and in it

    def test_results_stay(self, model, device):
        results = [model(torch.full((2, 4), float(n), device=device)) for n in range(5)]
        for n, result in enumerate(results):
            assert torch.equal(result, model.inner(torch.full((2, 4), float(n), device=device)))

    def test_what_is_written_to_weights_is_seen(self, model, device):
        x = torch.randn(2, 4, device=device)
        for value in (1.0, 2.0, 3.0):
            for _ in range(3):
                assert torch.equal(model(x), model.inner(x))
            model.inner.weight.fill_(value)

    def test_hooks_are_called(self, model, device):
        x, seen = torch.randn(2, 4, device=device), []
        for _ in range(3):
            model(x)
        handle = model.inner.register_forward_hook(lambda *arguments: seen.append(1))
        model(x)
        handle.remove()
        model(x)
        assert seen == [1]

    def test_traces_see_operations(self, model, device):
        x = torch.randn(2, 4, device=device)
        for _ in range(3):
            model(x)
        before = Model.calls
        with dispatch.trace():
            model(x)
        assert Model.calls == before + 1

    def test_inference_mode_may_come_and_go(self, model, device):
        x = torch.randn(2, 4, device=device)
        for _ in range(3):
            with torch.inference_mode():
                first = model(x.clone())
            assert torch.equal(first, model(x))

    def test_few_graphs_are_kept(self, model, device):
        for rows in range(1, 9):
            for _ in range(3):
                model(torch.randn(rows, 4, device=device))
        assert len(model.forward._graphs) == graphs.MOST_GRAPHS

    def test_gradients_go_around_it(self, model, device):
        x = torch.randn(2, 4, device=device)
        for _ in range(3):
            model(x)
        x.requires_grad_()
        model(x).sum().backward()
        assert torch.equal(x.grad, model.inner.weight.sum(0).expand(2, 4))
