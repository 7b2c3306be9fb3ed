"""What the CPU path promises beyond equality with the reference."""

from __future__ import annotations

import pytest
import torch

from qtool.engine import cpu, dispatch, ops
from qtool.errors import BackendError


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.mark.usefixtures("exact_int8_products")
@pytest.mark.parametrize("per_token", [False, True], ids=["tensor", "token"])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_has_the_bits_of_a_float_simulation(bits, per_token, draw):
    tokens, features, channels = 197, 192, 51
    x, q = draw.codes(tokens, features, bits=bits), draw.codes(channels, features, bits=bits)
    size = (tokens, 1) if per_token else (1,)
    x_scale, x_zero = draw.scales(*size), draw.zeros(*size, bits=bits)
    scale, zero, bias = (
        draw.scales(channels),
        draw.zeros(channels, bits=bits),
        draw.floats(channels),
    )
    simulated = ((x - x_zero).float() @ (q - zero[:, None]).float().T) * (x_scale * scale) + bias
    packed = ops.pack_codes(q, bits=bits)
    sizes = {"weight_bits": bits, "in_features": features}
    with dispatch.use_backend("cpu"):
        y = ops.linear(x, x_scale, x_zero, packed, scale, zero, bias, **sizes)
    assert torch.equal(y, simulated)


@pytest.mark.usefixtures("exact_int8_products")
def test_rows_are_taken_in_blocks(draw):
    rows = cpu.BLOCK_ROWS + 3
    x, weight = draw.codes(rows, 5), draw.codes(3, 5)
    parameters = (draw.scales(rows, 1), draw.zeros(rows, 1), weight, draw.scales(3), draw.zeros(3))
    results, codes = [], []
    values = draw.floats(rows, 300)
    for backend in ("reference", "cpu"):
        with dispatch.use_backend(backend):
            results.append(ops.linear(x, *parameters, weight_bits=8, in_features=5))
            codes.append(ops.quantize_uniform(values, *parameters[:2], bits=8))
            codes.append(ops.quantize_log2(values.abs(), draw.scales(1) * 0 + 0.1, bits=8))
    assert torch.equal(*results)
    assert torch.equal(codes[0], codes[2])
    assert torch.equal(codes[1], codes[3])


def test_a_cpu_with_saturating_products_is_left_to_the_reference(monkeypatch, draw):
    monkeypatch.setattr(cpu, "int8_product_is_exact", lambda: False)
    a, b, one, zero = draw.codes(3, 5), draw.codes(5, 2), draw.scales(1), draw.zeros(1)
    with dispatch.trace() as decisions:
        ops.matmul(a, one, zero, b, one, zero)
        ops.matmul_log2(a, one, b, one, zero, bits=8)
    assert decisions == [
        ("matmul", "reference", "this CPU's int8 products saturate (no VNNI)"),
        ("matmul_log2", "cpu", "tensors on cpu"),
    ]
    with dispatch.use_backend("cpu"), pytest.raises(BackendError, match="saturate"):
        ops.matmul(a, one, zero, b, one, zero)


@pytest.mark.parametrize("terms", [0, 1, 514, 515, 1100])
def test_products_without_int8_units_are_exact(monkeypatch, terms):
    monkeypatch.setattr(cpu, "has_int8_units", lambda: False)
    codes = torch.full((5, terms), 255, dtype=torch.uint8)
    weight = torch.full((terms, 3), -128, dtype=torch.int8)
    codes[1:3, ::3], weight[::2, 1:] = 254, 127
    assert torch.equal(cpu.product(codes, weight).long(), codes.long() @ weight.long())


needs_unsigned_codes = pytest.mark.skipif(
    not cpu.takes_unsigned_codes(), reason="this torch multiplies int8 by int8 only"
)


def test_a_torch_without_unsigned_products_has_no_int8_units(monkeypatch):
    def refuse(left, right):
        raise RuntimeError(f"expected int8, not {left.dtype}")

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", refuse)
    cpu.has_int8_units.cache_clear()
    try:
        assert not cpu.has_int8_units()
    finally:
        cpu.has_int8_units.cache_clear()


@needs_unsigned_codes
@pytest.mark.usefixtures("exact_int8_products")
def test_the_self_check_notices_saturation(monkeypatch):
    exact = torch._int_mm
    monkeypatch.setattr(cpu, "has_int8_units", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: exact(x, w).clamp(max=32767 * 64))
    cpu.int8_product_is_exact.cache_clear()
    assert not cpu.int8_product_is_exact()
    cpu.int8_product_is_exact.cache_clear()


@pytest.mark.parametrize(
    "units",
    [
        pytest.param(True, id="int8 units", marks=needs_unsigned_codes),
        pytest.param(False, id="float32"),
    ],
)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_nested_layers_are_exact_with_and_without_int8_units(monkeypatch, draw, units, bits):
    rows, terms = cpu.BLOCK_ROWS + 3, 1100
    x, x_scale, x_zero = draw.codes(rows, terms), draw.scales(rows, 1), draw.zeros(rows, 1)
    weight, scale = draw.codes(3, terms).view(torch.int8), draw.scales(3)
    weight[0], weight[1] = -128, 127
    with dispatch.use_backend("reference"):
        expected = ops.linear_nested(x, x_scale, x_zero, weight, scale, bits=bits)
    monkeypatch.setattr(cpu, "has_int8_units", lambda: units)
    y = cpu.linear_nested(x, x_scale, x_zero, weight, scale, None, bits)
    assert torch.equal(y, expected)
