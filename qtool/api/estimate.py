"""How long a run will take: the operations it needs, over the rate this machine multiplies at."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qtool.api.runtime import bfloat16_is_faster, choose_device
from qtool.models import vision
from qtool.quant.plan import LayerPlan, weight_parameters

_SIDE = 1024
_SECONDS = 0.1

# What a step takes beside its matrix products (softmax, GELU, normalisation, rounding, memory),
# as a factor on their time; measured with DeiT-tiny on a CPU.
_SYNTHESIS = 1.6
_RECONSTRUCTION = 1.9

# The same for training quantized convolutions; measured with a ResNet-20 on a CPU.
_TRAINING = 2.7

# The same for classifying in float32, where matrix products are of bfloat16; and seconds to read
# a photograph of half a megapixel.
_FORWARD = 3.0
_READING = 0.012

# Ranges, errors and checks of one calibration image, in forward passes.
_PASSES = 32

_RECONSTRUCTION_BATCH = 8

# What a checkpoint takes beside codes and float parameters: scales and sums of a row at one width
# and at several, and the description of a layer and its activations; measured on ten files.
_ROW_BYTES, _ROW_BYTES_PER_WIDTH = 8, 4
_LAYER_BYTES, _SWITCHABLE_LAYER_BYTES = 700, 1500


class Estimate:
    """Seconds for the parts of a run on this machine.

    Attributes:
        network: The model without memory for its weights; None for a hub repository.

    Args:
        name: Model, as for `vision.open_model`; no weights are read.
        weights: As for `vision.open_model`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: The model's arguments do not suit it.
        MissingError: The device is not there.
    """

    def __init__(self, name: str, *, weights: str, device: str) -> None:
        outline = vision.outline(name, weights=weights)
        self.network = None if outline is None else outline[0]
        self.forward = None
        if outline is None:
            return
        network, size = outline
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty((1, *size), device="meta"))
        operations = counter.get_total_flops()
        self.forward = operations / _operations_per_second(choose_device(device))

    def synthesis(self, *, count: int, patches: int, steps: int) -> float:
        """Optimise `count` images and `patches` blown-up squares of them: forward and backward."""
        return _SYNTHESIS * self.synthesis_floor(count=count, patches=patches, steps=steps)

    def synthesis_floor(self, *, count: int, patches: int, steps: int) -> float:
        """The part of it that is matrix products: forward, and gradients of inputs alone."""
        return 2 * steps * (count + patches) * (self.forward or 0.0)

    def reconstruction(self, *, count: int, steps: int) -> float:
        """Choose ranges on `count` images and train every block for `steps` steps."""
        trained = _RECONSTRUCTION * 3 * steps * _RECONSTRUCTION_BATCH
        return (trained + _PASSES * count) * (self.forward or 0.0)

    def passes(self, pictures: int) -> float:
        """Read so many pictures and classify them."""
        return pictures * (_READING + (self.forward or 0.0) * _FORWARD)

    def training(self, *, pictures: int, passes: float) -> float:
        """Train on so many pictures, each of which goes through the network `passes` times."""
        return _TRAINING * 3 * pictures * passes * (self.forward or 0.0)


def checkpoint_bytes(
    network: nn.Module,
    plans: Mapping[str, LayerPlan],
    *,
    bits: float | None = None,
    widths: int = 0,
) -> int:
    """About how large the checkpoint of a quantized network is.

    Args:
        network: The float network.
        plans: Plans by module name.
        bits: Stored bits of a weight on average; None takes those of the plans.
        widths: How many widths a switchable file has, which keeps the rest in half precision; 0
            for a file of one width.
    """
    coded = {
        name: network.get_parameter(f"{name}.weight")
        for name, plan in plans.items()
        if plan.weight_bits
    }
    codes = sum(w.numel() * (bits or plans[name].weight_bits) / 8 for name, w in coded.items())
    rows = sum(len(weight) for weight in coded.values())
    rest = sum(p.numel() for p in network.parameters()) - weight_parameters(network, plans)
    if widths:
        row, layer, real = _ROW_BYTES_PER_WIDTH * widths, _SWITCHABLE_LAYER_BYTES, 2
    else:
        row, layer, real = _ROW_BYTES, _LAYER_BYTES, 4
    return round(codes + rows * row + len(coded) * layer + rest * real)


def warm_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time some work once everything that it uses has been started and loaded."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _operations_per_second(device: torch.device) -> float:
    """Rate of a matrix product, measured, in floating-point operations."""
    kind = torch.bfloat16 if bfloat16_is_faster(device) else torch.float32
    left = torch.ones((_SIDE, _SIDE), dtype=kind, device=device)
    done, started = 0, 0.0
    while not done or time.perf_counter() - started < _SECONDS:
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first product starts threads and libraries, and is not counted.
        started = started or time.perf_counter()
        done += 1
    return 2.0 * _SIDE**3 * max(1, done - 1) / (time.perf_counter() - started)
