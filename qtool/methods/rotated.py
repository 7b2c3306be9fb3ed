"""A classifier whose residual stream, queries and keys are turned so that they round better."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from qtool.models.layout import Layout, ResidualStream
from qtool.quant.rotation import mean_keeping_rotation, rotate_heads, rotate_stream

_COMPARED = 4
_TOLERANCE = 1e-3
"""Largest change of the answer that rounding of float32 explains, in parts of the answer."""


def rotated(
    model: nn.Module, layout: Layout, images: Tensor, *, quantized: Collection[str]
) -> nn.Module:
    """Rotate residual streams, queries and keys, where that leaves the model's answer as it is.

    Args:
        model: A float classifier; it is not changed.
        layout: Its streams and attentions.
        images: (N, 3, H, W), normalised; the answers to the first few are compared.
        quantized: Names of the layers that will be quantized; only those may get a bias.

    Returns:
        A rotated copy; the model itself where there is nothing to rotate, or where it computes
        something else than its layout says.
    """
    if not layout.attentions:
        return model
    sample = images[:_COMPARED]
    with torch.no_grad():
        expected = model(sample)
        for streams in dict.fromkeys((layout.streams, ())):
            found = copy.deepcopy(model)
            for stream in streams:
                _rotate(found, stream, quantized)
            for site in layout.attentions:
                attention = found.get_submodule(site.name)
                if all(_is_identity(getattr(attention, n, None)) for n in ("q_norm", "k_norm")):
                    rotate_heads(_linear(attention, "qkv"), site.heads)
            if (found(sample) - expected).abs().max() <= _TOLERANCE * expected.abs().max():
                return found
    return model


def _rotate(model: nn.Module, stream: ResidualStream, quantized: Collection[str]) -> None:
    linear = partial(_linear, model)
    named = [name for _, layers in stream.readers for name in layers]
    if any(linear(name).bias is None and name not in quantized for name in named):
        return
    rotate_stream(
        mean_keeping_rotation(len(linear(stream.writers[-1][0]).weight)),
        writers=[
            (linear(layer), model.get_submodule(scale) if scale else None)
            for layer, scale in stream.writers
        ],
        embeddings=[model.get_parameter(name) for name in stream.embeddings],
        readers=[
            (cast(nn.LayerNorm, model.get_submodule(norm)), [linear(name) for name in layers])
            for norm, layers in stream.readers
        ],
    )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)
