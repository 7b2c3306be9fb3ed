"""ESDNet, ESDNet-L, and a small relative for processors without a GPU.

Module names are those of the published checkpoints, so that their state dicts load key for key.
Networks take display-encoded RGB in 0..1 and return three pictures: full, half and quarter size.
Only the first is a result; the others are for training. Nothing limits the values.

Reference: Yu et al. 2022, "Towards efficient and scale-robust ultra-high-definition image
demoireing", arXiv:2207.09935, section 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GAIN = 0.8 * math.sqrt(2)
_RESIDUAL_DILATIONS = (1, 2, 1)
_DENSE_DILATIONS = (1, 2, 3, 2, 1)


def resize(x: Tensor, factor: float) -> Tensor:
    """Resize (B, C, H, W) bilinearly to (B, C, factor H, factor W), corners not aligned."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class _Conv(nn.Module):
    """A convolution that keeps the size, under the name `conv` that checkpoints expect."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class _ConvReLU(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class DenseBlock(nn.Module):
    """Dilated convolutions, each fed by the input and all outputs before it, the newest first.

    Args:
        channels: Width C of input and output.
        growth: Width of every dilated convolution.
        dilations: One convolution each.
        residual: Whether the input is added to the output.

    Shape: (B, C, H, W) to the same.
    """

    def __init__(
        self, channels: int, growth: int, dilations: tuple[int, ...], *, residual: bool
    ) -> None:
        super().__init__()
        self.residual = residual
        self.conv_layers = nn.ModuleList(
            _ConvReLU(channels + index * growth, growth, dilation=dilation)
            for index, dilation in enumerate(dilations)
        )
        self.conv_post = _Conv(channels + len(dilations) * growth, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        features = x
        for layer in self.conv_layers:
            features = torch.cat((layer(features), features), dim=1)
        out = self.conv_post(features)
        return out + x if self.residual else out  # type: ignore[no-any-return]


class CrossScaleFusion(nn.Module):
    """Weigh three feature maps per channel by what all of them hold on average, and add them up.

    Args:
        channels: Width C of each map.

    Shape: three times (B, C, H, W) to (B, C, H, W).

    Reference: arXiv:2207.09935, section 4.2, "CSAF".
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        total, squeezed = 3 * channels, 3 * channels // 4
        self.compress1 = nn.Conv2d(total, squeezed, 1)
        self.compress2 = nn.Conv2d(squeezed, squeezed, 1)
        self.excitation = nn.Conv2d(squeezed, total, 1)

    def forward(self, full: Tensor, half: Tensor, quarter: Tensor) -> Tensor:
        """Fuse maps that have been brought to one size."""
        maps = (full, half, quarter)
        means = torch.cat([x.mean(dim=(2, 3), keepdim=True) for x in maps], dim=1)
        hidden = F.relu(self.compress2(F.relu(self.compress1(means))))
        weights = self.excitation(hidden).sigmoid().chunk(3, dim=1)
        fused: Tensor = full * weights[0] + half * weights[1] + quarter * weights[2]
        return fused


