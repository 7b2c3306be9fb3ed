"""A computation that is recorded: warm-up, replays, other shapes, and what cannot be recorded."""

import contextlib

import pytest
import torch

from qtool.methods.recording import Recorded


class Graph:
    """Stands for a CUDA graph on machines without a GPU: it computes the recorded calls again."""

    recording = None

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for function, inputs, output in self.calls:
            output.copy_(function(*inputs))


@contextlib.contextmanager
def recorder(graph):
    Graph.recording = graph
    try:
        yield
    finally:
        Graph.recording = None


@pytest.fixture
def graphs(monkeypatch):
    made = []

    def build():
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", build)
    monkeypatch.setattr(torch.cuda, "graph", recorder)
    return made


def double(x):
    output = 2 * x
    if Graph.recording is not None:
        Graph.recording.calls.append((lambda y: 2 * y, (x,), output))
    return output


def test_the_fourth_call_is_recorded_and_replayed(graphs):
    run = Recorded(double, active=True)
    for number in range(6):
        assert torch.equal(run(torch.full((3,), float(number))), torch.full((3,), 2.0 * number))
        assert len(graphs) == int(number > 2)
        assert run.replays == bool(graphs)
    assert graphs[0].replays == 3


def test_another_shape_is_recorded_anew(graphs):
    run = Recorded(double, active=True)
    for size in (3, 5):
        for number in range(5):
            assert torch.equal(
                run(torch.full((size,), 1.0 * number)), torch.full((size,), 2.0 * number)
            )
    assert [graph.replays for graph in graphs] == [2, 2]


def test_what_cannot_be_recorded_is_called(graphs):
    def refuse(x):
        if Graph.recording is not None:
            raise RuntimeError("not while capturing")
        return 2 * x

    run = Recorded(refuse, active=True)
    assert [float(run(torch.tensor(1.0 * n))) for n in range(6)] == [0, 2, 4, 6, 8, 10]
    assert not run.active


def test_on_a_processor_nothing_is_recorded(graphs):
    run = Recorded(double, active=False)
    assert [float(run(torch.tensor(1.0 * n))) for n in range(6)] == [0, 2, 4, 6, 8, 10]
    assert not graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_recording_leaves_the_same_gradients(device):
    weight = torch.randn(8, 8, device=device, requires_grad=True)

    def loss(x):
        weight.grad = None
        found = (x @ weight).square().mean()
        found.backward()
        return found.detach()

    run = Recorded(loss, active=True)
    for seed in range(6):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).to(device)
        found = run(x).clone()
        gradient = weight.grad.clone()
        kept = weight.grad
        torch.testing.assert_close(loss(x), found)
        torch.testing.assert_close(weight.grad, gradient)
        weight.grad = kept
