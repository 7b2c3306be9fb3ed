"""Triton: kernels that start while the one before them ends (programmatic dependent launch).

From compute capability 9.0 on a kernel launched so gets onto multiprocessors that fall free, and
waits there for what it reads. That saves most of the time between two short kernels.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MIN_CAPABILITY = (9, 0)


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_inputs(OVERLAPS: tl.constexpr) -> None:
    """Wait until the kernels before this one are done, and let the next one come."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


def overlap(device: torch.device) -> dict[str, bool]:
    """The constant and, where it is true, the option with which to launch a kernel on a device."""
    return {"OVERLAPS": True, "launch_pdl": True} if _overlaps(device) else {"OVERLAPS": False}


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
