"""Linear layers on matrix tiles give what integers and PyTorch's float operations give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.engine import dispatch, ops, resident
from qtool.engine.cpu import amx, native
from qtool.engine.cpu.linear import nested_layer

pytestmark = pytest.mark.skipif(
    not (native.has_tiles() and amx.are_exact()), reason="this CPU has no matrix tiles"
)


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(rows, depth, width, seed, *, bias=True, zero=37):
    """Codes, layer and the values it should give."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, depth), generator=generator).to(torch.uint8)
    levels = torch.randint(-128, 128, (width, depth), generator=generator).to(torch.int8)
    scale = torch.rand(width, generator=generator) + 0.01
    added = torch.randn(width, generator=generator) if bias else None
    layer = amx.TileLinear(amx.laid_out(levels), scale, added, zero)
    sums = (codes.double() - zero) @ levels.double().t()
    values = sums.float() * scale
    return codes, layer, values if added is None else values + added


@given(
    rows=st.integers(1, 70),
    depth=st.integers(1, 5).map(lambda steps: 64 * steps),
    width=st.integers(1, 100),
    seed=st.integers(0, 999),
    bias=st.booleans(),
    zero=st.sampled_from([0, 3, 255]),
    threads=st.integers(1, 5),
)
def test_values_are_those_of_exact_sums(rows, depth, width, seed, bias, zero, threads):
    codes, layer, values = drawn(rows, depth, width, seed, bias=bias, zero=zero)
    torch.set_num_threads(threads)
    assert torch.equal(layer.product(codes), values)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_many_rows_pass_in_parts(threads):
    codes, layer, values = drawn(700, 2048, 40, 0)
    torch.set_num_threads(threads)
    assert torch.equal(layer.product(codes), values)


@pytest.mark.parametrize("width", [32, 45])
def test_another_matrix_is_added_in_place(width):
    codes, layer, values = drawn(50, 128, width, 1)
    stream = torch.randn(50, width)
    expected = stream + values
    out = torch.full((50, width), torch.nan)
    assert layer.product(codes, added=stream, out=out) is out
    assert torch.equal(out, expected)
    layer.product(codes, added=stream, out=stream)
    assert torch.equal(stream, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("table", [False, True], ids=["uniform", "table"])
@pytest.mark.parametrize(("pictures", "tokens", "heads", "depth"), [(2, 17, 3, 16), (3, 33, 2, 32)])
def test_codes_are_those_of_the_values(pictures, tokens, heads, depth, table, threads, draw):
    width = 3 * heads * depth
    codes, layer, values = drawn(pictures * tokens, 64, width, 2)
    scales, zeros = draw.scales(3) * 1e4, draw.zeros(3, bits=4)
    tables = [draw.codes(256).sort().values if table else None for _ in range(3)]
    quantizers = (native.Quantizer * 3)(
        *(
            native.quantizer(scale, zero, own, 4, signed=number > 0)
            for number, (scale, zero, own) in enumerate(zip(scales, zeros, tables, strict=True))
        )
    )
    size = (pictures, heads, tokens, depth)
    by_head = (heads * tokens * depth, tokens * depth, depth)
    out = torch.full((3, *size), 99, dtype=torch.uint8)
    torch.set_num_threads(threads)
    walk = native.walk(size, (0, 0, 0), by_head)
    layer.codes(codes, out.data_ptr(), walk, quantizers, out.stride(0))
    parts = values.view(pictures, tokens, 3, heads, depth).permute(2, 0, 3, 1, 4)
    for number, (part, found) in enumerate(zip(parts, out, strict=True)):
        step, zero, own = scales[number : number + 1], zeros[number : number + 1], tables[number]
        with dispatch.use_backend("reference"):
            if own is None:
                expected = ops.quantize_uniform(part, step, zero, bits=4)
            else:
                expected = ops.quantize_table(part, step, zero, own)
        assert len(expected.unique()) > 3
        assert torch.equal(found, expected ^ 128 if number else expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", range(2, 9))
def test_leading_bits_of_nested_codes_are_multiplied(bits, threads, draw):
    x, weight = draw.codes(37, 192), (draw.codes(45, 192).int() - 128).to(torch.int8)
    arguments = (draw.scales(1), draw.zeros(1), weight, draw.scales(45), draw.floats(45))
    torch.set_num_threads(threads)
    results = []
    for backend in ("reference", "cpu"):
        with dispatch.use_backend(backend):
            results.append(ops.linear_nested(x, *arguments, bits=bits))
    assert torch.equal(*results)
    panels = resident.derived(amx.laid_out, weight).panels
    assert resident.derived(amx.laid_out, weight).panels is panels  # one layout for all widths
    lesser = nested_layer(*arguments, bits)
    assert lesser is not None
    assert lesser.layer.panels == panels.data_ptr()


def test_other_depths_go_elsewhere(monkeypatch):
    assert amx.takes(192)
    assert not amx.takes(100)
    assert not amx.takes(amx.MOST_DEPTH + amx.STEP)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not amx.takes(192)
