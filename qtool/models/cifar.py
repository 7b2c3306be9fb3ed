"""Small residual networks for pictures of 32 x 32, as He et al. describe them for CIFAR-10.

Three stages of 3 x 3 convolutions with 16, 32 and 64 channels. Where a stage begins, the shortcut
skips every other pixel and fills the new channels with zeros: it has no weights ("option A"). Names
of parts and weights are those of the widespread PyTorch implementations, so that their files fit.

Reference: He et al. 2015 (arXiv 1512.03385), section 4.2.
"""

from __future__ import annotations

from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor, nn

from qtool.models.data_config import DataConfig

DATA: Final = DataConfig((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 1.0)
"""What the usual weights of these networks were trained with."""

DEPTHS: Final = {f"resnet{depth}": depth for depth in (8, 20, 32, 44, 56, 110)}
HEAD: Final = "linear"

_STAGES = 3
_LAYERS_PER_BLOCK = 2


class PaddedShortcut(nn.Module):
    """A shortcut without weights: fewer pixels, more channels.

    Args:
        stride: Distance between the pixels that are kept.
        before: Channels of zeros put before those of the input, and as many after them.
    """

    def __init__(self, stride: int, before: int) -> None:
        super().__init__()
        self.stride, self.before = stride, before

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + 2 * before, H / stride, W / stride)."""
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, self.before, self.before))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut around them.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else PaddedShortcut(stride, (outputs - inputs) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        y = F.relu(self.bn1(self.conv1(x)))
        result: Tensor = F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return result


class CifarResNet(nn.Module):
    """A residual network for small pictures: (B, 3, H, W) to (B, classes).

    Args:
        depth: Number of layers with weights, six times the blocks of a stage and two.
        num_classes: Width of the output.
        width: Channels of the first stage; the next ones have two and four times as many.
    """

    def __init__(self, depth: int, *, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        blocks = (depth - 2) // (_STAGES * _LAYERS_PER_BLOCK)
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, classes)."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.global_pool(x))
        return logits


def build(name: str, **arguments: Any) -> CifarResNet:  # noqa: ANN401
    """A network by its name, with random weights.

    Raises:
        TypeError: An argument is unknown.
    """
    return CifarResNet(DEPTHS[name], **arguments)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one size, the first of which changes to it."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
