"""Optimizers go through named tensors and come back as they were."""

import pytest
import torch
from torch import nn

from qtool.methods.training_state import load_optimizer_state, optimizer_state, under


def trained(kind, steps, *, state=None):
    """Weights after some steps of an optimizer that may go on from a state, and its state."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = kind(network.parameters(), lr=0.1)
    if state is not None:
        network.load_state_dict(under("network/", state))
        load_optimizer_state(optimizer, "first/", state)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    found = {f"network/{name}": value.clone() for name, value in network.state_dict().items()}
    return found | optimizer_state(optimizer, "first/")


@pytest.mark.parametrize(
    "kind", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)]
)
def test_a_training_that_is_taken_up_ends_alike(kind):
    half = {name: value.clone() for name, value in trained(kind, 3).items()}
    # What other owners keep beside it is left alone.
    resumed = trained(kind, 2, state=half | {"firstborn/0/x": torch.ones(1)})
    whole = trained(kind, 5)
    assert resumed.keys() == whole.keys() > {"network/weight"}
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)


def test_only_what_has_the_prefix_is_taken():
    state = {"a/b": torch.zeros(1), "ab": torch.ones(1), "c/a/b": torch.ones(1)}
    assert list(under("a/", state)) == ["b"]
