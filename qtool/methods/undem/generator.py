"""The networks that learn to paint moire: two encoders, a generator, a discriminator.

Module names are those of the published code, so that its state dicts load key for key. Pictures
are RGB in 0..1, their sides multiples of 4.

Reference: UnDeM (arXiv 2401.02719), section "moire synthesis network".
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Variant = Literal["own", "published"]

_FEATURES = 16
_PUBLISHED_WIDTH = 128


def _norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=False, track_running_stats=False)


class _ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            _norm(channels),
            nn.ReLU(inplace=True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            _norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)  # type: ignore[no-any-return]


def _wide(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ReflectionPad2d(3), nn.Conv2d(inputs, outputs, 7)]


class FeatureEncoder(nn.Module):
    """E^m or E^c: features of the moire, or of the content, at full resolution.

    Shape: (B, 3, H, W) to (B, 16, H, W).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1_b = nn.Sequential(*_wide(3, _FEATURES), _norm(_FEATURES), nn.ReLU(inplace=True))
        self.conv3_b = nn.Sequential(_ResBlock(_FEATURES))
        self.conv4_b = nn.Sequential(_ResBlock(_FEATURES))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Encode pictures."""
        return self.conv4_b(self.conv3_b(self.conv1_b(x)))  # type: ignore[no-any-return]


class MoireGenerator(nn.Module):
    """G^m: paints the bands that a feature map describes onto clean pictures.

    Args:
        width: Channels; the published generator has 128, a quarter of them does on a CPU.
        variant: `published` ends in tanh(residual + picture), which no bright picture survives, and
            is there for published weights; `own` adds the residual and clips.

    Shape: features (B, 16, H, W) and pictures (B, 3, H, W) to (B, 3, H, W).
    """

    def __init__(self, *, width: int = _PUBLISHED_WIDTH, variant: Variant = "own") -> None:
        super().__init__()
        self.width = width
        self.variant = variant
        self.conv1_b = nn.Sequential(
            *_wide(_FEATURES + 3, width), _norm(width), nn.ReLU(inplace=True)
        )
        self.downconv2_b = self._down(width)
        self.downconv3_b = self._down(width)
        for name in _BLOCKS:
            self.add_module(name, nn.Sequential(_ResBlock(width)))
        self.upconv13_b = self._up(width, width)
        self.upconv14_b = self._up(width, width // 2)
        self.conv15_b = nn.Sequential(*_wide(width // 2, 3))
        initialise(self)

    @staticmethod
    def _down(width: int) -> nn.Sequential:
        conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
        return nn.Sequential(conv, _norm(width), nn.ReLU(inplace=True))

    @staticmethod
    def _up(inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)
        return nn.Sequential(conv, _norm(outputs), nn.ReLU(inplace=True))

    def forward(self, features: Tensor, clean: Tensor) -> Tensor:
        """Paint moire onto clean pictures."""
        x = self.conv1_b(torch.cat([features, clean], 1))
        x = self.downconv3_b(self.downconv2_b(x))
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        residual = self.conv15_b(self.upconv14_b(self.upconv13_b(x)))
        if self.variant == "published":
            return torch.tanh(residual + clean)
        return (clean + torch.tanh(residual)).clamp(0, 1)


_BLOCKS = ("conv4_b", "conv5_b", "conv9_b", "conv10_b", "conv11_b", "conv12_b")


class MoireDiscriminator(nn.Module):
    """D^m: one number per picture, near 1 for real moire and 0 for painted moire.

    Shape: (B, 3, H, W) to (B,); H and W are at least 32.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), _leaky()]
        for inputs, outputs, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            conv = nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1)
            layers += [conv, _norm(outputs), _leaky()]
        layers.append(nn.Conv2d(512, 1, 4, padding=1))
        self.model = nn.Sequential(*layers)
        initialise(self)

    def map(self, pictures: Tensor) -> Tensor:
        """The map that is averaged: (B, 1, H/8 - 2, W/8 - 2)."""
        return self.model(pictures)  # type: ignore[no-any-return]

    def forward(self, pictures: Tensor) -> Tensor:
        """Judge pictures."""
        return self.map(pictures).mean((1, 2, 3))


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2, inplace=True)


def initialise(network: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 0.02)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
