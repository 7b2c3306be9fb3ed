"""Exact integer products on a CPU: on its int8 units, or as float32 whose sums stay exact."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

EXACT_SUM = 2**24  # float32 holds every integer up to here


@functools.cache
def has_int8_units() -> bool:
    """Whether PyTorch multiplies uint8 by int8 in hardware here (x86 with VNNI)."""
    return bool(torch.cpu._is_vnni_supported()) and takes_unsigned_codes()


def takes_unsigned_codes() -> bool:
    """Whether `torch._int_mm` takes uint8 on the left; torch 2.11 takes int8 alone."""
    codes, weight = torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1, dtype=torch.int8)
    try:
        torch._int_mm(codes, weight)
    except RuntimeError:
        return False
    return True


@functools.cache
def int8_product_is_exact() -> bool:
    """Whether `product` is exact for all codes: some CPUs saturate 16-bit sums silently."""
    x = torch.full((33, 128), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((128, 32), -128, dtype=torch.int8, device="cpu")
    weight[:, ::2] = 127
    expected = x.double() @ weight.double()
    return all(torch.equal(product(x[:rows], weight).double(), expected[:rows]) for rows in (1, 33))


def product(codes: Tensor, weight: Tensor) -> Tensor:
    """Exact integer product of uint8 codes (M, K) and int8 weights (K, N), int32 (M, N)."""
    if has_int8_units():
        return torch._int_mm(codes, weight)
    return float_sums(codes.float(), weight.float(), reach=255 * 128).int()


def float_sums(left: Tensor, right: Tensor, *, reach: int) -> Tensor:
    """Exact product of integer-valued float32 matrices.

    Args:
        left: (..., M, K).
        right: (..., K, N).
        reach: Largest magnitude that a product of two elements can have.

    Returns:
        (..., M, N), float32 where that holds every possible sum, else int32.
    """
    most = max(1, EXACT_SUM // max(1, reach))
    if left.shape[-1] <= most:
        return left @ right
    sums = left.new_zeros(*left.shape[:-1], right.shape[-1], dtype=torch.int32)
    for terms in blocks(left.shape[-1], most):
        sums += (left[..., terms] @ right[..., terms, :]).int()
    return sums


def reach(zero: Tensor, top: int) -> int:
    """Largest magnitude of codes 0..top less their zero points."""
    if not zero.numel():
        return 0
    return max(int(zero.max()), top - int(zero.min()))


def blocks(length: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `length` rows."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def some_rows(parameter: Tensor, rows: slice) -> Tensor:
    """The rows of a per-token parameter (M, 1), or all of a per-tensor one (1, 1)."""
    return parameter if len(parameter) == 1 else parameter[rows]
