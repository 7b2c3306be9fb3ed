"""The packed format: byte counts, known bytes, round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.engine import dispatch, ops, packing

KNOWN_BYTES = {
    2: ([0, 1, 2, 3, 1], [0b11_10_01_00, 0b01]),
    3: ([0b101, 0b010, 0b111], [0b11_10_01, 0b101]),
    4: ([0xA, 0x3, 0xF], [0x3A, 0x0F]),
    5: ([0b1_0110, 0b0_1001, 0b1_1111], [0x96, 0x0F, 0b101]),
    6: ([0b10_0110, 0b01_1001], [0x96, 0b01_10]),
    7: ([0b1_10_0110, 0b0_01_1001], [0x96, 0b01_10, 0b01]),
    8: ([0, 255, 7], [0, 255, 7]),
}


@st.composite
def code_rows(draw):
    bits = draw(st.integers(packing.MIN_BITS, packing.MAX_BITS))
    rows, in_features = draw(st.integers(0, 4)), draw(st.integers(0, 35))
    count = rows * in_features
    codes = draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    return bits, torch.tensor(codes, dtype=torch.uint8).view(rows, in_features)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bits", KNOWN_BYTES)
def test_rows_have_the_bytes_of_the_format(bits, backend):
    codes, expected = KNOWN_BYTES[bits]
    with dispatch.use_backend(backend):
        packed = ops.pack_codes(torch.tensor([codes, codes], dtype=torch.uint8), bits=bits)
    assert packed.tolist() == [expected, expected]


@given(code_rows())
def test_packed_rows_unpack_to_the_same_codes(case):
    bits, codes = case
    packed = {}
    for backend in ("reference", "cpu"):
        with dispatch.use_backend(backend):
            packed[backend] = ops.pack_codes(codes, bits=bits)
            unpacked = ops.unpack_codes(packed[backend], bits=bits, in_features=codes.shape[1])
        assert torch.equal(unpacked, codes)
    assert torch.equal(packed["reference"], packed["cpu"])


@given(st.integers(2, 8), st.integers(0, 300))
def test_a_row_takes_the_bits_of_its_codes_and_less_than_a_byte_a_plane_more(bits, in_features):
    width = packing.packed_width(bits, in_features)
    planes = packing.planes(bits, in_features)
    assert width == (planes[-1].stop if in_features else 0)
    assert 0 <= 8 * width - bits * in_features < 8 * len(planes)
    assert sum(plane.width for plane in planes) == bits


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_multiple_of_eight_codes_wastes_nothing(bits):
    assert packing.packed_width(bits, 768) == 768 * bits // 8


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_past_the_last_code_do_not_matter(bits, draw, assert_equal_everywhere):
    clean = ops.pack_codes(draw.codes(5, 9, bits=bits), bits=bits)
    dirty = clean.clone()
    for plane in packing.planes(bits, 9):
        used = 9 * plane.width % 8
        dirty[:, plane.stop - 1] |= 0 if used == 0 else 256 - 2**used
    sizes = {"bits": bits, "in_features": 9}
    expected = ops.unpack_codes(clean, **sizes)
    assert torch.equal(assert_equal_everywhere(ops.unpack_codes, dirty, **sizes), expected)
    x, one, zero = draw.codes(3, 9), draw.scales(1), draw.zeros(1)
    rest = (draw.scales(5), draw.zeros(5, bits=bits))
    sizes = {"weight_bits": bits, "in_features": 9}
    expected = ops.linear(x, one, zero, clean, *rest, **sizes)
    result = assert_equal_everywhere(ops.linear, x, one, zero, dirty, *rest, **sizes)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("in_features", [1, 97, 300])
@pytest.mark.parametrize("bits", range(2, 9))
def test_backends_pack_alike(bits, in_features, draw, assert_equal_everywhere):
    codes = draw.codes(21, in_features, bits=bits)
    packed = assert_equal_everywhere(ops.pack_codes, codes, bits=bits)
    sizes = {"bits": bits, "in_features": in_features}
    assert torch.equal(assert_equal_everywhere(ops.unpack_codes, packed, **sizes), codes)


def test_unpacking_never_returns_its_input(draw):
    codes = draw.codes(3, 4)
    packed = ops.pack_codes(codes, bits=8)
    unpacked = ops.unpack_codes(packed, bits=8, in_features=4)
    assert len({tensor.data_ptr() for tensor in (codes, packed, unpacked)}) == 3
