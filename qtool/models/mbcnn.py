"""MBCNN: learnable bandpass filters in an implicit frequency domain, and global tone mapping.

Module names are those of the PyTorch checkpoints, so that their state dicts load key for key. The
ports that wrote these checkpoints differ in two points that leave no trace in the keys; both are
options here, `head` and `dct`.

The network takes display-encoded RGB in 0..1 and returns three pictures, the coarsest first.

Reference: Zheng et al. 2020, "Image demoireing with learnable bandpass filters",
arXiv:2004.00406.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.errors import UsageError

Head = Literal["sigmoid", "mixed", "linear"]
"""Where a sigmoid limits the outputs: on all three, on the finest alone, or nowhere."""

Dct = Literal["relu_product", "signed"]
"""`relu_product` is what PyTorch ports compute, with negative entries of the transform cut to
zero; `signed` is the transform as published, with weights that are not negative."""

_WIDTH = 128
_GROWTH = 64
_DILATIONS = (1, 2, 3, 2, 1)
_COARSE_DILATIONS = (1, 2, 2, 2, 1)


def inverse_cosine_transform(side: int = 8) -> Tensor:
    """The two-dimensional cosine transform of squares as one matrix.

    Args:
        side: Pixels on a side, N.

    Returns:
        (N², N²): row u N + v is frequency (u, v), column i N + j is pixel (i, j). Rows are
        orthonormal.

    Reference: arXiv:2004.00406, equation 5.
    """
    pixel = torch.arange(side, dtype=torch.float64)
    frequency = pixel.view(-1, 1)
    basis = torch.cos((2 * pixel + 1) * frequency * math.pi / (2 * side)) * math.sqrt(2 / side)
    basis[0] = math.sqrt(1 / side)
    return torch.kron(basis, basis).float()


class _Conv(nn.Module):
    """A convolution under the name `conv` that checkpoints expect, with or without a ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        padding: int | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride=stride, dilation=dilation, padding=padding
        )
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(x) if self.relu else x


class _TransformWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.it_weights = nn.Parameter(torch.ones(_GROWTH, 1, 1, 1))


