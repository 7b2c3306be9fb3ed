"""Rotations that leave a transformer's function as it is and its activations easier to round.

A few channels of a vision transformer hold most of its outliers. An orthogonal matrix spreads them
over all channels, whose values then look alike and nearly normal, and costs nothing at run time:
it is multiplied into the weights on either side.

Reference: QuaRot (arXiv 2404.00456), and SliceGPT (arXiv 2401.15024) for LayerNorm, whose mean is
kept by rotations that leave the vector of ones where it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SEED = 0x5BD1


def rotation(width: int) -> Tensor:
    """An orthogonal matrix, drawn evenly among all; the same in every run.

    Args:
        width: Rows and columns.

    Returns:
        float64 (width, width).
    """
    generator = torch.Generator().manual_seed(_SEED + width)
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(drawn)
    signed: Tensor = orthogonal * upper.diagonal().sign()
    return signed


def mean_keeping_rotation(width: int) -> Tensor:
    """An orthogonal matrix that maps the vector of ones to itself, float64 (width, width).

    LayerNorm commutes with it: mean and variance of a vector stay what they were.
    """
    ones = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    drawn = rotation(width)
    drawn[:, :1] = ones
    others = torch.linalg.qr(drawn).Q[:, 1:]
    turned: Tensor = ones @ ones.T + others @ rotation(width - 1) @ others.T
    return turned


@torch.no_grad()
def rotate_stream(
    turn: Tensor,
    *,
    writers: Sequence[tuple[nn.Linear | nn.Conv2d, nn.Module | None]],
    embeddings: Sequence[nn.Parameter],
    readers: Sequence[tuple[nn.LayerNorm, Sequence[nn.Linear]]],
) -> None:
    """Rotate a residual stream, in place, with what its readers compute unchanged.

    The scales and shifts of LayerNorms, and LayerScales, move into the layers beside them.

    Args:
        turn: Orthogonal, keeps the vector of ones, (D, D).
        writers: Layers with D outputs that are added to the stream; a LayerScale in between.
        embeddings: Parameters (..., D) that are added to the stream.
        readers: LayerNorms of the stream, or of several of its positions side by side, and the
            linear layers that alone read them. A layer without bias gets one.
    """
    turn = turn.to(readers[0][0].weight.device)
    for layer, scale in writers:
        factor = turn if scale is None else turn * scale.gamma.double()  # type: ignore[operator]
        _set(layer.weight, (factor @ layer.weight.double().flatten(1)).view_as(layer.weight))
        if layer.bias is not None:
            _set(layer.bias, factor @ layer.bias.double())
        if scale is not None:
            scale.gamma.fill_(1.0)  # type: ignore[operator]
    for embedding in embeddings:
        _set(embedding, embedding.double() @ turn.T)
    for norm, layers in readers:
        for linear in layers:
            weight = linear.weight.double()
            shift = weight @ norm.bias.double()
            if linear.bias is None:
                linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
            _set(linear.bias, linear.bias.double() + shift)
            scaled = (weight * norm.weight.double()).unflatten(1, (-1, len(turn)))
            _set(linear.weight, (scaled @ turn.T).flatten(1))
        norm.weight.fill_(1.0)
        norm.bias.zero_()


@torch.no_grad()
def rotate_heads(qkv: nn.Linear, heads: int) -> None:
    """Rotate queries and keys of every head alike, in place: their products stay what they were.

    Args:
        qkv: The layer that makes queries, keys and values, with 3 C outputs.
        heads: Number of heads.
    """
    turn = rotation(qkv.out_features // (3 * heads)).to(qkv.weight.device)
    count = 2 * qkv.out_features // 3
    for parameter in (qkv.weight, qkv.bias):
        if parameter is not None:
            rows = parameter.double().reshape(len(parameter), -1)
            rows[:count] = (turn @ rows[:count].unflatten(0, (2 * heads, -1))).flatten(0, 1)
            _set(parameter, rows.view_as(parameter))


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
