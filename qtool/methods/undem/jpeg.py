"""The loss of a JPEG file, without the file: colour, blocks of 8x8, quantized cosines.

Reference: ITU-T T.81, annexes A and K.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from qtool.methods.undem.filters import constant

_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def compressed(picture: Tensor, *, quality: int, subsampled: bool) -> Tensor:
    """Return what is left of a picture after JPEG compression.

    Args:
        picture: (3, H, W) in 0..1; values are rounded to 8 bits first.
        quality: 1..100, on the scale of libjpeg.
        subsampled: Whether colour is kept at half the resolution (4:2:0).

    Returns:
        (3, H, W), multiples of 1/255.
    """
    height, width = picture.shape[-2:]
    levels = picture.clamp(0, 1).mul(255).round()
    levels = F.pad(levels[None], (0, -width % 16, 0, -height % 16), mode="replicate")[0]
    forward = constant(_TO_YCC, picture.device)
    luma, *chroma = torch.einsum("ij,jhw->ihw", forward, levels).split(1)
    planes = [_coded(luma - 128, _table(_LUMA, quality)) + 128]
    wide = torch.full((8, 8), 99.0)
    wide[:4, :4] = torch.tensor(_CHROMA_CORNER, dtype=torch.float32)
    table = _scaled(wide, quality)
    for plane in chroma:
        small = F.avg_pool2d(plane, 2) if subsampled else plane
        coded = _coded(small, table)
        if subsampled:
            coded = F.interpolate(
                coded[None], scale_factor=2, mode="bilinear", align_corners=False
            )[0]
        planes.append(coded)
    inverse = torch.linalg.inv(torch.tensor(_TO_YCC)).to(picture.device, non_blocking=True)
    back = torch.einsum("ij,jhw->ihw", inverse, torch.cat(planes))
    return back[:, :height, :width].round().clamp(0, 255) / 255


def _table(rows: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    return _scaled(torch.tensor(rows, dtype=torch.float32), quality)


def _scaled(table: Tensor, quality: int) -> Tensor:
    percent = 5000 / quality if quality < 50 else 200 - 2 * quality
    return ((table * percent + 50) / 100).floor().clamp(1, 255)


def _coded(plane: Tensor, table: Tensor) -> Tensor:
    """Quantize the cosines of every 8x8 block of a plane (1, H, W)."""
    height, width = plane.shape[-2:]
    place = torch.arange(8, device=plane.device, dtype=torch.float32)
    cosines = torch.cos((2 * place[None, :] + 1) * place[:, None] * (math.pi / 16)) / 2
    cosines[0] /= math.sqrt(2)
    blocks = plane.view(height // 8, 8, width // 8, 8).transpose(1, 2)
    steps = table.to(plane.device, non_blocking=True)
    coefficients = (cosines @ blocks @ cosines.T / steps).round() * steps
    return (cosines.T @ coefficients @ cosines).transpose(1, 2).reshape(1, height, width)