class ImplicitTransform(nn.Module):
    """A fixed cosine transform over 64 channels, each frequency with a learnt weight.

    Shape: (B, 64, H, W) to the same.

    Reference: arXiv:2004.00406, section 3.2.
    """

    kernel: Tensor

    def __init__(self, dct: Dct) -> None:
        super().__init__()
        self.dct = dct
        self.it_weights = _TransformWeights()
        kernel = inverse_cosine_transform().view(_GROWTH, _GROWTH, 1, 1)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Run the weighted transform as a convolution of one pixel."""
        weights = self.it_weights.it_weights
        if self.dct == "relu_product":
            return F.conv2d(x, F.relu(self.kernel * weights))
        return F.conv2d(x, (self.kernel * weights.clamp(min=0)).transpose(0, 1))


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kernel


def _dense(x: Tensor, layers: list[nn.Module]) -> Tensor:
    """Feed each layer everything before it, the newest channels first."""
    for layer in layers:
        x = torch.cat((layer(x), x), dim=1)
    return x


class MoireBlock(nn.Module):
    """The learnable bandpass filter: dense features, transform, and what it says added on.

    Shape: (B, 128, H, W) to the same.

    Reference: arXiv:2004.00406, section 3.3, "MTRB".
    """

    def __init__(self, dilations: tuple[int, ...], dct: Dct) -> None:
        super().__init__()
        for index, dilation in enumerate(dilations):
            layer = _Conv(_WIDTH + index * _GROWTH, _GROWTH, 3, dilation=dilation)
            self.add_module(f"conv_relu{index + 1}", layer)
        self.conv1 = _Conv(_WIDTH + len(dilations) * _GROWTH, _GROWTH, 3, relu=False)
        self.adaptive_implicit_trans1 = ImplicitTransform(dct)
        self.conv2 = _Conv(_GROWTH, _WIDTH, 1, relu=False)
        self.ScaleLayer1 = _Scale()
        self._count = len(dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        layers = [self.get_submodule(f"conv_relu{i + 1}") for i in range(self._count)]
        spectrum = self.conv1(_dense(x, layers))
        change = self.ScaleLayer1(self.conv2(self.adaptive_implicit_trans1(spectrum)))
        return x + change  # type: ignore[no-any-return]


class GlobalToneBlock(nn.Module):
    """Channels weighted by what the whole picture holds.

    Shape: (B, 128, H, W) to the same.

    Reference: arXiv:2004.00406, section 3.4, "GTMB".
    """

    def __init__(self) -> None:
        super().__init__()
        wide = 2 * _WIDTH
        self.conv_func1 = _Conv(_WIDTH, wide, 3, stride=2, padding=2)
        self.dense1 = nn.Linear(wide, 1024)
        self.dense2 = nn.Linear(1024, 512)
        self.dense3 = nn.Linear(512, wide)
        self.conv_func2 = _Conv(_WIDTH, wide, 1)
        self.conv_func3 = _Conv(wide, _WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        means = self.conv_func1(x).mean(dim=(2, 3))
        weights = self.dense3(F.relu(self.dense2(F.relu(self.dense1(means)))))
        toned = self.conv_func2(x) * weights[:, :, None, None]
        return self.conv_func3(toned)  # type: ignore[no-any-return]


class LocalToneBlock(nn.Module):
    """Dense features folded back to their width.

    Shape: (B, 128, H, W) to the same.

    Reference: arXiv:2004.00406, section 3.4, "LTMB".
    """

    def __init__(self, dilations: tuple[int, ...]) -> None:
        super().__init__()
        for index, dilation in enumerate(dilations):
            layer = _Conv(_WIDTH + index * _GROWTH, _GROWTH, 3, dilation=dilation)
            self.add_module(f"conv_func{index + 1}", layer)
        self.conv_func_last = _Conv(_WIDTH + len(dilations) * _GROWTH, _WIDTH, 1)
        self._count = len(dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        layers = [self.get_submodule(f"conv_func{i + 1}") for i in range(self._count)]
        return self.conv_func_last(_dense(x, layers))  # type: ignore[no-any-return]


class MBCNN(nn.Module):
    """Three scales, each with bandpass and tone blocks; what a coarse one finds feeds the next.

    Args:
        head: Where a sigmoid limits the outputs.
        dct: How the implicit transform is computed.

    Shape: (B, 3, H, W) to (B, 3, H/4, W/4), (B, 3, H/2, W/2), (B, 3, H, W); H and W are multiples
    of 8.

    Raises:
        UsageError: There is no such variant.

    Reference: arXiv:2004.00406, figure 2.
    """

    residual = False
    size_multiple = 32

    def __init__(self, *, head: Head = "sigmoid", dct: Dct = "relu_product") -> None:
        super().__init__()
        for what, value, known in (("head", head, get_args(Head)), ("dct", dct, get_args(Dct))):
            if value not in known:
                raise UsageError(
                    f"MBCNN has no {what} variant {value!r}", remedy=f"choose {', '.join(known)}"
                )
        self.head = head
        self.conv_func1 = _Conv(12, _WIDTH, 3)
        self.pre_block1 = MoireBlock(_DILATIONS, dct)
        self.conv_func2 = _Conv(_WIDTH, _WIDTH, 3, stride=2)
        self.pre_block2 = MoireBlock(_DILATIONS, dct)
        self.conv_func3 = _Conv(_WIDTH, _WIDTH, 3, stride=2)
        self.pre_block3 = MoireBlock(_COARSE_DILATIONS, dct)
        self.global_block1 = GlobalToneBlock()
        self.pos_block1 = LocalToneBlock(_COARSE_DILATIONS)
        self.conv1 = _Conv(_WIDTH, 12, 3, relu=False)
        self.conv_func4 = _Conv(_WIDTH + 3, _WIDTH, 1)
        self.global_block2 = GlobalToneBlock()
        self.pre_block4 = MoireBlock(_DILATIONS, dct)
        self.global_block3 = GlobalToneBlock()
        self.pos_block2 = LocalToneBlock(_DILATIONS)
        self.conv2 = _Conv(_WIDTH, 12, 3, relu=False)
        self.conv_func5 = _Conv(_WIDTH + 3, _WIDTH, 1)
        self.global_block4 = GlobalToneBlock()
        self.pre_block5 = MoireBlock(_DILATIONS, dct)
        self.global_block5 = GlobalToneBlock()
        self.pos_block3 = LocalToneBlock(_DILATIONS)
        self.conv3 = _Conv(_WIDTH, 12, 3, relu=False)

    def blocks(self) -> list[str]:
        """Modules of one input and one output that hold all layers, in the order they run in."""
        down = [f"{part}{level}" for level in (1, 2, 3) for part in ("conv_func", "pre_block")]
        coarse = ["global_block1", "pos_block1", "conv1"]
        middle = ["conv_func4", "global_block2", "pre_block4", "global_block3", "pos_block2"]
        fine = ["conv_func5", "global_block4", "pre_block5", "global_block5", "pos_block3"]
        return [*down, *coarse, *middle, "conv2", *fine, "conv3"]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Remove moire; see the class for shapes."""
        first = self.pre_block1(self.conv_func1(F.pixel_unshuffle(x, 2)))
        second = self.pre_block2(self.conv_func2(first))
        third = self.pre_block3(self.conv_func3(second))
        third = self.conv1(self.pos_block1(self.global_block1(third)))
        quarter = self._limited(F.pixel_shuffle(third, 2), finest=False)
        second = self.global_block2(self.conv_func4(torch.cat((quarter, second), dim=1)))
        second = self.conv2(self.pos_block2(self.global_block3(self.pre_block4(second))))
        half = self._limited(F.pixel_shuffle(second, 2), finest=False)
        first = self.global_block4(self.conv_func5(torch.cat((first, half), dim=1)))
        first = self.conv3(self.pos_block3(self.global_block5(self.pre_block5(first))))
        return quarter, half, self._limited(F.pixel_shuffle(first, 2), finest=True)

    def _limited(self, x: Tensor, *, finest: bool) -> Tensor:
        if self.head == "sigmoid" or (finest and self.head == "mixed"):
            return x.sigmoid()
        return x
