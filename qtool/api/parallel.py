"""Several processes that share work, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from qtool.errors import UsageError

_PATIENCE = timedelta(days=1)
"""How long processes wait for one another; torchrun ends them all as soon as one of them dies."""


def share() -> tuple[int, int]:
    """Number of this process and of all, as torchrun says: (0, 1) without it.

    Raises:
        UsageError: What it says makes no sense.
    """
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[1]):
        raise UsageError(
            f"RANK={texts[0]} and WORLD_SIZE={texts[1]} do not fit together",
            remedy="start several processes with torchrun, or unset both",
        )
    return int(texts[0]), int(texts[1])


@contextmanager
def torchrun_group() -> Iterator[None]:
    """Join the processes of torchrun inside a `with` block; without torchrun, do nothing.

    Each process takes the CUDA device of its local number, if there are any.

    Raises:
        UsageError: What torchrun says makes no sense.
    """
    if share()[1] < 2 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}",
            remedy="start several processes with torchrun, or unset both",
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
