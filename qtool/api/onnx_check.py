"""Whether an exported model computes what the engine does.

Few bits make a network jumpy: a difference in the last bit of a float may move an activation by a
whole level, and that the activations of the next layers. So the outputs of two correct programs
differ, and say little. Two comparisons do better. In lockstep, every part of the model is given
what ONNX Runtime computed up to there, so that differences cannot pile up. And the distance between
the final outputs is held against what noise in the last bits does to the engine's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.quant.layers import IntegerProducts
from qtool.quant.nested_layers import NestedProducts

FLOAT_TOLERANCE = 1e-3
"""Relative error of what lies between the quantized layers, and of the logits."""

LAYER_TOLERANCE = 1e-2
"""Relative error of a quantized layer; a single code on the edge of two makes 1e-3 of it."""

OUTPUT_TOLERANCE = 0.25
"""Relative error of the logits of two independent runs that is always allowed: codes on the edge of
two made 13 % of it in a small ResNet of 4 bits. Only a coarse net beside the
lockstep, which is exact to `LAYER_TOLERANCE`."""

_NOISE = 1e-6
_NOISE_FACTOR = 2.0
_DRAWS = 3

_Call = Callable[..., Tensor]


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def lockstep(
    model: nn.Module, images: Tensor, taps: Sequence[str], outputs: Sequence[Tensor]
) -> dict[str, float]:
    """Run the engine beside the recorded outputs of an exported model, part by part.

    Args:
        model: The model, of integer layers.
        images: Pictures, (B, 3, H, W).
        taps: Names of the layers that were recorded, in forward order.
        outputs: The logits, then the inputs and the output of each of these layers.

    Returns:
        The largest relative error of a quantized layer and of what lies between them.

    Raises:
        QtoolError: A part computes something else.
    """
    logits, *recorded = outputs
    worst = {"layer_difference": 0.0, "float_difference": 0.0}

    def note(kind: str, place: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        share = distance(found, expected)
        # Not `>`, so that a difference of NaN fails as well.
        if not share <= tolerance:
            raise QtoolError(
                f"{place} of the exported model differs from the engine's by {share:.2%} in "
                "ONNX Runtime",
                remedy="please report this with the command you ran",
            )
        worst[kind] = max(worst[kind], share)

    def beside(name: str, original: _Call, given: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        *before, after = given
        for found, expected in zip(before, inputs, strict=True):
            note("float_difference", f"the input of {name}", found, expected, FLOAT_TOLERANCE)
        note("layer_difference", name, after, original(*before), LAYER_TOLERANCE)
        return after

    with torch.no_grad(), _replaced(model, taps, recorded, beside):
        expected = model(images)
    note("float_difference", "the output", logits, expected, FLOAT_TOLERANCE)
    return worst


@contextmanager
def _replaced(
    model: nn.Module, taps: Sequence[str], recorded: Sequence[Tensor], beside: _Call
) -> Iterator[None]:
    """Let `beside` answer for the layers that were recorded."""
    remaining, undo = iter(recorded), []
    try:
        for name in taps:
            owner, method = _method(model, name)
            count = 2 if method == "forward" else 3
            given = [next(remaining) for _ in range(count)]
            original = getattr(owner, method)
            setattr(owner, method, functools.partial(beside, name, original, given))
            undo.append((owner, method))
        yield
    finally:
        for owner, method in undo:
            delattr(owner, method)


def _method(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and its method that compute a recorded layer."""
    owner, _, method = name.rpartition(".")
    products = model.get_submodule(owner)
    if isinstance(products, IntegerProducts | NestedProducts):
        return products, method
    return model.get_submodule(name), "forward"


@torch.no_grad()
def compare(model: nn.Module, images: Tensor, logits: Tensor) -> dict[str, float]:
    """Compare the logits of an exported model with the engine's, each having run by itself.

    Args:
        model: The model, of integer layers.
        images: Pictures, (B, 3, H, W).
        logits: What the exported model makes of them, (B, classes).

    Returns:
        Share of pictures with the same choice; the largest difference of a logit relative to the
        largest logit; the relative error of all; and the largest of the engine under noise.

    Raises:
        QtoolError: They differ by more than noise explains.
    """
    expected = model(images)
    with _noise(model):
        own = max(distance(model(images), expected) for _ in range(_DRAWS))
    share = distance(logits, expected)
    if not share <= max(OUTPUT_TOLERANCE, _NOISE_FACTOR * own):
        raise QtoolError(
            f"the logits of the exported model differ from the engine's by {share:.1%} in ONNX "
            f"Runtime, where noise would make {own:.1%}",
            remedy="please report this with the command you ran",
        )
    largest = expected.abs().max().clamp_min(1e-12)
    return {
        "pictures": len(images),
        "same_choice": float((logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean()),
        "largest_difference": float((logits - expected).abs().max() / largest),
        "relative_error": share,
        "relative_error_of_noise": own,
    }


@contextmanager
def _noise(model: nn.Module) -> Iterator[None]:
    """Disturb what every module without children returns in the last bits of float32."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, __: object, output: Any) -> Any:  # noqa: ANN401
        if not isinstance(output, Tensor):
            return output
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return output * (1 + _NOISE * noise)

    handles = [
        module.register_forward_hook(cast(Any, disturb))
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