class ScaleAwareModule(nn.Module):
    """Dense blocks at full, half and quarter size, fused and added to the input (SAM).

    Shape: (B, C, H, W) to the same; H and W are multiples of 4.

    Reference: arXiv:2207.09935, section 4.2.
    """

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.basic_block = DenseBlock(channels, growth, _DENSE_DILATIONS, residual=False)
        self.basic_block_2 = DenseBlock(channels, growth, _DENSE_DILATIONS, residual=False)
        self.basic_block_4 = DenseBlock(channels, growth, _DENSE_DILATIONS, residual=False)
        self.fusion = CrossScaleFusion(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Run the module."""
        full = self.basic_block(x)
        half = resize(self.basic_block_2(resize(x, 0.5)), 2.0)
        quarter = resize(self.basic_block_4(resize(x, 0.25)), 4.0)
        return x + self.fusion(full, half, quarter)  # type: ignore[no-any-return]


class _Stage(nn.Module):
    """A residual dense block and the scale-aware modules after it."""

    def __init__(self, channels: int, growth: int, sam_blocks: int) -> None:
        super().__init__()
        self.rdb = DenseBlock(channels, growth, _RESIDUAL_DILATIONS, residual=True)
        self.sam_blocks = nn.ModuleList(
            ScaleAwareModule(channels, growth) for _ in range(sam_blocks)
        )

    def blocks(self) -> list[str]:
        return ["rdb", *(f"sam_blocks.{index}" for index in range(len(self.sam_blocks)))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.rdb(x)
        for block in self.sam_blocks:
            x = block(x)
        return x


class _EncoderStage(_Stage):
    def __init__(self, channels: int, growth: int, sam_blocks: int, *, down: bool) -> None:
        super().__init__(channels, growth, sam_blocks)
        if down:
            self.down = nn.Sequential(
                nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.ReLU(inplace=True)
            )


class _DecoderStage(_Stage):
    def __init__(self, channels: int, growth: int, sam_blocks: int, heads: int) -> None:
        super().__init__(channels, growth, sam_blocks)
        self.conv = _Conv(channels, heads, 3)


class _Encoder(nn.Module):
    def __init__(self, inputs: int, width: int, growth: int, sam_blocks: int) -> None:
        super().__init__()
        self.conv_first = nn.Sequential(
            nn.Conv2d(inputs, width, 5, padding=2), nn.ReLU(inplace=True)
        )
        self.encoder_1 = _EncoderStage(width, growth, sam_blocks, down=True)
        self.encoder_2 = _EncoderStage(2 * width, growth, sam_blocks, down=True)
        self.encoder_3 = _EncoderStage(4 * width, growth, sam_blocks, down=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = self.encoder_1(self.conv_first(x))
        second = self.encoder_2(self.encoder_1.down(first))
        third = self.encoder_3(self.encoder_2.down(second))
        return first, second, third


class _Decoder(nn.Module):
    def __init__(
        self, width: int, encoder_width: int, growth: int, sam_blocks: int, heads: int
    ) -> None:
        super().__init__()
        self.preconv_3 = _ConvReLU(4 * encoder_width, width)
        self.decoder_3 = _DecoderStage(width, growth, sam_blocks, heads)
        self.preconv_2 = _ConvReLU(2 * encoder_width + width, width)
        self.decoder_2 = _DecoderStage(width, growth, sam_blocks, heads)
        self.preconv_1 = _ConvReLU(encoder_width + width, width)
        self.decoder_1 = _DecoderStage(width, growth, sam_blocks, heads)

    def forward(self, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, ...]:
        x = self.decoder_3(self.preconv_3(third))
        head_3 = self.decoder_3.conv(x)
        x = self.decoder_2(self.preconv_2(torch.cat((second, resize(x, 2.0)), dim=1)))
        head_2 = self.decoder_2.conv(x)
        x = self.decoder_1(self.preconv_1(torch.cat((first, resize(x, 2.0)), dim=1)))
        return self.decoder_1.conv(x), head_2, head_3


class ESDNet(nn.Module):
    """A three-level encoder and decoder of dense and scale-aware blocks.

    The defaults are ESDNet; two `sam_blocks` make ESDNet-L.

    Args:
        encoder_width: Channels of the first level; the next two have twice and four times that.
        decoder_width: Channels of every decoder level.
        growth: Channels of each convolution in a dense block.
        sam_blocks: Scale-aware modules per level.
        unshuffle: Side of the squares of pixels that become channels before the first
            convolution; 4 instead of 2 leaves a quarter of the positions to compute.
        residual: Whether the network predicts what to add to its input. The heads then start at
            zero, so that the untrained network is the identity.

    Shape: (B, 3, H, W) to (B, 3, H, W), (B, 3, H/2, W/2), (B, 3, H/4, W/4); H and W are multiples
    of `size_multiple`.

    Reference: arXiv:2207.09935, figure 4.
    """

    def __init__(
        self,
        *,
        encoder_width: int = 48,
        decoder_width: int = 64,
        growth: int = 32,
        sam_blocks: int = 1,
        unshuffle: int = 2,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.residual = residual
        pixels = 3 * unshuffle**2
        self.encoder = _Encoder(pixels, encoder_width, growth, sam_blocks)
        self.decoder = _Decoder(decoder_width, encoder_width, growth, sam_blocks, pixels)
        if residual:
            self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Features keep their size on the way down; the framework's own choice lets them
                # fade, and the first hundreds of steps are lost.
                std = _GAIN / math.sqrt(module.weight[0].numel())
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for stage in (self.decoder.decoder_1, self.decoder.decoder_2, self.decoder.decoder_3):
            nn.init.zeros_(stage.conv.conv.weight)

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of: two halvings, then quarters in each SAM."""
        return self.unshuffle * 4 * 4

    def blocks(self) -> list[str]:
        """Modules of one input and one output that hold all layers, in the order they run in."""
        inner = self.encoder.encoder_1.blocks()  # the same at every level
        names = ["encoder.conv_first"]
        for level in (1, 2, 3):
            names += [f"encoder.encoder_{level}.{name}" for name in inner]
            names += [f"encoder.encoder_{level}.down"] if level < 3 else []
        for level in (3, 2, 1):
            names.append(f"decoder.preconv_{level}")
            names += [f"decoder.decoder_{level}.{name}" for name in (*inner, "conv")]
        return names

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remove moire; see the class for shapes."""
        heads = self.decoder(*self.encoder(F.pixel_unshuffle(x, self.unshuffle)))
        full, half, quarter = (F.pixel_shuffle(head, self.unshuffle) for head in heads)
        if self.residual:
            full, half, quarter = full + x, half + F.avg_pool2d(x, 2), quarter + F.avg_pool2d(x, 4)
        return full, half, quarter
