"""A convolution of a branch that runs on the integer engine, at every width the branch serves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qtool.engine import ops
from qtool.engine.resident import derived
from qtool.quant.branch_grid import UnitPlan, engine_weight


class IntegerUnit(nn.Module):
    """Convolution with folded BatchNorm: (B, C, H, W) and a width to (B, N, H', W').

    Buffers: `codes` int8 (N, K), the same at all widths; for every width b `alpha_b` and `delta_b`
    (rows,), scale and bias of the rows that run, and `step_b` (1,), the scale of activations.

    Args:
        plan: Shape, geometry and widths; all have weights of the same bits.
        device: Where the buffers live.
    """

    codes: Tensor
    zero: Tensor
    weight_zero: Tensor

    def __init__(self, plan: UnitPlan, *, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.plan = plan
        (self.weight_bits,) = plan.weight_bits
        rows, columns = plan.shape[0], int(torch.Size(plan.shape[1:]).numel())
        empty = torch.zeros(rows, columns, dtype=torch.uint8)
        packing = engine_weight(empty, bits=self.weight_bits)
        self.engine_bits = packing.bits
        self.register_buffer("codes", packing.codes.to(device))
        zero = torch.full((rows,), packing.zero, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero", zero, persistent=False)
        none = torch.zeros(1, dtype=torch.int32, device=device)
        self.register_buffer("zero", none, persistent=False)
        for member in plan.members:
            outputs = plan.channels(member)[1]
            for leaf, size in (("alpha", outputs), ("delta", outputs), ("step", 1)):
                empty_row = torch.zeros(size, device=device)
                self.register_buffer(f"{leaf}_{member.width}", empty_row)

    def set_codes(self, codes: Tensor) -> None:
        """Take weight codes (N, K), uint8 in 0 .. 2^bits - 1."""
        self.codes.copy_(engine_weight(codes, bits=self.weight_bits).codes)

    def weight_codes(self) -> Tensor:
        """Weight codes (N, K), uint8 in 0 .. 2^bits - 1."""
        levels = self.codes.to(torch.int16) + 2 ** (self.engine_bits - 1)
        spread = self.engine_bits > self.weight_bits
        codes: Tensor = levels // 2 if spread else levels
        return codes.to(torch.uint8)

    def set_scales(self, width: int, alpha: Tensor, delta: Tensor, step: Tensor) -> None:
        """Take the scales of one width."""
        self.get_buffer(f"alpha_{width}").copy_(alpha)
        self.get_buffer(f"delta_{width}").copy_(delta)
        self.get_buffer(f"step_{width}").copy_(step.reshape(1))

    def scales(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and bias of rows, and the scale of activations, at one width."""
        alpha, delta = self.get_buffer(f"alpha_{width}"), self.get_buffer(f"delta_{width}")
        return alpha, delta, self.get_buffer(f"step_{width}")

    def forward(self, x: Tensor, width: int) -> Tensor:
        """Quantize to `width` bits, convolve integers, apply scales and bias."""
        member = self.plan.members[self.plan.index(width)]
        alpha, delta, step = self.scales(width)
        kernel = self.plan.shape[2:]
        rows, columns = self.codes.shape
        if member.narrow:
            inputs, rows = self.plan.narrow
            columns = inputs * kernel[0] * kernel[1]
        return ops.conv2d(
            ops.quantize_uniform(x, step, self.zero, bits=width),
            step,
            self.zero,
            derived(_packing(self.engine_bits, rows, columns), self.codes),
            alpha,
            derived(_leading(rows), self.weight_zero),
            delta,
            weight_bits=self.engine_bits,
            kernel=kernel,
            **self.plan.geometry._asdict(),
        )


@functools.cache
def _packing(bits: int, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """Packs the leading rows and columns of codes that are less half their range."""

    def pack(codes: Tensor) -> Tensor:
        some = codes[:rows, :columns].to(torch.int16) + 2 ** (bits - 1)
        return ops.pack_codes(some.to(torch.uint8), bits)

    return pack


@functools.cache
def _leading(rows: int) -> Callable[[Tensor], Tensor]:
    """Takes the first rows of a tensor; kept, so that what is derived from them is kept too."""
    return lambda tensor: tensor[:rows]
