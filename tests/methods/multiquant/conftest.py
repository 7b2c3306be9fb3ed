"""A residual network small enough to train in a test."""

from collections.abc import Callable

import pytest
from torch import nn


@pytest.fixture
def tiny_resnet(
    build_model: Callable[..., nn.Module], trained_norms: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Seven convolutions of 8 to 32 channels, 3 classes, for pictures of any size."""
    return trained_norms(build_model("resnet8", width=8, num_classes=3))
