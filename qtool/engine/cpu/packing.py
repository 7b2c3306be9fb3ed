"""Fast CPU versions of packing and unpacking weight codes."""

from __future__ import annotations

from torch import Tensor

from qtool.engine.packing import packed_width, planes


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packed rows (N, bytes) of codes (N, K); see `qtool.engine.packing` for the format."""
    rows, in_features = codes.shape
    packed = codes.new_zeros(rows, packed_width(bits, in_features))
    for width, low, start, _ in planes(bits, in_features):
        per_byte = 8 // width
        for field in range(per_byte):
            source = codes[:, field::per_byte] >> low & 2**width - 1
            packed[:, start : start + source.shape[1]] |= source << field * width
    return packed


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Codes (N, K) of packed rows (N, bytes): the inverse of `pack_codes`."""
    codes = packed.new_zeros(packed.shape[0], in_features)
    for width, low, start, _ in planes(bits, in_features):
        per_byte = 8 // width
        for field in range(per_byte):
            target = codes[:, field::per_byte]
            source = packed[:, start : start + target.shape[1]]
            target |= (source >> field * width & 2**width - 1) << low
    return codes
