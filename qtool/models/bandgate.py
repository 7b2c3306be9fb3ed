"""A small demoire network that only ever turns bands down.

The picture is split into oriented bands of five octaves, brightness and colour apart, which add up
to the picture exactly. A pyramid of convolutions looks at all of them and decides at every place
which band to keep. Nothing is painted: what was not in the photograph cannot come out. That makes
the network quick to train and hard to misuse, and limits it where moire lies on texture of its own
scale and direction.

The bands are those of an undecimated separable B-spline wavelet ("à trous": Starck, Fadili and
Murtagh 2007); gating them is adaptive wavelet shrinkage with a learnt rule.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TO_OPPONENT = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
_ORIENTATIONS = 3
_CLOSED = -2.0
_SLOPE = 0.2
_SMALL = 1e-4
_LOUD = 8.0


class BandGate(nn.Module):
    """Gates on the oriented bands of a picture.

    Args:
        octaves: Bands of different scale; the coarsest has periods of about 2^octaves pixels.
        width: Channels of the convolutions.

    Shape: (B, 3, H, W) to a tuple of one picture (B, 3, H, W); H and W are multiples of
    `size_multiple`.
    """

    residual = True
    to_opponent: Tensor
    from_opponent: Tensor

    def __init__(self, *, octaves: int = 5, width: int = 32) -> None:
        super().__init__()
        self.octaves = octaves
        self.width = width
        inputs = 3 * 4 + 2 * _ORIENTATIONS
        self.looks = nn.ModuleList(_Look(inputs + width, width) for _ in range(octaves))
        self.gates = nn.ModuleList(nn.Conv2d(width, 2 * _ORIENTATIONS, 1) for _ in range(octaves))
        for gate in self.gates:
            # Open everywhere to begin with: an untrained network leaves pictures nearly alone.
            nn.init.zeros_(gate.weight)  # type: ignore[arg-type]
            nn.init.constant_(gate.bias, _CLOSED)  # type: ignore[arg-type]
        matrix = torch.tensor(_TO_OPPONENT)
        self.register_buffer("to_opponent", matrix, persistent=False)
        self.register_buffer("from_opponent", torch.linalg.inv(matrix), persistent=False)

    @property
    def size_multiple(self) -> int:
        """What height and width must be multiples of: one halving per octave."""
        return 1 << self.octaves

    def blocks(self) -> list[str]:
        """Modules of one input and one output that hold all layers, in the order they run in."""
        octaves = reversed(range(self.octaves))
        return [f"{part}.{octave}" for octave in octaves for part in ("looks", "gates")]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Turn bands down; see the class for shapes."""
        opponent = torch.einsum("ij,bjhw->bihw", self.to_opponent, x)
        bands = self.split(opponent)
        state = x.new_zeros(len(x), self.width, 1, 1)
        luma, chroma = torch.zeros_like(opponent).split((1, 2), 1)
        for octave in reversed(range(self.octaves)):
            seen = self._seen(opponent, bands[octave], octave)
            state = F.interpolate(state, size=seen.shape[-2:], mode="bilinear", align_corners=False)
            state = self.looks[octave](torch.cat((seen, state), 1))
            # Planes of float32 are enlarged several times as fast on a CPU.
            gates = self.gates[octave](state).float().contiguous()
            shut = F.interpolate(
                gates, size=x.shape[-2:], mode="bilinear", align_corners=False
            ).sigmoid()
            for index, band in enumerate(bands[octave]):
                at = _ORIENTATIONS + index
                luma = torch.addcmul(luma, shut[:, index : index + 1], band[:, :1])
                chroma = torch.addcmul(chroma, shut[:, at : at + 1], band[:, 1:])
        removed = torch.cat((luma, chroma), 1)
        return (x - torch.einsum("ij,bjhw->bihw", self.from_opponent, removed),)

    def split(self, opponent: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Oriented bands (B, 3, H, W) of every octave, the finest first.

        They and the smooth rest add up to the picture.
        """
        bands = []
        smooth = opponent
        for octave in range(self.octaves):
            across = self._smoothed(smooth, octave, -1)
            both = self._smoothed(across, octave, -2)
            down = self._smoothed(smooth, octave, -2)
            bands.append((down - both, across - both, smooth - across - down + both))
            smooth = both
        return bands

    def _smoothed(self, x: Tensor, octave: int, dim: int) -> Tensor:
        reach = 2**octave
        ends = (2 * reach, 2 * reach, 0, 0) if dim == -1 else (0, 0, 2 * reach, 2 * reach)
        mode = "reflect" if 2 * reach < x.shape[dim] else "replicate"
        padded = F.pad(x, ends, mode=mode)
        parts = [padded.narrow(dim, tap * reach, x.shape[dim]) for tap in range(5)]
        # Sums of shifted pictures: PyTorch's convolution of few channels takes four times as long.
        near, far = parts[1] + parts[3], parts[0] + parts[4]
        smoothed = torch.add(far, near, alpha=4)
        return torch.add(smoothed, parts[2], alpha=6) / 16

    def _seen(self, opponent: Tensor, bands: tuple[Tensor, ...], octave: int) -> Tensor:
        """What the convolutions of an octave look at, at 1 / 2^(octave + 1) of the size."""
        small = F.avg_pool2d(opponent, 2**octave) if octave else opponent
        pixels = F.pixel_unshuffle(small, 2)
        energy = torch.cat([band.abs() for band in bands], 1)
        strength = F.avg_pool2d(energy, 2 ** (octave + 1)).mul(_LOUD)
        luma, chroma = strength[:, ::3], strength[:, 1::3] + strength[:, 2::3]
        return torch.cat((pixels, luma, chroma), 1)


class _Look(nn.Module):
    """Two convolutions with a residual connection, to features of unit size at every place."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), _SLOPE)
        x = x + F.leaky_relu(self.second(x), _SLOPE)
        # Without this, features grow from octave to octave and gates stick at their ends.
        return x * (x.square().mean(1, keepdim=True) + _SMALL).rsqrt()
