"""Sizes of convolutions that the contracts, the reference and the kernels must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def output_size(
    size: Sequence[int],
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of a convolution's result; below 1 where the kernel does not fit."""
    height, width = (
        (size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis]
        + 1
        for axis in range(2)
    )
    return height, width


def cuts_patches(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether every input is read at most once, as by a linear layer over patches."""
    apart = list(kernel) == list(stride) and list(dilation) == [1, 1]
    return apart and not any(padding) and groups == 1


def layout_of(x: Tensor) -> torch.memory_format:
    """Channels last for pictures that lie so, else contiguous; where both are true, contiguous."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not x.is_contiguous() else torch.contiguous_format
