"""Processes that work together: which this one is, and means over all of them.

Without a process group there is one process, and nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Which of the processes this one is, from 0."""
    return dist.get_rank() if _together() else 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _together():
        dist.barrier()


def agreed(value: float, device: torch.device) -> float:
    """The first process's value; clocks differ, and all must decide alike.

    Args:
        value: This process's value; only the first one's counts.
        device: Where the processes exchange tensors.
    """
    if not _together():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Take the mean of the gradients of all processes, which all have the same ones."""
    average([parameter.grad for parameter in parameters if parameter.grad is not None])


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes; all have the same ones."""
    if not _together() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= processes()
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
