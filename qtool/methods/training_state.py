"""The state of networks and optimizers as named tensors, which a file can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def optimizer_state(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """What an optimizer remembers of its parameters, as `PREFIX` + `INDEX/SLOT`."""
    return {
        f"{prefix}{index}/{slot}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, prefix: str, state: Mapping[str, Tensor]
) -> None:
    """Take up what `optimizer_state` returned, for the same parameters in the same order."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in under(prefix, state).items():
        index, _, slot = key.partition("/")
        slots.setdefault(int(index), {})[slot] = value
    whole = optimizer.state_dict()
    whole["state"] = slots
    optimizer.load_state_dict(whole)
