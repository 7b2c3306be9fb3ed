"""What BatchNorms remember of the training pictures, and how far a batch is from it.

Networks without attention have no map to align. Those with BatchNorm kept the mean and variance of
every channel instead, which pictures made from noise can be driven to match.

References: ZeroQ (arXiv 2001.00281); DeepInversion (arXiv 1912.08795).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def remembered(model: nn.Module) -> list[str]:
    """Names of the BatchNorms whose statistics come from data.

    Means of exactly 0 and variances of exactly 1 everywhere are those of a BatchNorm that has seen
    nothing, or whose work was folded into a convolution before the weights were saved.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            mean, variance = module.running_mean, module.running_var
            if mean is not None and variance is not None and (mean.any() or (variance != 1).any()):
                names.append(name)
    return names


def distance(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """How far the channels of a batch are from the mean and variance that a BatchNorm remembers.

    Args:
        x: Input of the BatchNorm, (B, C, H, W).
        norm: The BatchNorm.

    Returns:
        Scalar: squared differences of means and of standard deviations in units of the remembered
        standard deviation, averaged over channels.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("the BatchNorm keeps no statistics")
    variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), unbiased=False)
    spread = (norm.running_var + norm.eps).sqrt()
    shift = (mean - norm.running_mean) / spread
    stretch = (variance + norm.eps).sqrt() / spread - 1.0
    return (shift.square() + stretch.square()).mean()


@contextmanager
def measured(model: nn.Module, names: Sequence[str], *, count: int) -> Iterator[list[Tensor]]:
    """Record the distance of every named BatchNorm for the first `count` pictures of a batch."""
    store: list[Tensor] = []

    def record(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(norm, nn.BatchNorm2d):
            store.append(distance(inputs[0][:count], norm))

    handles = [model.get_submodule(name).register_forward_pre_hook(record) for name in names]
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()
