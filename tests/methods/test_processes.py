"""One process alone; several are in tests/api/test_parallel.py."""

import torch
from torch import nn

from qtool.methods.processes import (
    agreed,
    average,
    average_gradients,
    processes,
    rank,
    wait_for_all,
)


def test_one_process_agrees_with_itself():
    wait_for_all()
    assert (rank(), processes()) == (0, 1)
    assert agreed(2.5, torch.device("cpu")) == 2.5


def test_a_mean_over_one_process_changes_nothing():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    before = [p.grad.clone() for p in layer.parameters()]
    average_gradients(layer.parameters())
    average(before)
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), before, strict=True))
